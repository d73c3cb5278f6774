"""Shared types: tensors by name, and images and labels with their shapes and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int64, Shaped
from torch import Tensor

NamedTensors = Mapping[str, Tensor]
"""Tensors by qualified name, never by position."""

ImageBatch = Float[Tensor, "batch channels height width"]
"""Images in [0, 1]; normalization lives in the model's own preprocessing."""

Inputs = Shaped[Tensor, "batch ..."]
"""What a network is called with: images, or integer tokens."""

Labels = Int64[Tensor, " batch"]
"""Class indexes in 0 .. classes − 1."""


@runtime_checkable
class Images(Protocol):
    """Images that are had a batch at a time, wherever they lie; a float32 tensor in [0, 1] is one itself."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(images, channels, height, width)`."""
        ...

    def __len__(self) -> int:
        """The number of images."""
        ...

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        """Returns the images at a 1-D int64 `index` or a slice, in that order.

        They are float32 in [0, 1], shape `(batch, channels, height, width)`, on the store's device, and may
        be a view or an expanded view of what the store holds: clone before writing into them.
        """
        ...


def under(tensors: NamedTensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, named by what follows it.

    >>> import torch
    >>> list(under({"private/fc.weight": torch.ones(1), "key": torch.ones(1)}, "private/"))
    ['fc.weight']
    """
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
