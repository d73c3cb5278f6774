"""Nonlinear least squares for images and secrets together, where the closed form is stopped and beyond."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from fedkl.attacks import GaussNewton, PriorOnly
from fedkl.attacks import smoothness as prior
from fedkl.attacks.algebraic.structure import read_structure
from fedkl.attacks.matching import gauss_newton
from fedkl.attacks.matching.annealing import Fit, anneal
from fedkl.defenses import KeyLock, NoDefense, PrivateLayers
from fedkl.errors import AttackError, ConfigError
from fedkl.protocol import Procedure
from tests.attacks.element import correlations, seen_of

QUICK = GaussNewton(components=128, iterations=25, draws=5)
PUBLISHED = KeyLock(key_distribution="uniform", activation="relu", initialization="published", layers="all")


def run(attack, seen):
    generators = [torch.Generator().manual_seed(k) for k in range(len(seen))]
    return attack.reconstruct_many(seen, generators=generators)


def attacked(images, model, defense, attack=QUICK, *, trials=3, **options):
    torch.manual_seed(5)
    seen, chosen = seen_of(defense, model, images, trials=trials, **options)
    return run(attack, seen), seen, chosen


@pytest.fixture
def model(small):
    torch.manual_seed(0)
    return small()


def test_the_published_lock_in_all_layers_leaks_from_one_gradient(images, model):
    """Whose dead channels leave the closed form too few equations, more often than not."""
    found, seen, chosen = attacked(images, model, PUBLISHED, trials=2)
    ours = correlations(found, chosen)
    floor = correlations(run(PriorOnly(guess="mean"), seen), chosen)
    assert float(ours.min()) > 0.9
    assert bool((ours > floor + 0.15).all())
    assert all(each.scaling == "clip" and each.loss < 1e-2 for each in found)
    assert [int(each.labels) for each in found] == [int(trial.labels) for trial in chosen]


class Remembering(KeyLock):
    """A lock that keeps its victims, to be compared with what an attack finds."""

    victims: ClassVar[list] = []

    def prepare(self, model, *, key=None):
        self.victims.append(super().prepare(model, key=key))
        return self.victims[-1]


@pytest.mark.parametrize("activation", ["softplus", "tanh"])
def test_the_secret_comes_out_too(images, small, activation):
    """Behind signed keys a ReLU cuts channels off whose γ is not zero."""
    torch.manual_seed(0)
    Remembering.victims.clear()
    lock = Remembering(layers="all", activation=activation)
    model = small(act=nn.ReLU) if activation == "tanh" else small()
    seen, _ = seen_of(lock, model, images, trials=1)
    true = dict(Remembering.victims[0].bake().named_parameters())
    (found,) = run(QUICK, seen)
    assert set(found.private) == set(true) - set(seen[0].gradient)
    if activation == "tanh":
        dead = [name for name, support in read_structure(seen[0]).support.items() if not bool(support.all())]
        assert all(bool((found.private[name] != 0).all()) for name in dead)
        return
    together = [torch.stack([value, true[name].detach()]) for name, value in found.private.items()]
    assert all(float(torch.corrcoef(pair)[0, 1]) > 0.9 for pair in together)


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(4, 8), lambda: nn.BatchNorm2d(8)])
def test_norms_of_any_kind_and_relu(images, small, norm):
    torch.manual_seed(0)
    found, _, chosen = attacked(images, small(act=nn.ReLU, between=norm), NoDefense(), trials=1)
    assert float(correlations(found, chosen).min()) > 0.7


def test_a_batch_of_two(images, model):
    torch.manual_seed(5)
    seen, _ = seen_of(NoDefense(), model, images, trials=1)
    pair = images.test_images[:2], images.test_labels[:2]
    (observed,) = [replace(seen[0], gradient=gradient(model, *pair), batch_size=2, labels=pair[1])]
    (found,) = run(QUICK, [observed])
    both = torch.stack([found.images.flatten(1), pair[0].flatten(1)])
    assert all(float(torch.corrcoef(both[:, k])[0, 1]) > 0.9 for k in range(2))


def gradient(model, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    names, tensors = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, tensors), strict=True))


def signs_and_roots(update, seen=None):
    return {name: g.sign() * (g.abs() + 1e-6).sqrt() for name, g in update.items()}


def test_a_public_transform_is_played(images, model):
    torch.manual_seed(5)
    seen, chosen = seen_of(NoDefense(), model, images, trials=1)
    sent = replace(seen[0], gradient=signs_and_roots(seen[0].gradient), transform=signs_and_roots)
    assert float(correlations(run(QUICK, [sent]), chosen).min()) > 0.9


@pytest.mark.parametrize(("misfits", "chosen"), [((3.0, 1.0, math.inf), 1), ((math.inf,) * 3, 0)])
def test_of_several_starts_the_best_fit_is_returned(images, model, monkeypatch, misfits, chosen):
    left = list(misfits)

    def known(residuals, start, **options):
        return Fit(start, left.pop(0), 1)

    monkeypatch.setattr(gauss_newton, "anneal", known)
    (found,), _, _ = attacked(images, model, NoDefense(), replace(QUICK, restarts=3), trials=1)
    assert (found.start, found.loss) == (chosen, min(misfits))
    assert bool(found.images.isfinite().all()) == math.isfinite(min(misfits))
    assert not left


@pytest.mark.parametrize("factor", [1e-22, 1e6])
def test_a_gradient_of_any_size(images, model, factor):
    """A client that is sure of its label sends next to nothing."""
    torch.manual_seed(5)
    seen, _ = seen_of(NoDefense(), model, images, trials=1)
    sent = {name: tensor * factor for name, tensor in seen[0].gradient.items()}
    (found,) = run(replace(QUICK, iterations=2), [replace(seen[0], gradient=sent)])
    assert bool(found.images.isfinite().all())


@pytest.mark.parametrize("draws", [2, 5])
def test_few_draws_make_no_secret_known(images, model, draws):
    """A key's ReLU may give 0 in all of them."""
    seen, _ = seen_of(PUBLISHED, model, images, trials=1)
    (found,) = run(replace(QUICK, iterations=1, draws=draws), seen)
    gamma = {name: value for name, value in found.private.items() if name.endswith("weight")}
    for name, support in read_structure(seen[0]).support.items():
        assert torch.equal(gamma[name] != 0, support)


