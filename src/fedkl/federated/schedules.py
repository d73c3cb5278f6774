"""Learning-rate schedules over the communication rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedkl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule:
    """The learning rate stays."""

    type: Literal["constant"] = "constant"

    def factor(self, round: int, *, rounds: int) -> float:
        """What the learning rate is multiplied by in a round, from 0, of all `rounds`."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """The learning rate falls at given shares of the training.

    The defaults are rounds 60, 120 and 160 of 200 (arXiv 2305.04095, section 5); as shares they mean the same
    for a shorter training.

    Attributes:
        milestones: Shares of all rounds, in [0, 1], from which on the rate is multiplied by `decay` again.
        decay: See `milestones`.

    >>> [StepSchedule().factor(round, rounds=200) for round in (0, 59, 60)]
    [1.0, 1.0, 0.2]
    """

    type: Literal["step"] = "step"
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    decay: float = 0.2

    def __post_init__(self) -> None:
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise ConfigError(
                f"StepSchedule.milestones: expected shares of the rounds in [0, 1], got {self.milestones}."
            )
        if not 0 < self.decay < math.inf:
            raise ConfigError(f"StepSchedule.decay: expected a finite value > 0, got {self.decay}.")

    def factor(self, round: int, *, rounds: int) -> float:
        """What the learning rate is multiplied by in a round, from 0, of all `rounds`."""
        # 0.3 · 200 is 60 up to rounding: compare with a tolerance far below one round.
        return self.decay ** sum(round >= milestone * rounds - 1e-6 for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """The learning rate falls along half a cosine (Loshchilov and Hutter 2017), without restarts.

    Attributes:
        floor: The factor that it falls to, in [0, 1].

    >>> [round(CosineSchedule().factor(r, rounds=4), 3) for r in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """

    type: Literal["cosine"] = "cosine"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"CosineSchedule.floor: expected a value in [0, 1], got {self.floor}.")

    def factor(self, round: int, *, rounds: int) -> float:
        """What the learning rate is multiplied by in a round, from 0, of all `rounds`."""
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * round / rounds)) / 2


AnySchedule = ConstantSchedule | StepSchedule | CosineSchedule
