"""Which norm layers can be locked, and the norm inserted after a layer that has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from fedkl.errors import LockError


@dataclass(frozen=True, kw_only=True)
class NormTensors:
    """Names of the tensors of a norm type: scale γ, shift β (None if it has none), running statistics."""

    scale: str = "weight"
    shift: str | None = "bias"
    statistics: tuple[str, ...] = ()


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


# Of every batch and instance norm, registered or not.
_BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# By exact type: a subclass may permute axes or use its weight in another way.
_NORMS: dict[type[nn.Module], NormTensors] = {
    nn.BatchNorm1d: NormTensors(),
    nn.BatchNorm2d: NormTensors(),
    nn.BatchNorm3d: NormTensors(),
    nn.SyncBatchNorm: NormTensors(),
    nn.InstanceNorm1d: NormTensors(),
    nn.InstanceNorm2d: NormTensors(),
    nn.InstanceNorm3d: NormTensors(),
    nn.GroupNorm: NormTensors(),
    nn.LayerNorm: NormTensors(),
    nn.RMSNorm: NormTensors(shift=None),
    ElementwiseAffine: NormTensors(),
}

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


def register_norm(
    kind: type[nn.Module],
    *,
    scale: str = "weight",
    shift: str | None = "bias",
    statistics: tuple[str, ...] = (),
) -> None:
    """Makes a norm type lockable.

    Args:
        kind: The exact module type. Its forward must use the scale and shift as z = γ ⊙ x̂ + β, reading
            them as attributes.
        scale: Name of its scale parameter γ.
        shift: Name of its shift parameter β; None if it has none.
        statistics: Names of its buffers that describe the data; they are private by default. The running
            statistics of PyTorch's batch and instance norms need not be named in a subclass.

    Raises:
        LockError: `kind` is not a module type.

    >>> class MyNorm(nn.LayerNorm):
    ...     pass
    >>> register_norm(MyNorm)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise LockError(f"register_norm: expected a subclass of nn.Module, got {kind!r}.")
    _NORMS[kind] = NormTensors(scale=scale, shift=shift, statistics=statistics)


def norm_tensors(module: nn.Module) -> NormTensors | None:
    """The tensor names of a registered norm; None for any other module."""
    return _NORMS.get(parametrize.type_before_parametrizations(module))


def is_affine_norm(module: nn.Module) -> bool:
    """Whether the module is a registered norm that has a scale γ."""
    names = norm_tensors(module)
    return names is not None and getattr(module, names.scale, None) is not None


def is_unregistered_norm(module: nn.Module) -> bool:
    """Whether the module derives from a registered norm type without being registered itself."""
    return norm_tensors(module) is None and isinstance(module, tuple(_NORMS))


def generated_names(norm: nn.Module) -> tuple[str, str | None]:
    """Names of the scale and, if the norm has one, the shift that a lock generates.

    Raises:
        LockError: The norm's type is not registered.
    """
    names = norm_tensors(norm)
    if names is None:
        raise LockError(f"{type(norm).__name__} is not a registered norm.")
    shift = names.shift
    return names.scale, shift if shift and getattr(norm, shift, None) is not None else None


def statistics_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's running statistics that exist."""
    names = norm_tensors(module)
    declared = names.statistics if names else ()
    inherited = _BATCH_STATISTICS if isinstance(module, _NormBase) else ()
    unique = dict.fromkeys(declared + inherited)
    return tuple(name for name in unique if getattr(module, name, None) is not None)


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
