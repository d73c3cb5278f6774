"""Copies of models, and why there is none of some."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn

from fedkl.errors import FedKLError, LockError, gathered, shown

_Model = TypeVar("_Model", bound=nn.Module)


def copied(model: _Model, *, subject: str, error: type[FedKLError] = LockError) -> _Model:
    """A deep copy of a model.

    Args:
        model: Not changed.
        subject: First words of an error.
        error: The exception's class.

    Raises:
        FedKLError: Of class `error`: the model keeps results of computations, of which PyTorch makes no
            copies; with their names.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as reason:
        kept = [f"{shown(name)} is the result of a computation" for name in _results(model)]
        if not kept:
            raise
        raise error(
            gathered(
                f"{subject}: {type(model).__name__} cannot be copied, as it keeps tensors with their graph.",
                kept,
                "Detach what forward stores: self.last = x.detach(). In place of torch.nn.utils.weight_norm "
                "and spectral_norm use those of torch.nn.utils.parametrizations; make pruning permanent "
                "with torch.nn.utils.prune.remove.",
            )
        ) from reason


def _results(model: nn.Module) -> Iterator[str]:
    """Names of attributes and buffers that hold a tensor with a graph, in a list or mapping too."""
    for prefix, module in model.named_modules():
        for name, value in {**vars(module), **module._buffers}.items():
            values = value.values() if isinstance(value, Mapping) else value
            each = values if isinstance(value, (Mapping, list, tuple, set)) else [value]
            if any(isinstance(one, Tensor) and not one.is_leaf for one in each):
                yield f"{prefix}.{name}" if prefix else name
