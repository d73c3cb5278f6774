"""Which norm layers can be locked, and the norm inserted after a layer that has none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from fedkl.errors import LockError


@dataclass(frozen=True, kw_only=True)
class NormTensors:
    """Names of the tensors of a norm type: scale γ, shift β (None if it has none), running statistics."""

    scale: str = "weight"
    shift: str | None = "bias"
    statistics: tuple[str, ...] = ()


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
}

INSERTED_NAME = "norm"

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


def inserted_norm(layer: nn.Module) -> nn.Module:
    """A norm for the layer's output: BatchNorm after convolutions, LayerNorm after Linear.

    γ and β are ordinary parameters here; locking replaces them. dtype and device are the layer's.
    """
    kind = _INSERTED[parametrize.type_before_parametrizations(layer)]
    features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    norm = kind(features)
    norm.train(layer.training)
    weight = layer.weight
    return norm.to(device=weight.device, dtype=weight.dtype)  # type: ignore[arg-type]
