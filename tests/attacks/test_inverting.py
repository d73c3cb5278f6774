"""Inverting Gradients on real images: it beats its random start, and its parts do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedkl import lock, models
from fedkl.attacking import local_update
from fedkl.attacks import DLG, GRNN, IDLG, AdaptiveMatching, InvertingGradients, infer_labels
from fedkl.attacks.labels import order_matters
from fedkl.attacks.matching.inverting import median_filtered
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import psnr, score
from fedkl.protocol import Procedure

QUICK = InvertingGradients(iterations=20, weighting="sqrt")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_recovers_an_undefended_image(observe_plain, dataset):
    observation, images, labels = observe_plain(labels=False)
    attack = InvertingGradients(iterations=300, weighting="sqrt")
    start = InvertingGradients(iterations=1).reconstruct(observation, generator=seeded())
    found = attack.reconstruct(observation, generator=seeded())
    assert float(psnr(start.images, images)) < 10
    (after,) = score(
        found.images, images, candidates=dataset.test_images[:100], candidate_index=[0], scaling="clip"
    )
    assert after.psnr > 25
    assert after.identified
    assert torch.equal(found.labels, labels)
    assert found.loss < 1e-3
    assert found.evaluations == 300


@pytest.mark.parametrize("kind", [InvertingGradients, AdaptiveMatching])
def test_labels_are_optimized_along_where_their_order_matters(kind, observe_plain, small, images):
    """Steps of one image each, of labels that descend: in ascending order they explain nothing."""
    places = images.test_labels[:40].argsort(descending=True)[[0, -1]]
    x, y = images.test_images[places], images.test_labels[places]
    torch.manual_seed(0)
    model, local = small(), Procedure(algorithm="fedavg", batch_size=1, lr=0.5)
    gradient = local_update(model, x, y, train_mode=True, local=local)
    about = {"model": model, "gradient": gradient, "image_shape": (3, 16, 16), "batch_size": 2}
    seen, _, _ = observe_plain(of=images, **{**about, "labels": False, "local": local})
    attack = kind(iterations=60, weighting="sqrt", lr_free=0.1)
    found = attack.reconstruct(seen, generator=seeded())
    wrong = attack.reconstruct(replace(seen, labels=infer_labels(seen)), generator=seeded())
    assert found.loss < 0.5 * wrong.loss
    whole = replace(local, batch_size=None)
    assert not order_matters(replace(seen, local=whole))
    assert not order_matters(replace(seen, labels=y))


def test_recovers_a_batch_of_two(observe_plain, dataset):
    observation, images, _ = observe_plain(batch_size=2)
    attack = InvertingGradients(iterations=250, weighting="sqrt")
    found = attack.reconstruct(observation, generator=seeded())
    scores = score(
        found.images, images, candidates=dataset.test_images[:100], candidate_index=[0, 1], scaling="clip"
    )
    assert all(each.psnr > 15 and each.identified for each in scores)


def test_pixels_stay_in_the_box(observe_plain):
    observation, _, _ = observe_plain()
    images = QUICK.reconstruct(observation, generator=seeded()).images
    assert 0 <= float(images.min()) <= float(images.max()) <= 1


def test_the_company_does_not_change_a_result(observe_plain):
    observations = [observe_plain(first=i)[0] for i in range(2)]
    together = QUICK.reconstruct_many(observations, generators=[seeded(0), seeded(1)])
    shared = QUICK.reconstruct_many(observations, generators=[seeded(0), seeded(1)], workers=2)
    for i, observation in enumerate(observations):
        alone = QUICK.reconstruct(observation, generator=seeded(i))
        # The sign of a gradient that is zero but for rounding may differ: few pixels, by a step or two.
        for other in (together[i], shared[i]):
            assert float((other.images - alone.images).abs().mean()) < 1e-3


def test_the_best_restart_is_chosen_by_the_attackers_own_loss(observe_plain):
    observation, _, _ = observe_plain()
    attack = InvertingGradients(iterations=10, restarts=3, weighting="sqrt")
    several = attack.reconstruct(observation, generator=seeded())
    stream = seeded()
    one = InvertingGradients(iterations=10, weighting="sqrt")
    losses = [one.reconstruct(observation, generator=stream).loss for _ in range(3)]
    assert several.loss == pytest.approx(min(losses), rel=1e-3)
    assert several.start == losses.index(min(losses))


def test_randomness_comes_from_the_generator_only(observe_plain):
    observation, _, _ = observe_plain()
    first = QUICK.reconstruct(observation, generator=seeded(3))
    torch.manual_seed(99)
    assert torch.equal(first.images, QUICK.reconstruct(observation, generator=seeded(3)).images)
    assert not torch.equal(first.images, QUICK.reconstruct(observation, generator=seeded(4)).images)


def test_total_variation_smooths(observe_plain):
    observation, _, _ = observe_plain()
    rough, smooth = (
        InvertingGradients(iterations=40, tv=tv).reconstruct(observation, generator=seeded()).images
        for tv in (0.0, 1.0)
    )
    assert float(smooth.diff(dim=-1).abs().mean()) < 0.5 * float(rough.diff(dim=-1).abs().mean())


def test_the_median_filter_against_sorting():
    images = torch.rand(2, 3, 5, 6, generator=seeded())
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    for row, column in ((0, 0), (2, 3), (4, 5)):
        window = padded[..., row : row + 3, column : column + 3].flatten(-2).sort(-1).values
        assert torch.equal(median_filtered(images)[..., row, column], window[..., 4])


def test_the_median_filter_is_applied_as_often_as_asked(observe_plain, monkeypatch):
    calls = []

    def counted(images):
        calls.append(images.shape)
        return images

    monkeypatch.setattr("fedkl.attacks.matching.inverting.median_filtered", counted)
    observation, _, _ = observe_plain()
    InvertingGradients(iterations=7, median_every=3).reconstruct(observation, generator=seeded())
    assert calls == [(1, 3, 32, 32)] * 2


def test_progress_is_reported_every_step(observe_plain):
    observation, _, _ = observe_plain()
    seen = []
    InvertingGradients(iterations=3, restarts=2).reconstruct_many(
        [observation], generators=[seeded()], on_evaluation=lambda *progress: seen.append(progress)
    )
    assert seen == [(1, 2), (2, 2), (3, 2)]


def test_a_norm_leaves_the_scale_to_the_rule(observe_plain):
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    for net, expected in ((model, "clip"), (lock(model).bake(), "prior")):
        observation, _, _ = observe_plain(model=net)
        once = InvertingGradients(iterations=1)
        assert once.reconstruct(observation, generator=seeded()).scaling == expected


def test_what_is_free_is_found_along(observe_plain):
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    observation, _, _ = observe_plain(model=model)
    known = {name: g for name, g in observation.gradient.items() if name != "conv1.bias"}
    free, _, _ = observe_plain(model=model, gradient=known, free=("conv1.bias",))
    losses = [
        InvertingGradients(iterations=n, weighting="sqrt").reconstruct(free, generator=seeded()).loss
        for n in (1, 60)
    ]
    assert losses[1] < 0.5 * losses[0]


def test_a_loss_that_is_never_finite_is_a_failure(observe_plain):
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    healthy, _, _ = observe_plain(model=model)
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = torch.nan
    broken, _, _ = observe_plain(model=model, gradient=healthy.gradient)
    (first, second) = QUICK.reconstruct_many(
        [broken, healthy_copy(healthy, observe_plain)], generators=[seeded()] * 2
    )
    assert first.images.isnan().all()
    assert first.loss == float("inf")
    assert second.images.isfinite().all()


def healthy_copy(observation, observe_plain):
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    return observe_plain(model=model, gradient=observation.gradient)[0]


def test_labels_must_come_from_somewhere(observe_plain):
    observation, _, _ = observe_plain()
    without = {name: g for name, g in observation.gradient.items() if not name.startswith("fc")}
    observation, _, _ = observe_plain(labels=False, gradient=without)
    with pytest.raises(AttackError, match="last linear layer"):
        QUICK.reconstruct(observation, generator=seeded())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations ≥ 1, got 0"),
        ({"restarts": 0}, "restarts ≥ 1, got 0"),
        ({"median_every": -1}, "median_every ≥ 0, got -1"),
        ({"largest": 0}, "largest ≥ 1, got 0"),
        ({"lr": float("nan")}, "finite lr > 0"),
        ({"lr_free": 0.0}, "finite lr_free > 0"),
        ({"tv": -1.0}, "finite tv ≥ 0"),
    ],
)
def test_unusable_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        InvertingGradients(**changes)


@pytest.mark.parametrize("attack", [QUICK, DLG(), IDLG(), GRNN(), AdaptiveMatching()], ids=lambda a: a.type)
def test_what_cannot_be_matched_is_refused_before_the_work(observe_plain, attack):
    """An audit plans no minutes for it, and a table has a reason in place of a failure."""
    observation, _, _ = observe_plain()
    assert attack.refusal(observation) is None
    theirs = replace(observation, local=Procedure(algorithm="fedavg", optimizer="adam", steps=2))
    refused = attack.refusal(theirs)
    assert refused is not None
    assert (refused.kind, "whose update can be differentiated" in refused.reason) == ("does not apply", True)
