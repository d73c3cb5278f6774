"""FedKL: a private key generates the scale γ and shift β of norm layers (arXiv 2305.04095)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedkl.defenses.base import Defense
from fedkl.keys import Key, KeyDistribution
from fedkl.locking import Activation, Initialization, Lock, lock


@dataclass(frozen=True, kw_only=True)
class KeyLock(Defense):
    """Options of `fedkl.lock`, plus how new keys are drawn.

    The published setting is ``key_distribution="uniform", activation="relu", initialization="published"``.
    """

    type: Literal["keylock"] = "keylock"
    layers: Literal["first", "all"] | tuple[str, ...] = "first"
    activation: Activation = "softplus"
    initialization: Initialization = "unit"
    chained: bool = True
    share_statistics: bool = False
    key_length: int = 1024
    key_distribution: KeyDistribution = "normal"

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Lock:
        """Locks a copy of the model."""
        return lock(
            model,
            key=key or Key.generate(length=self.key_length, distribution=self.key_distribution),
            layers=self.layers,
            activation=self.activation,
            initialization=self.initialization,
            chained=self.chained,
            share_statistics=self.share_statistics,
        )
