"""Nonlinear least squares for images and secrets together, where the closed form is stopped and beyond."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl.attacks import GaussNewton, PriorOnly
from fedkl.attacks.adaptive import prior
from fedkl.attacks.adaptive.annealing import anneal
from fedkl.defenses import KeyLock, NoDefense, PrivateLayers
from fedkl.defenses.base import plain_copy
from fedkl.errors import AttackError, ConfigError
from tests.attacks.adaptive.element import correlations, seen_of

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


def test_the_secret_comes_out_too(images, model):
    torch.manual_seed(5)
    lock = KeyLock()
    seen, _ = seen_of(lock, model, images, trials=1, prepared_once=True)
    (found,) = run(QUICK, seen)
    assert set(found.private) == {name for name, _ in seen[0].model.named_parameters()} - set(
        seen[0].gradient
    )
    torch.manual_seed(5)
    true = dict(plain_copy(lock.prepare(model)).named_parameters())
    gamma = next(name for name in found.private if name.endswith("weight"))
    assert found.private[gamma].shape == true[gamma].shape
    assert float(found.private[gamma].std()) > 0


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


def signs_and_roots(update):
    return {name: g.sign() * (g.abs() + 1e-6).sqrt() for name, g in update.items()}


def test_a_public_transform_is_played(images, model):
    torch.manual_seed(5)
    seen, chosen = seen_of(NoDefense(), model, images, trials=1)
    sent = replace(seen[0], gradient=signs_and_roots(seen[0].gradient), transform=signs_and_roots)
    assert float(correlations(run(QUICK, [sent]), chosen).min()) > 0.9


def test_restarts_never_do_worse(images, model):
    torch.manual_seed(5)
    seen, _ = seen_of(NoDefense(), model, images, trials=1)  # nothing is drawn: both begin alike
    (one,), (three,) = (run(replace(QUICK, iterations=4, restarts=n), seen) for n in (1, 3))
    assert three.loss <= one.loss
    assert three.start in range(3)


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
