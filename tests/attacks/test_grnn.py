"""GRNN on real images: it beats its random start, and its generator is the one of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkl import lock, models
from fedkl.attacks import GRNN
from fedkl.attacks.matching.grnn import GeneratorStack, _mean_variation, _up
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import psnr, score

QUICK = GRNN(iterations=8, lr=1e-3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def stack(observations, *, labels=True, latent=16):
    known = [o.labels for o in observations] if labels else None
    matching = GradientMatching(observations, labels=known, distance="grnn", dtype=torch.float32)
    seeds = [seeded(i) for i in range(len(observations))]
    return matching, GeneratorStack(matching, seeds, latent=latent, with_labels=not labels)


@pytest.mark.parametrize("labels", [True, False])
def test_recovers_an_undefended_image(observe_plain, images, small, labels):
    observation, sought, truth = observe_plain(labels=labels, model=small(), of=images)
    attack = GRNN(iterations=200, weighting="sqrt")
    start = GRNN(iterations=1, weighting="sqrt").reconstruct(observation, generator=seeded())
    found = attack.reconstruct(observation, generator=seeded())
    assert float(psnr(start.images, sought)) < 10
    (after,) = score(
        found.images, sought, candidates=images.test_images[:100], candidate_index=[0], scaling="clip"
    )
    assert after.psnr > 14
    assert after.identified
    assert torch.equal(found.labels, truth)
    assert found.loss < 0.2 * start.loss


def test_upsampling_against_torchs_layers():
    """Oracle: nearest upsampling, 3×3 convolution, batch norm over one problem's batch, GLU."""
    problems, batch, inputs, channels = 2, 3, 8, 6
    x = torch.randn(problems, batch, inputs, 4, 4, generator=seeded())
    kernel = torch.randn(problems, channels, 9, inputs, generator=seeded())
    gain, shift = torch.rand(2, problems, channels, generator=seeded())
    found = _up(x, kernel, gain, shift)
    for p in range(problems):
        weight = kernel[p].transpose(1, 2).reshape(channels, inputs, 3, 3)
        y = F.conv2d(F.interpolate(x[p], scale_factor=2, mode="nearest"), weight, padding=1)
        expected = F.glu(F.batch_norm(y, None, None, gain[p], shift[p], training=True), 1)
        torch.testing.assert_close(found[p], expected, atol=1e-5, rtol=1e-5)


def test_the_first_layer_moves_as_a_fully_connected_one():
    """Oracle: RMSprop on W of W z + b, against RMSprop on the output scaled by ‖z‖₁."""
    z = torch.randn(1, 32, generator=seeded(), dtype=torch.float64)
    target = torch.randn(1, 5, generator=seeded(1), dtype=torch.float64)
    full = nn.Linear(32, 5, bias=False, dtype=torch.float64)
    reach = z.abs().sum()
    short = (full(z) / reach).detach().requires_grad_()
    sides = ((lambda: full(z), full.weight), (lambda: reach * short, short))
    ends = []
    for output, parameter in sides:
        optimizer = torch.optim.RMSprop([parameter], lr=1e-4, momentum=0.99)
        for _ in range(50):
            optimizer.zero_grad()
            (output() - target).square().sum().backward()
            optimizer.step()
        ends.append(output().detach())
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=1e-6)


def test_starts_are_images_of_every_size(observe_plain):
    observation, _, _ = observe_plain()
    for side, channels, batch in ((8, 1, 1), (28, 1, 2), (64, 3, 1)):
        other, _, _ = observe_plain(
            image_shape=(channels, side, side), labels=False, gradient=observation.gradient
        )
        object.__setattr__(other, "batch_size", batch)
        matching, generators = stack([other, other], labels=False)
        points = generators.points()
        assert points.shape == (2, matching.dimension)
        images = matching.images(points)
        assert images.shape == (2, batch, channels, side, side)
        assert 0 < float(images.detach().min()) < float(images.detach().max()) < 1


