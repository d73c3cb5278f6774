"""Sent running statistics: what they say of the batch, and what the closed form makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl.attacking import observe, sent_statistics, trials_of
from fedkl.attacks import ClosedForm, Procedure
from fedkl.attacks.algebraic.chain import read_chain
from fedkl.defenses import Arm, KeyLock, NoDefense, own_arms
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.soteria import Soteria
from fedkl.errors import AttackError
from fedkl.metrics import psnr

SIGMOID = KeyLock(layers="all", key_distribution="uniform", activation="sigmoid", initialization="published")
SHARED = replace(SIGMOID, share_statistics=True)
WEIGHTS = Procedure(algorithm="fedavg", steps=1, lr=1.0)


def true_statistics(victim, images):
    baked, seen = victim.bake().train(), {}
    for name, norm in baked.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda _, a, name=name: seen.update({name: a[0].detach()}))
    baked(images)
    return {name: (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) for name, x in seen.items()}


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_the_batchs_statistics_follow_from_the_running_ones(observed, small, momentum):
    model = small(between=lambda: nn.BatchNorm2d(8, momentum=momentum))
    seen, victim, trial = observed(NoDefense(), model=model, batch_size=2, local=WEIGHTS)
    true = true_statistics(victim, trial.images)
    assert seen.statistics.keys() == true.keys()
    assert len(true) == 1
    for name, (mean, variance) in true.items():
        assert torch.allclose(seen.statistics[name][0], mean, atol=1e-5)
        assert torch.allclose(seen.statistics[name][1], variance, atol=1e-5)


def test_statistics_that_never_change_give_nothing_away(observed, small):
    seen, victim, trial = observed(NoDefense(), model=small(between=lambda: nn.BatchNorm2d(8, momentum=0.0)))
    assert not seen.statistics.keys()
    assert not sent_statistics(victim, trial.images).keys()


def test_earlier_statistics_do_not_matter(observed):
    seen, victim, trial = observed(SHARED)
    with torch.no_grad():
        victim.model(torch.rand(4, *trial.images.shape[1:]))
    again = sent_statistics(victim, trial.images)
    for name, (mean, variance) in seen.statistics.items():
        assert torch.allclose(again[name][0], mean, atol=1e-5)
        assert torch.allclose(again[name][1], variance, atol=1e-5)


def test_the_victims_own_statistics_are_not_changed(observed):
    _, victim, trial = observed(SHARED)
    before = victim.public_state()
    sent_statistics(victim, trial.images)
    after = victim.public_state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_there_are_none_where_they_are_private_do_not_change_or_mix(observed):
    private, _, _ = observed(SIGMOID)
    assert private.statistics == {}
    seen, victim, trial = observed(SHARED)
    arm = Arm(name="seen", description="", defense=SHARED)
    given = {"arm": arm, "model": seen.model, "trial": trial, "classes": 10}
    assert observe(victim, **given).statistics
    assert observe(victim, **given, train_mode=False).statistics == {}
    assert observe(victim, **given, local=Procedure(steps=2)).statistics == {}
    assert seen.kind != replace(seen, statistics={}).kind


def test_a_plain_networks_statistics_are_public(observed, small):
    seen, _, _ = observed(NoDefense(), model=small(between=lambda: nn.BatchNorm2d(8)), local=WEIGHTS)
    assert list(seen.statistics) == ["3"]


def test_a_gradient_has_no_statistics_beside_it_unless_a_lock_shares_them(observed, small):
    """A server of gradients would otherwise be given what no client sends."""
    model = small(between=lambda: nn.BatchNorm2d(8))
    assert not observed(NoDefense(), model=model)[0].statistics.keys()
    assert observed(SHARED)[0].statistics.keys()


def test_statistics_of_no_norm_are_refused(observed):
    seen, _, _ = observed(SHARED)
    with pytest.raises(AttackError, match="'elsewhere' has statistics"):
        replace(seen, statistics={"elsewhere": (torch.zeros(1), torch.ones(1))})


def test_the_closed_form_passes_all_locks_with_the_images_scale(observed):
    seen, _, trial = observed(SHARED, index=1)
    found = ClosedForm().reconstruct(seen, generator=torch.Generator())
    assert found.scaling == "clip"
    assert float(psnr(found.images, trial.images)) > 40


def test_wrong_statistics_mislead_it(observed):
    seen, _, trial = observed(SHARED, index=1)
    wrong = {name: (mean + 0.3, variance) for name, (mean, variance) in seen.statistics.items()}
    found = ClosedForm().reconstruct(replace(seen, statistics=wrong), generator=torch.Generator())
    assert not float(psnr(found.images, trial.images)) > 40


@pytest.mark.parametrize(
    ("statistics", "said"),
    [
        ({"6": (torch.zeros(10), torch.ones(10))}, "'6' has statistics, but is no batch or instance norm"),
        (
            {"0.norm": (torch.zeros(2), torch.ones(2))},
            r"at '0\.norm' have shapes \(2,\) and \(2,\), expected",
        ),
        (
            {"0.norm": (torch.zeros(8), -torch.ones(8))},
            r"at '0\.norm' are not finite, or a variance is below 0",
        ),
    ],
)
def test_impossible_statistics_are_refused(observed, statistics, said):
    seen, _, _ = observed(SHARED)
    with pytest.raises(AttackError, match=said):
        replace(seen, statistics=statistics)


def test_statistics_of_a_norm_without_scale_and_shift_are_used(observed, small):
    seen, _, _ = observed(model=small(between=lambda: nn.BatchNorm2d(8, affine=False)), local=WEIGHTS)
    chain = read_chain(seen.model, image_shape=seen.image_shape, train_mode=True)
    assert seen.statistics.keys() == {"3"}
    assert [block.norm.name for block in chain.blocks if block.norm] == ["3"]


@pytest.mark.parametrize(
    ("defense", "told"), [(Soteria(), True), (GaussianNoise(deviation=1e-2), False)], ids=lambda v: str(v)[:7]
)
def test_statistics_that_a_defense_leaves_are_seen(images, defense, told):
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*body, nn.LazyLinear(10))
    (trial,) = trials_of(images, trials=1, batch_size=2)
    model.eval()(trial.images)
    arm, local = own_arms(defense)[defense.type], Procedure(algorithm="fedavg", steps=1, lr=0.1)
    seen = observe(defense.prepare(model), arm=arm, model=model, trial=trial, classes=10, local=local)
    assert set(seen.statistics) == ({"1"} if told else set())
    features = model[0](trial.images).detach()
    for mean, variance in seen.statistics.values():
        torch.testing.assert_close(mean, features.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(variance, features.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-5)
