"""Every option that cannot be used is refused with its name, what was expected and what came."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from fedkl.data import AUGMENTATIONS
from fedkl.errors import ConfigError
from fedkl.federated import Execution, FederatedTraining, LocalTraining

NAN, INF = math.nan, math.inf
LOCAL = [
    ({"epochs": 0}, "epochs: expected at least 1, got 0"),
    ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ({"lr": 0.0}, "lr: expected a finite value > 0, got 0.0"),
    ({"lr": -1.0}, "lr: expected a finite value > 0, got -1.0"),
    ({"lr": INF}, "lr: expected a finite value > 0, got inf"),
    ({"lr": NAN}, "lr: expected a finite value > 0, got nan"),
    ({"momentum": 1.0}, "momentum: expected a value in [0, 1), got 1.0"),
    ({"momentum": -0.1}, "momentum: expected a value in [0, 1), got -0.1"),
    ({"momentum": NAN}, "momentum: expected a value in [0, 1), got nan"),
    ({"weight_decay": -1.0}, "proximal: expected finite values ≥ 0, got -1.0, None, 0.0"),
    ({"weight_decay": NAN}, "got nan, None, 0.0"),
    ({"lock_weight_decay": -1.0}, "got 0.0005, -1.0, 0.0"),
    ({"lock_weight_decay": INF}, "got 0.0005, inf, 0.0"),
    ({"lock_weight_decay": NAN}, "got 0.0005, nan, 0.0"),
    ({"proximal": -0.1}, "got 0.0005, None, -0.1"),
    ({"proximal": INF}, "got 0.0005, None, inf"),
    ({"augmentation": "rotate"}, "augmentation: expected one of none, flip, "),
    ({"algorithm": "fedsgd", "proximal": 0.1}, "no effect with algorithm='fedsgd', got 0.1"),
]
TRAINING = [
    ({"clients": 0}, "clients: expected at least 1, got 0"),
    ({"rounds": 0}, "rounds: expected at least 1, got 0"),
    ({"eval_every": 0}, "eval_every: expected at least 1, got 0"),
    ({"eval_clients": 0}, "eval_clients: expected at least 1, got 0"),
    ({"cohort": 0}, "cohort: expected 1 to 3 (clients), got 0"),
    ({"cohort": 4}, "cohort: expected 1 to 3 (clients), got 4"),
    ({"min_cohort": 0}, "min_cohort: expected 1 to 3 (cohort), got 0"),
    ({"min_cohort": 4}, "min_cohort: expected 1 to 3 (cohort), got 4"),
    ({"cohort": 2, "min_cohort": 3}, "min_cohort: expected 1 to 2 (cohort), got 3"),
    ({"dropout": 1.0}, "dropout: expected a probability in [0, 1), got 1.0"),
    ({"dropout": -0.5}, "dropout: expected a probability in [0, 1), got -0.5"),
    ({"dropout": NAN}, "dropout: expected a probability in [0, 1), got nan"),
]
CASES = [
    *((LocalTraining, *case) for case in LOCAL),
    *((FederatedTraining, *case) for case in TRAINING),
    (Execution, {"workers": -1}, "workers: expected 0 (automatic) or more, got -1"),
]


@pytest.mark.parametrize(("kind", "bad", "message"), CASES)
def test_unusable_options(kind, bad, message):
    with pytest.raises(ConfigError, match=rf"{kind.__name__} is not usable\.[\s\S]*{re.escape(message)}"):
        kind(**bad)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        FederatedTraining(clients=0, rounds=0, dropout=2.0)
    text = str(caught.value)
    assert all(name in text for name in ("  - clients:", "  - rounds:", "  - dropout:"))
    assert text.endswith("Correct these fields.")


@pytest.mark.parametrize(
    "good",
    [
        {"momentum": 0.0},
        {"weight_decay": 0.0, "lock_weight_decay": 0.0},
        {"lock_weight_decay": 1.0},
        {"algorithm": "fedsgd"},
        {"proximal": 0.1, "optimizer": "adam"},
        *({"augmentation": name} for name in AUGMENTATIONS),
    ],
)
def test_usable_options(good):
    training = LocalTraining(**good)
    assert {name: getattr(training, name) for name in good} == good


def test_the_cohort_is_everyone_unless_it_is_given():
    assert FederatedTraining(clients=7).cohort_size == 7
    assert FederatedTraining(clients=7, cohort=2, min_cohort=2).cohort_size == 2


@pytest.mark.parametrize("options", [LocalTraining(), FederatedTraining(), Execution()])
def test_options_are_frozen(options):
    field = dataclasses.fields(options)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, field, getattr(options, field))
