"""Gaussian noise on what is sent: the plainest defense, and one that people believe in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedkl.defenses.base import Defense, register_defense
from fedkl.errors import ConfigError
from fedkl.keys import secure_normal
from fedkl.update import PublicUpdate


@register_defense
@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Defense):
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

    def __post_init__(self) -> None:
        if not 0 <= self.deviation < math.inf:
            raise ConfigError(f"GaussianNoise: expected a finite deviation ≥ 0, got {self.deviation}.")

    def transform(self, update: PublicUpdate) -> PublicUpdate:
        """Adds noise to every tensor of floating-point numbers; counts of batches stay."""
        noisy = {
            name: tensor + self.deviation * secure_normal(*tensor.shape).to(tensor)
            for name, tensor in update.tensors.items()
            if tensor.is_floating_point()
        }
        return replace(update, tensors={**update.tensors, **noisy})

    def imitate_transform(
        self, updates: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """The informed attacker adds noise of the same size to the clients that it plays itself."""
        return {
            name: tensor + self.deviation * torch.randn(tensor.shape, generator=generator).to(tensor)
            for name, tensor in updates.items()
        }

    def describe(self) -> str:
        """How much."""
        return f"{self.type} (deviation {self.deviation:g})"
