"""Gradient matching with what the structure says: its parts do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl.attacking import observe
from fedkl.attacks import AdaptiveMatching, Attack, InvertingGradients
from fedkl.attacks.algebraic.structure import read_structure
from fedkl.attacks.matching.structured import _Matching
from fedkl.defenses import PUBLISHED_LOCK, KeyLock, PrivateLayers, arms_of
from fedkl.errors import ConfigError

PLAIN = {"support": False, "features": 0.0, "statistics": 0.0}
QUICK = {"iterations": 6, "weighting": "sqrt"}


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def regressed(observed):
    seen, victim, trial = observed(PUBLISHED_LOCK)
    arm = arms_of(PUBLISHED_LOCK)["lock-regressed-affine"]
    return observe(victim, arm=arm, model=seen.model, trial=trial, classes=10), victim, trial


def matching(observation, **changes):
    attack = AdaptiveMatching(**changes)
    started = attack._started(observation, read_structure(observation), neutral=True)
    labels = [observation.labels]
    return attack, _Matching([started], [read_structure(observation)], labels=labels, attack=attack)


def point(found, image):
    start = found.starts([seeded()])
    return torch.cat([image.flatten()[None], start[:, image.numel() :]], 1)


def test_without_its_parts_it_is_inverting_gradients(observed):
    seen, _, _ = observed()
    plain = InvertingGradients(**QUICK).reconstruct(seen, generator=seeded())
    same = AdaptiveMatching(**QUICK, **PLAIN).reconstruct(seen, generator=seeded())
    assert torch.allclose(plain.images, same.images, atol=1e-6)


def test_gammas_support_is_the_gradients(regressed):
    seen, victim, _ = regressed
    true = dict(victim.bake().named_parameters())["0.norm.weight"]
    attack = AdaptiveMatching()
    for neutral in (True, False):
        started = attack._started(seen, read_structure(seen), neutral=neutral)
        assert torch.equal(started.model.get_parameter("0.norm.weight") > 0, true > 0)
    assert bool((true == 0).any())
    assert torch.equal(
        attack._started(seen, read_structure(seen), neutral=True).model.get_parameter("0.norm.weight"),
        (true > 0).float(),
    )


def test_gammas_of_dead_channels_do_not_move(regressed):
    seen, victim, trial = regressed
    true = dict(victim.bake().named_parameters())["0.norm.weight"]
    _, found = matching(seen)
    _, gradient = found(point(found, trial.images + 0.1), torch.tensor([0]))
    gamma = gradient[0, trial.images.numel() :][: len(true)]
    assert bool((gamma[true == 0] == 0).all())
    assert bool((gamma[true > 0] != 0).all())


@pytest.mark.parametrize("term", ["features", "statistics"])
def test_terms_vanish_at_the_truth_only(observed, term):
    seen, victim, trial = observed(KeyLock(share_statistics=True))
    known = replace(seen, model=victim.bake(), labels=trial.labels)
    values = []
    for weight in (0.0, 1.0):
        _, found = matching(known, **PLAIN | {term: weight})
        truth, other = (point(found, x) for x in (trial.images, 0.5 * trial.images.flip(-1)))
        values.append([float(found(x, torch.tensor([0]))[0]) for x in (truth, other)])
    (at_truth, elsewhere), (with_term, with_term_elsewhere) = values
    assert with_term == pytest.approx(at_truth, abs=1e-4)
    assert with_term_elsewhere > elsewhere + 1e-3


def test_statistics_pin_the_scale(observed):
    seen, _, _ = observed(KeyLock(share_statistics=True))
    attack = AdaptiveMatching(**QUICK, statistics=0.1)
    assert attack.reconstruct(seen, generator=seeded()).scaling == "clip"
    private = replace(seen, statistics={})
    assert attack.reconstruct(private, generator=seeded()).scaling == "prior"


def test_only_layers_above_the_lock_count_first(regressed):
    seen, _, _ = regressed
    _, found = matching(seen)
    assert found.only_above(True)
    zero = {name for name, weight in found._weights.items() if not bool(weight.any())}
    assert zero == {"0.weight", "0.bias"}
    found.only_above(False)
    assert all(bool(weight.any()) for weight in found._weights.values())


def test_a_schedule_uses_no_more_evaluations(regressed):
    seen, _, _ = regressed
    steps = []
    attack: Attack = AdaptiveMatching(iterations=8, restarts=2, above_first=0.5)
    (found,) = attack.reconstruct_many(
        [seen], generators=[seeded()], on_evaluation=lambda step, _: steps.append(step)
    )
    assert steps == list(range(1, 9))
    assert found.evaluations == 8
    assert found.start in (0, 1)


def test_it_works_on_batches_and_networks_with_relu(observed, small):
    seen, _, trial = observed(PUBLISHED_LOCK, model=small(act=nn.ReLU), batch_size=2)
    seen = replace(seen, labels=trial.labels)
    found = AdaptiveMatching(**QUICK).reconstruct(seen, generator=seeded())
    assert found.images.shape == trial.images.shape
    assert bool(found.images.isfinite().all())


def test_a_head_that_gets_nothing_is_no_target(observed, small):
    model = small(act=nn.ReLU)
    with torch.no_grad():
        model[2].bias.fill_(-9.0)
    seen, _, trial = observed(model=model)
    seen = replace(seen, labels=trial.labels)
    assert not bool(read_structure(seen).head_input.any())
    found = AdaptiveMatching(**QUICK).reconstruct(seen, generator=seeded())
    assert bool(found.images.isfinite().all())


def test_what_was_granted_stays_as_it_is(observed):
    """Signed γ that the server knows: neither a start nor the support may touch them."""
    seen, victim, _ = observed(KeyLock(activation="tanh"), affine=True)
    true = victim.bake().get_parameter("0.norm.weight")
    assert bool((true < 0).any())
    started = AdaptiveMatching()._started(seen, read_structure(seen), neutral=True)
    assert torch.equal(started.model.get_parameter("0.norm.weight"), true)


def test_a_private_layer_that_is_free_starts_as_drawn(observed):
    seen, _, _ = observed(PrivateLayers(layers="stem"))
    free = replace(seen, free=("0.weight", "0.bias"))
    started = AdaptiveMatching()._started(free, read_structure(free), neutral=True)
    assert torch.equal(started.model.get_parameter("0.weight"), seen.model.get_parameter("0.weight"))


@pytest.mark.parametrize(
    "changes",
    [
        {"features": -1.0},
        {"statistics": float("inf")},
        {"above_first": 1.0},
        {"above_first": 0.5, "largest": 3},
        {"iterations": 0},
    ],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError, match="AdaptiveMatching"):
        AdaptiveMatching(**changes)
