"""The mean over a cohort that keeps nothing back is the gradient of all its images, and read as that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl import data, models
from fedkl.attacking import attack_arms
from fedkl.attacking.observing import observe, trials_of
from fedkl.attacks import DLG, InvertingGradients, LinearRows
from fedkl.defenses import KeyLock, NoDefense, own_arms
from fedkl.defenses.clipping import Clipping
from fedkl.defenses.private_layers import PrivateLayers
from fedkl.norms import mixes_images
from fedkl.protocol import Procedure

ONE_STEP = Procedure(algorithm="fedavg", steps=1, lr=0.1, momentum=0.9, weight_decay=1e-3)


@pytest.fixture(scope="module")
def dataset():
    return data.load("mnist-sample")


def build(seed, **changes):
    return models.build_model("lenet", channels=3, classes=10, seed=seed, initialization="uniform", **changes)


def seen(dataset, *, defense=None, arm="no-norm", cohort=2, local=None, model=None, train_mode=True):
    model, defense = model or build(0), defense or NoDefense()
    first, *others = [defense.prepare(model) for _ in range(cohort)]
    (trial,) = trials_of(dataset, trials=1, batch_size=4)
    arm = own_arms(defense)[arm]
    about = {"arm": arm, "model": model, "trial": trial, "classes": 10, "local": local}
    return observe(first, others=others, train_mode=train_mode, **about)


@pytest.mark.parametrize("local", [Procedure(), ONE_STEP], ids=["gradient", "weights"])
def test_it_is_the_gradient_of_one_client_with_all_images(dataset, local):
    one = seen(dataset, cohort=1)
    found = seen(dataset, local=local).as_one_client()
    assert (found.cohort, found.batch_size, found.local.is_gradient) == (1, 4, True)
    for name, expected in one.gradient.items():
        torch.testing.assert_close(found.gradient[name], expected, rtol=1e-3, atol=2e-6)


def with_norm():
    return nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 28 * 28, 10))


@pytest.mark.parametrize(
    "changes",
    [
        {"defense": PrivateLayers(), "arm": "private-head"},
        {"defense": KeyLock(), "arm": "lock"},
        {"defense": Clipping(max_norm=0.1), "arm": "clipping"},
        {"local": replace(ONE_STEP, steps=2)},
        {"model": with_norm()},
    ],
    ids=["private classifier", "lock", "each clipped by itself", "two steps", "batch norm"],
)
def test_nothing_else_is_one(dataset, changes):
    found = seen(dataset, **changes)
    assert found.as_one_client() is found
    refused = DLG(evaluations=2).refusal(found)
    assert refused is not None
    assert "the update of one client, got the mean over 2" in refused.reason


def test_norms_that_use_running_statistics_mix_nothing(dataset):
    model = with_norm().train()
    found = seen(dataset, model=model, train_mode=False)
    assert found.as_one_client().cohort == 1
    assert mixes_images(model[1])
    assert not mixes_images(model[1], train_mode=False)


def test_attackers_of_pictures_read_such_a_sum_as_well_as_a_batch(dataset):
    """Before, all but learned inversion refused: the sum of three looked safe from them."""
    found = {}
    for cohort in (1, 4):
        results = []
        attack_arms(
            (own_arms(NoDefense())["no-norm"],),
            attack=InvertingGradients(iterations=25),
            build=build,
            dataset=dataset,
            trials=trials_of(dataset, trials=2, batch_size=4),
            seed=0,
            cohort=cohort,
            on_result=results.append,
        )
        found[cohort] = [each.reconstruction.loss for each in results]
    assert found[4] == pytest.approx(found[1], rel=0.05)
    assert max(found[4]) < 0.9


def test_rows_of_a_sum_are_read(dataset):
    """One image each, all of them rebuilt."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
    torch.manual_seed(0)
    for layer in (network[1], network[3]):
        layer.reset_parameters()
    one, several = (seen(dataset, model=network, cohort=cohort) for cohort in (1, 4))
    attack = LinearRows()
    batch, summed = (attack.reconstruct(each, generator=torch.Generator()) for each in (one, several))
    count = batch.images.isfinite().flatten(1).all(1).sum()
    assert count > 0
    assert summed.images.isfinite().flatten(1).all(1).sum() == count
