"""NVFlare's filter PercentilePrivacy: small differences are not sent, large ones are cut off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedkl.defenses.base import register_defense
from fedkl.defenses.changing import Draws, UpdateDefense
from fedkl.errors import ConfigError
from fedkl.protocol import Kept, Sending, Transform
from fedkl.types import NamedTensors

_ROUNDING = 1e-4
"""Of floating point: an entry so near to the bound may be one that was clipped."""


@dataclass(frozen=True)
class KeptAndClipped(Kept):
    """The `Transform` of a client whose entries are clipped, too: smaller ones are exact.

    Attributes:
        most: The magnitude at which an entry was clipped, in the unit of the change.
    """

    most: float

    def __call__(self, change: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The change, with what was not kept at 0; a single number is not filtered."""
        return {
            name: tensor.clamp(-self.most, self.most) if tensor.dim() else change[name]
            for name, tensor in super().__call__(change, observed).items()
        }

    def exact(self, observed: Tensor) -> Tensor:
        """Those that were kept, and are surely below the bound in floating point."""
        return super().exact(observed) & (observed.abs() < (1 - _ROUNDING) * self.most)


@register_defense
@dataclass(frozen=True, kw_only=True)
class Percentile(UpdateDefense):
    """NVFlare's PercentilePrivacy: entries below a percentile become 0, the others are clipped to ±γ.

    With differences divided by the number of local steps, the cutoff is the percentile of the magnitudes of
    all entries of all tensors, and what is at least as large is clipped and multiplied by the steps again. So
    γ bounds an entry of one step's mean change, and ``percentile=10`` drops only the smallest tenth.
    Tensors without dimensions are sent as they are. It is no differential privacy.

    A server that knows it sees which entries were kept, and compares those only, clipped as the client's.

    Attributes:
        percentile: Of all magnitudes, in percent; NVFlare's default.
        gamma: The largest magnitude that is sent, of one step's mean change; NVFlare's default.
        steps: What the filter is told of the local steps (NUM_STEPS_CURRENT_ROUND); NVFlare takes 1 where a
            trainer does not say.

    Source:
        nvflare/app_common/filters/percentile_privacy.py at f3b7c1b (August 2026), by its code: its docstring
        says that magnitudes below γ become 0, which they do not. It follows Shokri and Shmatikov 2015,
        "Privacy-preserving deep learning", who share the largest entries. Different here: a gradient, where
        one is sent, is filtered as a difference of weights is there; counts of batches play no part; and
        values out of range are refused, where NVFlare sends the update unfiltered or fails.
    """

    type: Literal["percentile"] = "percentile"
    percentile: float = 10.0
    gamma: float = 0.01
    steps: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.percentile <= 100 and 0 < self.gamma < math.inf and self.steps >= 1):
            raise ConfigError(
                "Percentile: expected percentile from 0 to 100, a finite gamma > 0 and steps from 1, got "
                f"{self.percentile}, {self.gamma} and {self.steps}."
            )

    def changed(self, change: NamedTensors, *, draws: Draws, client: Sending) -> NamedTensors:
        """Filters all tensors together."""
        return self._filtered(change, change)

    def _filtered(self, change: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        each = {name: tensor / self.steps for name, tensor in change.items()}
        sizes = torch.cat([tensor.detach().abs().flatten() for tensor in each.values()])
        cutoff = _percentile(sizes, self.percentile)
        sent = {
            name: self.steps * tensor.clamp(-self.gamma, self.gamma) * (tensor.abs() >= cutoff)
            for name, tensor in each.items()
        }
        return {name: sent[name] if tensor.dim() else tensor for name, tensor in change.items()}

    @property
    def public_transform(self) -> Transform:
        """Only what was kept, clipped."""
        return KeptAndClipped(self.steps * self.gamma)

    def transform_under_noise(self, deviation: float) -> Transform:
        """Filters its own change: which entries were kept, noise hides."""
        return self._filtered

    def describe(self) -> str:
        """Its numbers."""
        return f"{self.type} ({self.percentile:g} % dropped, γ = {self.gamma:g}, steps {self.steps})"


def _percentile(values: Tensor, percent: float) -> Tensor:
    """As `numpy.percentile`; `torch.quantile` refuses more than 2²⁴ values."""
    place = percent / 100 * (len(values) - 1)
    low, high = (values.kthvalue(1 + int(rounded(place))).values for rounded in (math.floor, math.ceil))
    return torch.lerp(low, high, place - math.floor(place))
