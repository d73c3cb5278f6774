"""What every attack must do: one row each. More than a guess on real images, refusals in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fedkl import data
from fedkl.attacking.floor import floor
from fedkl.attacking.grid import attack_arms
from fedkl.attacking.observing import trials_of
from fedkl.attacks import Attack, ClosedForm, Disaggregation, LinearRows, Positions
from fedkl.defenses import plain_arm
from fedkl.models.vit import ViT


@dataclass(frozen=True)
class Row:
    """An attack, and a network on which it finds what it looks for."""

    attack: Attack
    build: Callable[[], nn.Module]


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2), nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 10))


def transformer():
    return ViT(channels=3, classes=10, image_size=16, patch=4, features=32, depth=2, heads=2)


ROWS = [
    Row(ClosedForm(), chain),
    Row(LinearRows(), perceptron),
    Row(Disaggregation(draws=5000), perceptron),
    Row(Positions(), transformer),
]


@pytest.fixture(scope="module")
def images():
    return data.load("mnist-sample", size=16)


def named(row):
    return row.attack.type


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_it_finds_more_than_the_labels_give_away(images, row):
    trials = trials_of(images, trials=3)
    torch.manual_seed(0)
    model, found = row.build(), []
    attack_arms(
        [plain_arm()], attack=row.attack, build=lambda trial: model, dataset=images, trials=trials, seed=0,
        on_result=found.append,
    )  # fmt: skip
    guessed = [score for _, scores in floor(images, trials, seed=0) for score in scores]
    for result, guess in zip(found, guessed, strict=True):
        (score,) = result.scores
        assert score.identified
        assert score.correlation > max(0.9, guess.correlation)


@pytest.mark.parametrize("row", [row for row in ROWS if row.attack.needs.batch == 1], ids=named)
def test_it_refuses_what_it_is_not_made_for(images, row):
    model, told = row.build(), []
    attack_arms(
        [plain_arm()], attack=row.attack, build=lambda trial: model, dataset=images, seed=0,
        trials=trials_of(images, trials=1, batch_size=2), on_result=told.append, on_refusal=told.append,
    )  # fmt: skip
    (refused,) = told
    assert (refused.kind, refused.trial) == ("does not apply", 0)
    assert "at most 1 images behind an update, got 2" in refused.reason
