"""What Flower's LocalDpMod does: a clipped update with Gaussian noise from an (ε, δ) that the user gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedkl.defenses.base import register_defense
from fedkl.defenses.changing import Draws, UpdateDefense
from fedkl.defenses.clipping import Clipped
from fedkl.errors import ConfigError
from fedkl.protocol import Sending, Transform
from fedkl.types import NamedTensors


@register_defense
@dataclass(frozen=True, kw_only=True)
class LocalDpMod(UpdateDefense):
    """Flower's LocalDpMod: a change is scaled down to a norm, and gets Gaussian noise.

    All tensors together are scaled by min(1, clipping_norm / norm); the noise has standard deviation
    sensitivity · √(2 ln(1.25 / δ)) / ε in every entry.

    What ε is, and what not: it is of one round; nothing adds the rounds up. It holds if `sensitivity` does,
    which is what the user says and nobody checks: two clipped updates can differ by 2 · clipping_norm, so a
    client's whole update is protected with that and not with less. And the formula is proved for ε < 1 only.

    A server that knows it clips its own images' change too. The noise has mean 0, and is alike everywhere.

    Attributes:
        clipping_norm: Largest Euclidean norm of a change.
        sensitivity: By how much what is released may differ, as the user says; 0 switches the noise off.
        epsilon: ε of one round.
        delta: δ of one round.

    Source:
        flwr/clientapp/mod/localdp_mod.py (flwr 1.41, `flwr.clientapp.mod.LocalDpMod`). The noise: Dwork and
        Roth 2014, "The algorithmic foundations of differential privacy", theorem 3.22. Different here: Flower
        has no defaults; counts of batches are sent as they are, where Flower clips them too; a tensor of
        several names is one, where Flower draws noise for each name; a change of norm 0 is no error; a
        gradient, where one is sent, is treated as a change of weights is there; and the noise comes from the
        operating system, not from NumPy's global generator.
    """

    type: Literal["local-dp-mod"] = "local-dp-mod"
    clipping_norm: float = 1.0
    sensitivity: float = 1.0
    epsilon: float = 10.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        positive = all(0 < number < math.inf for number in (self.clipping_norm, self.epsilon))
        if not (positive and 0 <= self.sensitivity < math.inf and 0 < self.delta < 1):
            raise ConfigError(
                "LocalDpMod: expected a finite clipping_norm and epsilon > 0, a finite sensitivity ≥ 0 and "
                f"delta between 0 and 1, got {self.clipping_norm}, {self.epsilon}, {self.sensitivity} and "
                f"{self.delta}."
            )

    @property
    def noise_deviation(self) -> float:
        """In every entry."""
        return self.sensitivity * math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon

    def changed(self, change: NamedTensors, *, draws: Draws, client: Sending) -> NamedTensors:
        """Clips all tensors together, and adds noise to each."""
        clipped = Clipped(self.clipping_norm)(change, change)
        return {
            name: tensor + self.noise_deviation * draws.normal(tensor) for name, tensor in clipped.items()
        }

    @property
    def public_transform(self) -> Transform:
        """Clipped."""
        return Clipped(self.clipping_norm)

    def describe(self) -> str:
        """Its numbers."""
        return (
            f"{self.type} (norm ≤ {self.clipping_norm:g}, sensitivity {self.sensitivity:g}, ε = "
            f"{self.epsilon:g} and δ = {self.delta:g} a round)"
        )
