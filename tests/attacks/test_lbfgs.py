"""The batched L-BFGS against torch.optim.LBFGS on single problems, and its independence of company."""

from __future__ import annotations

import pytest
import torch

from fedkl.attacks.matching.lbfgs import Stopping, minimize


def rosenbrock(points, index):
    """A narrow curved valley per problem; its minimum is at 1 + index / 10 in every coordinate."""
    z = (points - index[:, None] / 10).detach().requires_grad_()
    values = (100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2).sum(1)
    (gradients,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), gradients


def starts(problems=5, d=6):
    return torch.randn(problems, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_finds_the_minimum_of_every_problem():
    minima = minimize(rosenbrock, starts(), stopping=Stopping(evaluations=2000, value=1e-20))
    expected = 1 + torch.arange(5)[:, None] / 10
    # Rosenbrock in six dimensions also has a local minimum near x₀ = −1, where the value is about 4.
    solved = minima.values < 1e-18
    assert solved.sum() >= 4
    torch.testing.assert_close(
        minima.points[solved], expected.expand(5, 6).double()[solved], atol=1e-7, rtol=0
    )


def test_agrees_with_torch_on_single_problems():
    for problem in range(3):
        index = torch.tensor([problem])
        start = starts()[problem : problem + 1]

        def alone(points, _, index=index):
            return rosenbrock(points, index)

        ours = minimize(alone, start, stopping=Stopping(evaluations=500, value=1e-22))
        x = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x],
            max_iter=500,
            max_eval=500,
            history_size=50,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-14,
            tolerance_change=0,
        )

        def closure(x=x, index=index, optimizer=optimizer):
            optimizer.zero_grad()
            z = x - index[:, None] / 10
            value = (100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2).sum()
            value.backward()
            return value

        optimizer.step(closure)
        theirs = float(closure().detach())
        assert float(ours.values) < 1e-15 or float(ours.values) == pytest.approx(theirs, rel=1e-6)


def test_the_company_does_not_change_a_problem():
    together = minimize(rosenbrock, starts(), stopping=Stopping(evaluations=60))
    for problem in range(5):
        index = torch.tensor([problem])

        def alone(points, _, index=index):
            return rosenbrock(points, index)

        single = minimize(alone, starts()[problem : problem + 1], stopping=Stopping(evaluations=60))
        torch.testing.assert_close(together.points[problem], single.points[0], rtol=1e-9, atol=1e-12)


def test_quadratics_converge_within_their_dimension():
    scales = torch.logspace(0, 3, 8, dtype=torch.float64)

    def quadratic(points, index):
        return (scales * points**2).sum(1) / 2, scales * points

    minima = minimize(quadratic, starts(4, 8), stopping=Stopping(evaluations=200, value=1e-24))
    assert bool((minima.values < 1e-20).all())
    assert bool((minima.evaluations < 80).all())


def test_budget_is_respected_and_the_value_never_rises():
    calls = []

    def counted(points, index):
        calls.append(len(index))
        return rosenbrock(points, index)

    initial, _ = rosenbrock(starts(), torch.arange(5))
    minima = minimize(counted, starts(), stopping=Stopping(evaluations=37))
    assert len(calls) == 37
    assert bool((minima.values <= initial).all())
    assert bool((minima.evaluations <= 37).all())


def test_non_finite_regions_are_stepped_back_from():
    def barrier(points, index):
        x = points[:, 0]
        return x - torch.log(x), (1 - 1 / x)[:, None]  # minimum at 1, NaN below 0

    minima = minimize(
        barrier, torch.tensor([[8.0], [0.01]], dtype=torch.float64), stopping=Stopping(evaluations=200)
    )
    torch.testing.assert_close(minima.points, torch.ones(2, 1, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_start_that_is_not_finite_is_a_failure_not_a_crash():
    def broken(points, index):
        return torch.full((len(points),), torch.nan, dtype=points.dtype), torch.zeros_like(points)

    minima = minimize(broken, starts(2), stopping=Stopping(evaluations=10))
    assert bool(torch.isinf(minima.values).all())
    assert minima.evaluations.tolist() == [1, 1]


def test_a_stalled_problem_stops_early():
    def flat(points, index):  # a slope so shallow that nothing is gained
        return 1 + 1e-9 * points.sum(1), torch.full_like(points, 1e-9)

    minima = minimize(flat, starts(2), stopping=Stopping(evaluations=10_000, window=50))
    assert bool((minima.evaluations <= 110).all())
