"""Learning rates over the rounds."""

from __future__ import annotations

import math

import pytest
import torch

from fedkl.errors import ConfigError
from fedkl.federated import (
    ConstantSchedule,
    CosineSchedule,
    FederatedTraining,
    LocalTraining,
    StepSchedule,
)


def factors(schedule, rounds):
    return [schedule.factor(round, rounds=rounds) for round in range(rounds)]


def test_a_constant_stays():
    assert factors(ConstantSchedule(), 5) == [1.0] * 5


def test_the_default_is_the_papers():
    """Rounds 60, 120 and 160 of 200, × 0.2 (arXiv 2305.04095, section 5); PyTorch's own as the oracle."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[60, 120, 160], gamma=0.2)
    for factor in factors(StepSchedule(), 200):
        assert factor == pytest.approx(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 10, 50, 60, 100, 110, 200, 1000, 12345])
@pytest.mark.parametrize("percent", [0, 7, 10, 29, 30, 33, 57, 60, 80, 99, 100])
def test_a_milestone_is_the_first_round_at_or_after_its_share(rounds, percent):
    """Oracle in integers: 0.3 · 110 must be 33, whatever its float says."""
    schedule, first = StepSchedule(milestones=(percent / 100,), decay=0.5), -(-percent * rounds // 100)
    for round in {0, first - 1, first, first + 1, rounds - 1} & set(range(rounds)):
        assert schedule.factor(round, rounds=rounds) == (0.5 if round >= first else 1.0)


def test_milestones_can_come_together_or_not_at_all():
    assert factors(StepSchedule(milestones=(0.5, 0.5), decay=0.1), 2) == [1.0, pytest.approx(0.01)]
    assert factors(StepSchedule(milestones=()), 3) == [1.0] * 3


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_a_cosine_is_pytorchs(floor):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=floor)
    for factor in factors(CosineSchedule(floor=floor), 20):
        assert factor == pytest.approx(oracle.get_last_lr()[0])
        assert factor > 0
        optimizer.step()
        oracle.step()


def test_a_training_multiplies_its_rate():
    training = FederatedTraining(
        rounds=10, local=LocalTraining(lr=0.5), schedule=StepSchedule(milestones=(0.5,), decay=0.1)
    )
    assert [training.lr_at(round) for round in (0, 4, 5, 9)] == pytest.approx([0.5, 0.5, 0.05, 0.05])


@pytest.mark.parametrize("milestone", [-0.1, 1.1, 60.0, math.nan])
def test_milestones_are_shares(milestone):
    with pytest.raises(ConfigError, match=r"StepSchedule\.milestones: expected shares .* in \[0, 1\], got"):
        StepSchedule(milestones=(0.3, milestone))


@pytest.mark.parametrize("decay", [0.0, -1.0, math.inf, math.nan])
def test_unusable_decays(decay):
    with pytest.raises(ConfigError, match=rf"StepSchedule\.decay: expected a finite value > 0, got {decay}"):
        StepSchedule(decay=decay)


@pytest.mark.parametrize("floor", [-0.1, 1.5, math.nan])
def test_unusable_floors(floor):
    with pytest.raises(ConfigError, match=rf"CosineSchedule\.floor: .* got {floor}"):
        CosineSchedule(floor=floor)
