"""Clipping: no change that is sent is longer than a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedkl.defenses.base import register_defense
from fedkl.defenses.changing import Draws, UpdateDefense
from fedkl.errors import ConfigError
from fedkl.protocol import Rescaling, Sending, Transform
from fedkl.protocol.per_example import clip_factor
from fedkl.types import NamedTensors


@dataclass(frozen=True)
class Clipped(Rescaling):
    """Scales a change to an L2 norm of at most so much, over all of its tensors together.

    Attributes:
        max_norm: The bound, above 0.
    """

    max_norm: float

    def __call__(self, change: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The change, shorter; what was observed plays no part."""
        factor = clip_factor(change, clip=self.max_norm)
        return {name: factor * tensor for name, tensor in change.items()}


@register_defense
@dataclass(frozen=True, kw_only=True)
class Clipping(UpdateDefense):
    """Every client scales its change to an L2 norm of at most `max_norm`: one factor for all tensors.

    It bounds what one client can do to the average. It hides nothing: attacks that are exact up to a factor
    read a clipped update as a plain one, and the informed attacker clips its own.

    Attributes:
        max_norm: The bound.

    Source:
        McMahan et al. 2018, section 2 (flat clipping), there with noise on the average; see client-dp. A
        change includes norms' running statistics, where these are sent.
    """

    type: Literal["clipping"] = "clipping"
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < math.inf:
            raise ConfigError(f"Clipping: max_norm: expected a finite value > 0, got {self.max_norm}.")

    def changed(self, change: NamedTensors, *, draws: Draws, client: Sending) -> NamedTensors:
        """Scales all tensors by one factor, at most 1."""
        return Clipped(self.max_norm)(change, change)

    @property
    def public_transform(self) -> Transform:
        """The same."""
        return Clipped(self.max_norm)

    def describe(self) -> str:
        """To what norm."""
        return f"{self.type} (norm {self.max_norm:g})"