def test_total_variation_is_that_of_the_public_code():
    images = torch.rand(2, 3, 8, 8, generator=seeded())
    vertical = images.diff(dim=-2).square().sum() / (3 * 7 * 8)
    horizontal = images.diff(dim=-1).square().sum() / (3 * 8 * 7)
    expected = 1e-3 * 2 * (vertical + horizontal) / 2
    torch.testing.assert_close(1e-3 * _mean_variation(images), expected)


def test_the_company_does_not_change_a_result(observe_plain):
    observations = [observe_plain(first=i)[0] for i in range(2)]
    together = QUICK.reconstruct_many(observations, generators=[seeded(0), seeded(1)])
    shared = QUICK.reconstruct_many(observations, generators=[seeded(0), seeded(1)], workers=2)
    for i, observation in enumerate(observations):
        alone = QUICK.reconstruct(observation, generator=seeded(i))
        for other in (together[i], shared[i]):
            torch.testing.assert_close(other.images, alone.images, atol=2e-2, rtol=0)


def test_the_best_restart_is_chosen_by_the_attackers_own_loss(observe_plain):
    observation, _, _ = observe_plain()
    several = GRNN(iterations=1, restarts=3).reconstruct(observation, generator=seeded())
    stream = seeded()
    single = [GRNN(iterations=1).reconstruct(observation, generator=stream).loss for _ in range(3)]
    assert several.loss == pytest.approx(min(single), rel=1e-2)
    assert several.start == single.index(min(single))


def test_randomness_comes_from_the_generator_only(observe_plain):
    observation, _, _ = observe_plain()
    first = QUICK.reconstruct(observation, generator=seeded(3))
    torch.manual_seed(99)
    assert torch.equal(first.images, QUICK.reconstruct(observation, generator=seeded(3)).images)
    assert not torch.equal(first.images, QUICK.reconstruct(observation, generator=seeded(4)).images)


def test_a_norm_leaves_the_scale_to_the_rule(observe_plain):
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    for net, expected in ((model, "clip"), (lock(model).bake(), "prior")):
        observation, _, _ = observe_plain(model=net)
        assert GRNN(iterations=1).reconstruct(observation, generator=seeded()).scaling == expected


def test_what_is_free_is_found_along(observe_plain):
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    observation, _, _ = observe_plain(model=model)
    known = {name: g for name, g in observation.gradient.items() if name != "conv1.bias"}
    free, _, _ = observe_plain(model=model, gradient=known, free=("conv1.bias",))
    matching, generators = stack([free])
    guess = matching.starts([seeded()])[:, -12:]
    torch.testing.assert_close(generators.points()[:, -12:], guess)
    generators.points().sum().backward()
    assert any(tensor.shape == (1, 12) and bool(tensor.grad.all()) for tensor in generators.parameters)


def test_a_loss_that_is_never_finite_is_a_failure(observe_plain):
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    healthy, _, _ = observe_plain(model=model)
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = torch.nan
    broken, _, _ = observe_plain(model=model, gradient=healthy.gradient)
    other, _, _ = observe_plain(first=1)
    first, second = QUICK.reconstruct_many([broken, other], generators=[seeded(0), seeded(1)])
    assert first.images.isnan().all()
    assert first.loss == float("inf")
    assert second.images.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 32, 28), (3, 36, 36), (3, 4, 4), (1, 27, 27)])
def test_image_sizes_that_no_generator_reaches_are_refused(observe_plain, shape):
    observation, _, _ = observe_plain(image_shape=shape)
    with pytest.raises(AttackError, match=f"GRNN: expected square images .* got {shape[1]}×{shape[2]}"):
        GRNN().reconstruct(observation, generator=seeded())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations ≥ 1, got 0"),
        ({"restarts": 0}, "restarts ≥ 1, got 0"),
        ({"latent": 0}, "latent ≥ 1, got 0"),
        ({"lr": float("inf")}, "finite lr > 0"),
        ({"momentum": 1.0}, r"momentum in \[0, 1\)"),
        ({"tv": -1.0}, "finite tv ≥ 0"),
    ],
)
def test_unusable_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        GRNN(**changes)
