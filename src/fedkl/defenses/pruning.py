"""Pruned updates: only the largest entries are sent, as gradient compression does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedkl.defenses.base import register_defense
from fedkl.defenses.changing import Draws, UpdateDefense
from fedkl.errors import ConfigError
from fedkl.protocol import Sending, Transform, only_kept
from fedkl.types import NamedTensors


@register_defense
@dataclass(frozen=True, kw_only=True)
class Pruning(UpdateDefense):
    """Of each tensor of a change, only the entries of largest magnitude are sent; the others become 0.

    A server that knows it sees which entries were kept, and compares those only.

    Attributes:
        keep: Share of a tensor's entries that are sent, rounded up to whole ones.

    Source:
        Lin et al. 2018 (Deep Gradient Compression, arXiv 1712.01887), which keeps 0.1 % of each layer; as a
        defense: Zhu et al. 2019 (DLG), section 5.2, by whom 20 % pruned entries were enough. Nothing of that
        which keeps the accuracy up is done here: what was not sent is forgotten and not added to the next
        round's update (no error feedback), and there is no momentum correction, local clipping or warm-up.
        Entries are chosen exactly, not by a threshold from a sample.
    """

    unaware: ClassVar[str] = "zeros are taken for gradients"
    type: Literal["pruning"] = "pruning"
    keep: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"Pruning: expected keep above 0 and at most 1, got {self.keep}.")

    def changed(self, change: NamedTensors, *, draws: Draws, client: Sending) -> NamedTensors:
        """Zeroes the entries of every tensor that are not kept."""
        return {name: self._pruned(tensor) for name, tensor in change.items()}

    def _pruned(self, tensor: Tensor) -> Tensor:
        sizes = tensor.detach().flatten().abs()
        kept = sizes.topk(math.ceil(self.keep * len(sizes)), sorted=False).indices
        mask = torch.zeros_like(sizes).scatter(0, kept, 1.0).bool().reshape(tensor.shape)
        return torch.where(mask, tensor, torch.zeros_like(tensor))

    @property
    def public_transform(self) -> Transform:
        """Only what was kept."""
        return only_kept

    def transform_under_noise(self, deviation: float) -> Transform:
        """Only what would be kept of its own change: which entries were, noise hides."""
        return self._pruned_as_own

    def _pruned_as_own(
        self, change: Mapping[str, Tensor], observed: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        return {name: self._pruned(tensor) for name, tensor in change.items()}

    def describe(self) -> str:
        """How much is kept."""
        return f"{self.type} ({100 * self.keep:g} % kept)"
