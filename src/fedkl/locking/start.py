"""Where γ and β start: a trained model's norms keep theirs, an untrained model's are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from fedkl.errors import LockError, gathered, warn
from fedkl.locking import norms
from fedkl.locking.activations import RANGES, Activation, represents
from fedkl.locking.targets import Target

Start = Literal["model", "drawn"]


def is_trained(model: nn.Module) -> bool:
    """Whether one of the model's norms has learned a γ or β.

    Norms start at γ = 1 (or 0, at the end of some residual branches) and β = 0. One with other values is
    trained, unless it has running statistics that no batch has changed yet: then it was initialized so.
    """
    return any(norms.is_affine_norm(module) and _has_learned(module) for module in model.modules())


def _has_learned(norm: nn.Module) -> bool:
    scale, *shift = (tensor for _, tensor in _tensors(norm))
    at_start = bool((scale == 1).all() or (scale == 0).all()) and not any(bool(t.any()) for t in shift)
    return not at_start and not _has_seen_nothing(norm)


def _has_seen_nothing(norm: nn.Module) -> bool:
    mean, variance = (getattr(norm, name, None) for name in ("running_mean", "running_var"))
    if mean is None or variance is None:
        return False
    return not bool(mean.any()) and bool((variance == 1).all())


def is_kept(model: nn.Module, targets: Sequence[Target], *, start: Start, activation: Activation) -> bool:
    """Whether the norms to lock keep their γ and β.

    Args:
        model: The plain model; not changed.
        targets: What is locked.
        start: ``"model"``: where the model is trained. ``"drawn"``: never.
        activation: Of the lock layers.

    Raises:
        LockError: The activation cannot represent some γ or β that are to be kept, or `start` is unknown.
    """
    if start not in get_args(Start):
        raise LockError(f"lock: start={start!r} is unknown. Choose one of {', '.join(get_args(Start))}.")
    if start == "drawn" or not is_trained(model):
        return False
    own = [target for target in targets if not target.inserts]
    _check_representable(own, activation)
    inserted = [target.name for target in targets if target.inserts]
    if inserted:
        warn(
            f"This model is trained, and the norms that are inserted at {', '.join(inserted)} change what it "
            "computes. Train it on, or lock norms that it has."
        )
    return bool(own)


def _check_representable(targets: Sequence[Target], activation: Activation) -> None:
    if activation not in RANGES:  # is said with the other options
        return
    named = [(f"{t.name}.{name}", tensor) for t in targets for name, tensor in _tensors(t.module)]
    problems = [
        f"'{name}' is not {RANGES[activation].text} everywhere"
        for name, tensor in named
        if not represents(activation, tensor)
    ]
    if problems:
        able = [f"'{each}'" for each in RANGES if all(represents(each, tensor) for _, tensor in named)]
        summary = f"This model is trained, and activation='{activation}' cannot give all of its γ and β."
        choice = f"Lock with activation={' or '.join(able)}, which can" if able else "Mend non-finite values"
        remedy = (
            f"{choice}; or with start='drawn', which draws γ and β anew and so destroys what the model has "
            "learned until it is trained again."
        )
        raise LockError(gathered(summary, problems, remedy))


def _tensors(norm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """γ and, if there is one, β by their local names."""
    for name in filter(None, norms.generated_names(norm)):
        tensor: Any = getattr(norm, name)
        yield name, tensor.detach()
