"""Noise on what is sent: the plainest defense, and one that people believe in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedkl.defenses.base import register_defense
from fedkl.defenses.changing import Draws, UpdateDefense
from fedkl.errors import ConfigError
from fedkl.protocol import Sending
from fedkl.types import NamedTensors


@register_defense
@dataclass(frozen=True, kw_only=True)
class GaussianNoise(UpdateDefense):
    """Every client adds independent Gaussian noise to all that it sends.

    There is no clipping and no accountant: this is no differential privacy, and no (ε, δ) is claimed.

    Attributes:
        deviation: Standard deviation of the noise, in the units of the update: of a gradient's entries, or of
            the weights.

    Source:
        Zhu et al. 2019 (DLG), section 5.1, adds it to gradients. The noise here comes from the operating
        system, as a client's secrets do.
    """

    type: Literal["gaussian-noise"] = "gaussian-noise"
    deviation: float = 1e-3

    @property
    def noise_deviation(self) -> float:
        """As given."""
        return self.deviation

    def __post_init__(self) -> None:
        if not 0 <= self.deviation < math.inf:
            raise ConfigError(f"GaussianNoise: expected a finite deviation ≥ 0, got {self.deviation}.")

    def changed(self, change: NamedTensors, *, draws: Draws, client: Sending) -> NamedTensors:
        """Adds noise to every tensor."""
        return {name: tensor + self.deviation * draws.normal(tensor) for name, tensor in change.items()}

    def describe(self) -> str:
        """How much."""
        return f"{self.type} (deviation {self.deviation:g})"


@register_defense
@dataclass(frozen=True, kw_only=True)
class LaplaceNoise(UpdateDefense):
    """Every client adds independent Laplace noise to all that it sends.

    There is no clipping and no accountant: this is no differential privacy, and no ε is claimed. A server
    that knows it compares updates as they are, as the noise has mean 0, and plays clients that add noise too.

    Attributes:
        scale: Of the noise, in the units of the update; its standard deviation is √2 times that.

    Source:
        Zhu et al. 2019 (DLG), section 5.1, which adds it to gradients and gives the variance. The noise here
        comes from the operating system, as a client's secrets do.
    """

    type: Literal["laplace-noise"] = "laplace-noise"
    scale: float = 1e-3

    @property
    def noise_deviation(self) -> float:
        """√2 times the scale."""
        return math.sqrt(2) * self.scale

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ConfigError(f"LaplaceNoise: expected a finite scale ≥ 0, got {self.scale}.")

    def changed(self, change: NamedTensors, *, draws: Draws, client: Sending) -> NamedTensors:
        """Adds noise to every tensor."""
        return {name: tensor + self.scale * draws.laplace(tensor) for name, tensor in change.items()}

    def describe(self) -> str:
        """How much."""
        return f"{self.type} (scale {self.scale:g})"
