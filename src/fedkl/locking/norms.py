"""What a lock does with norms: γ and β per element, and the norm inserted after a layer that has none.

Which norms there are, `fedkl.norms` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedkl.errors import LockError
from fedkl.norms import (
    NormTensors,
    generated_names,
    is_affine_norm,
    is_unregistered_norm,
    norm_tensors,
    register_norm,
    statistics_names,
)

__all__ = [
    "ELEMENTS_NAME",
    "INPUT_NAME",
    "INSERTED_NAME",
    "ElementwiseAffine",
    "NormTensors",
    "fitted",
    "generated_names",
    "inserted_norm",
    "is_affine_norm",
    "is_too_narrow",
    "is_unregistered_norm",
    "norm_tensors",
    "register_norm",
    "statistics_names",
    "takes_elements",
    "takes_inserted_norm",
]


class ElementwiseAffine(nn.Module):
    """z = γ ⊙ x̂ + β with a γ and a β for every element of a sample: a norm's affine part, apart from it.

    Args:
        shape: Of one sample, e.g. ``(channels, height, width)``.

    >>> ElementwiseAffine((12, 16, 16))(torch.rand(2, 12, 16, 16)).shape
    torch.Size([2, 12, 16, 16])
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.weight = nn.Parameter(torch.empty(self.shape))
        self.bias = nn.Parameter(torch.empty(self.shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = 1 and β = 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """γ ⊙ x̂ + β.

        Args:
            x: Shape ``(batch, *shape)``.

        Raises:
            LockError: Samples of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            got = tuple(x.shape[1:])
            raise LockError(
                f"ElementwiseAffine: expected samples of shape {self.shape}, got {got}. A lock per element "
                "holds for one size of images: feed that, or lock for the other (example_inputs=)."
            )
        return x * self.weight + self.bias

    def extra_repr(self) -> str:
        """Structure only, no values."""
        return f"{self.shape}"


register_norm(ElementwiseAffine, normalizes="nothing")

INSERTED_NAME = "norm"
INPUT_NAME = "input_norm"
ELEMENTS_NAME = "elementwise"

# Exact types: in a subclass, x̂ may not be what its output is without a scale and a shift.
_PER_ELEMENT = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)

# Exact types as well: e.g. nn.MultiheadAttention reads the weight of its output layer without calling it.
_INSERTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
    nn.Linear: nn.LayerNorm,
}


def takes_inserted_norm(module: nn.Module) -> bool:
    """Whether a norm can be inserted after this module: convolutions and linear layers of exact type."""
    return parametrize.type_before_parametrizations(module) in _INSERTED


def is_too_narrow(layer: nn.Module) -> bool:
    """Whether a norm inserted after this layer would make its output constant: LayerNorm over one feature."""
    return isinstance(layer, nn.Linear) and layer.out_features == 1


def takes_elements(module: nn.Module) -> bool:
    """Whether the module can have a γ and a β per element: batch and instance norms, and convolutions."""
    kind = parametrize.type_before_parametrizations(module)
    return kind in _PER_ELEMENT or _INSERTED.get(kind) in _PER_ELEMENT


def inserted_norm(layer: nn.Module, *, affine: bool = True) -> nn.Module:
    """A norm for the layer's output: BatchNorm after convolutions, LayerNorm after Linear.

    γ and β are ordinary parameters here; locking replaces them. dtype and device are the layer's.

    Args:
        layer: The layer.
        affine: Whether a BatchNorm has a γ and β of its own.
    """
    if isinstance(layer, nn.Linear):
        return fitted(nn.LayerNorm(layer.out_features), layer)
    kind: type = _INSERTED[parametrize.type_before_parametrizations(layer)]
    return fitted(kind(layer.out_channels, affine=affine), layer)


def fitted(norm: nn.Module, layer: nn.Module) -> nn.Module:
    """The norm in the mode, dtype and device of the layer that it is put to."""
    norm.train(layer.training)
    weight = layer.weight
    return norm.to(device=weight.device, dtype=weight.dtype)  # type: ignore[arg-type]
