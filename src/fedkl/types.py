"""Shared type aliases: tensors by name, and images and labels with their shapes and ranges."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float, Int64
from torch import Tensor

NamedTensors = Mapping[str, Tensor]
"""Tensors by qualified name, never by position."""

Images = Float[Tensor, "batch channels height width"]
"""Images in [0, 1]; normalization lives in the model's own preprocessing."""

Labels = Int64[Tensor, " batch"]
"""Class indexes in 0 .. classes − 1."""
