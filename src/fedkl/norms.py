"""Which modules are norms: the types that are known, PyTorch's and those that users register.

What locks norms and what attacks and scores networks with norms asks here, so that a norm is known to all of
them or to none.
"""

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
