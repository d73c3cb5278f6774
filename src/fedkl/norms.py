"""Which modules are norms: the types that are known, PyTorch's and those that users register.

What locks norms and what attacks and scores networks with norms asks here, so that a norm is known to all of
them or to none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from fedkl.errors import LockError

Normalizes = Literal["batch", "sample", "nothing"]
"""What becomes of the scale of a norm's input. By statistics of the batch it is lost in training, and kept in
evaluation, which uses running ones; by those of each sample it is lost in both; or it is kept in both."""


@dataclass(frozen=True, kw_only=True)
class NormTensors:
    """A norm type: the names of its scale γ, shift β (None: it has none) and running statistics; its kind."""

    scale: str = "weight"
    shift: str | None = "bias"
    statistics: tuple[str, ...] = ()
    normalizes: Normalizes = "sample"


# Of every batch and instance norm, registered or not.
BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# By exact type: a subclass may permute axes or use its weight in another way.
_NORMS: dict[type[nn.Module], NormTensors] = {
    nn.BatchNorm1d: NormTensors(normalizes="batch"),
    nn.BatchNorm2d: NormTensors(normalizes="batch"),
    nn.BatchNorm3d: NormTensors(normalizes="batch"),
    nn.SyncBatchNorm: NormTensors(normalizes="batch"),
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
    normalizes: Normalizes | None = None,
) -> None:
    """Makes a norm type known: it can be locked, and attacks and scores take it for a norm.

    Args:
        kind: The exact module type. Its forward must use the scale and shift as z = γ ⊙ x̂ + β, reading
            them as attributes.
        scale: Name of its scale parameter γ.
        shift: Name of its shift parameter β; None if it has none.
        statistics: Names of its buffers that describe the data; they are private by default. The running
            statistics of PyTorch's batch and instance norms need not be named in a subclass.
        normalizes: ``"batch"``: by mean and variance of the batch, and in evaluation by running ones.
            ``"sample"``: by those of each sample, always. ``"nothing"``: its output grows with its input, as
            behind a mere scale and shift. Decides whether a gradient tells an image's scale; scores fix it
            from outside where it does not. None: as the nearest registered base class, else ``"sample"``,
            with which no attack looks weaker than it is for a scale that it cannot know.

    Raises:
        LockError: `kind` is not a module type, or `normalizes` is unknown.

    >>> class MyNorm(nn.LayerNorm):
    ...     pass
    >>> register_norm(MyNorm)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise LockError(f"register_norm: expected a subclass of nn.Module, got {kind!r}.")
    if normalizes is None:
        base = _nearest(kind)
        normalizes = base.normalizes if base else "sample"
    if normalizes not in get_args(Normalizes):
        known = ", ".join(get_args(Normalizes))
        raise LockError(f"register_norm: normalizes={normalizes!r} is unknown. Choose one of {known}.")
    _NORMS[kind] = NormTensors(scale=scale, shift=shift, statistics=statistics, normalizes=normalizes)


def registered_norms() -> tuple[type[nn.Module], ...]:
    """The types that can be locked."""
    return tuple(_NORMS)


def _nearest(kind: type[nn.Module]) -> NormTensors | None:
    """What is known of a type or of its nearest base class."""
    return next((_NORMS[base] for base in kind.__mro__ if base in _NORMS), None)


def loses_scale(module: nn.Module, *, train_mode: bool) -> bool:
    """Whether the module is a norm behind which nothing tells its input's scale.

    A type that is not registered is taken for its nearest registered base class.

    Args:
        module: Any module.
        train_mode: Whether it is called in train mode.
    """
    known = _nearest(parametrize.type_before_parametrizations(module))
    if known is None or known.normalizes == "nothing":
        return False
    if not train_mode and isinstance(
        module, _NormBase
    ):  # which use the batch or sample if they track nothing
        return module.running_mean is None
    return train_mode or known.normalizes == "sample"


def mixes_images(module: nn.Module, *, train_mode: bool | None = None) -> bool:
    """Whether the module is a norm that, as it is called, uses or keeps statistics of the batch's images.

    A norm in eval mode keeps nothing. A type that is not registered is taken for its nearest registered base
    class.

    Args:
        module: Any module.
        train_mode: Whether it is called in train mode; None: in the mode in which it is.
    """
    known = _nearest(parametrize.type_before_parametrizations(module))
    if known is None:
        return False
    if not (module.training if train_mode is None else train_mode):
        untracked = isinstance(module, _NormBase) and module.running_mean is None
        return known.normalizes == "batch" and untracked
    return known.normalizes == "batch" or bool(statistics_names(module))


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
    inherited = BATCH_STATISTICS if isinstance(module, _NormBase) else ()
    unique = dict.fromkeys(declared + inherited)
    return tuple(name for name in unique if getattr(module, name, None) is not None)