def test_a_network_that_draws_is_refused(images, model):
    seen, _ = seen_of(NoDefense(), nn.Sequential(nn.Dropout(), *model), images, trials=1)
    with pytest.raises(AttackError, match="cannot be differentiated forward"):
        run(QUICK, seen)


def test_refuses_what_it_cannot_do(images, model):
    _, seen, _ = attacked(images, model, KeyLock(), replace(QUICK, iterations=1), trials=1)
    (observed,) = seen
    name = next(n for n, _ in observed.model.named_parameters() if n not in observed.gradient)
    with pytest.raises(AttackError, match="none may be free"):
        run(QUICK, [replace(observed, free=(name,))])
    with pytest.raises(AttackError, match="at least 100 auxiliary images"):
        run(QUICK, [replace(observed, auxiliary=None)])
    with pytest.raises(AttackError, match="clients that draw"):
        run(QUICK, [replace(observed, auxiliary=replace(observed.auxiliary, draw=None))])
    many = replace(observed, batch_size=64, labels=torch.zeros(64, dtype=torch.long))
    with pytest.raises(AttackError, match="at most 4,096 unknowns"):
        run(QUICK, [many])


def test_refuses_labels_in_an_order_that_it_does_not_know(images, model):
    _, seen, _ = attacked(images, model, NoDefense(), replace(QUICK, iterations=1), trials=1)
    steps = Procedure(algorithm="fedavg", batch_size=1, lr=0.1)
    two = replace(seen[0], batch_size=2, labels=None, local=steps)
    with pytest.raises(AttackError, match="which of them has which label"):
        run(QUICK, [two])
    for allowed in (replace(two, labels=torch.tensor([1, 0])), replace(two, local=Procedure())):
        assert QUICK.refusal(allowed) is None


def test_refuses_large_images(images, model):
    _, seen, _ = attacked(images, model, NoDefense(), replace(QUICK, iterations=1), trials=1)
    with pytest.raises(AttackError, match="at most 4,096 numbers, got 12,288"):
        run(QUICK, [replace(seen[0], image_shape=(3, 64, 64))])


@pytest.mark.parametrize("options", [{"components": 0}, {"iterations": 0}, {"restarts": 0}, {"draws": 1}])
def test_refuses_impossible_options(options):
    with pytest.raises(ConfigError, match="GaussNewton: expected"):
        GaussNewton(**options)


def test_what_all_draws_have_in_common_is_known(images, model):
    """Where γ and β were granted every draw has them: they are not sought."""
    torch.manual_seed(5)
    seen, _ = seen_of(KeyLock(), model, images, trials=1)
    granted = seen[0].auxiliary.draw()
    own = replace(seen[0].auxiliary, draw=lambda: granted)
    (found,) = run(replace(QUICK, iterations=2), [replace(seen[0], auxiliary=own)])
    assert all(torch.equal(found.private[name], granted[name]) for name in granted)


def test_a_private_first_layer_is_sought_like_any_other_secret(images, model):
    found, _, _ = attacked(
        images, model, PrivateLayers(layers=("0",)), replace(QUICK, iterations=2), trials=1
    )
    assert found[0].private["0.weight"].shape == (8, 3, 5, 5)


def test_components_are_those_of_the_images_and_smooth_beyond(images):
    few = images.train_images[:50].double()
    mean, basis = prior.components(few, count=300)
    assert torch.allclose(mean, few.flatten(1).mean(0))
    sizes = basis.square().sum(0)
    assert bool((sizes.diff() <= 1e-9).all())
    assert float(sizes[-1]) > 0  # there are more than 50 of them
    gram = basis.T @ basis
    assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-8
    _, every = prior.components(few, count=10_000)
    assert every.shape == (768, 768)


def test_annealing_finds_what_explains_the_residuals():
    torch.manual_seed(0)
    mix, true = torch.randn(40, 8, dtype=torch.float64), 0.7 * torch.randn(8, dtype=torch.float64)
    target = torch.tanh(mix @ true)

    def residuals(t):
        return torch.tanh(mix.to(t) @ t) - target.to(t)

    stages = [torch.arange(4), torch.arange(8)]
    fit = anneal(residuals, torch.zeros(8, dtype=torch.float64), stages=stages, iterations=100)
    assert torch.allclose(fit.point, true, atol=1e-4)
    assert fit.misfit < 1e-9
    assert fit.iterations < 100


def test_annealing_goes_no_further_than_it_may():
    calls = []

    def residuals(t):
        calls.append(t.dtype)
        return t - 1

    fit = anneal(residuals, torch.zeros(2, dtype=torch.float64), stages=[torch.arange(2)], iterations=1)
    assert fit.iterations == 1
    assert set(calls) == {torch.float32, torch.float64}


def test_annealing_says_so_where_nothing_is_finite():
    fit = anneal(
        lambda t: t * math.nan, torch.zeros(2, dtype=torch.float64), stages=[torch.arange(2)], iterations=5
    )
    assert fit.misfit == math.inf
    assert not fit.point.any()
