"""A copy of somebody's network in a mode, and images as it takes them."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def probe_of(model: nn.Module, *, train_mode: bool = False) -> nn.Module:
    """A copy; its `train` may return nothing, as is usual where norms are frozen in it."""
    probe = copy.deepcopy(model)
    probe.train(train_mode)
    return probe


def as_taken(model: nn.Module, images: Tensor) -> Tensor:
    """Images on a network's device and in its precision: of its first parameter of real numbers."""
    real = (parameter for parameter in model.parameters() if parameter.is_floating_point())
    return images.to(next(real, images))
