"""The arrays that a Flower strategy keeps between rounds: found, and put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedkl.errors import ConfigError, FedKLError, shown
from fedkl.flower.records import tensors_of
from fedkl.types import NamedTensors

_KINDS = ("record", "dict", "list")
_DTYPES = tuple(map(np.dtype, ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")))
_MAX_DIMENSIONS = 32  # NumPy's own, in its older versions
_TORCH_DTYPES = tuple(torch.from_numpy(np.empty(0, dtype)).dtype for dtype in _DTYPES)
_CHOOSE = "Use the strategy that it was written with, or another folder for the checkpoints."


def nested(strategy: Strategy, place: str = "") -> Iterator[tuple[str, Strategy]]:
    """A strategy and those that it wraps, each with the place that it has in the names of `arrays_in`."""
    yield place, strategy
    inner = getattr(strategy, "strategy", None)
    if isinstance(inner, Strategy):
        yield from nested(inner, f"{place}strategy.")


def arrays_in(strategy: Strategy) -> dict[str, Tensor]:
    """The arrays that a strategy keeps between rounds, e.g. FedAdam's moments.

    They are found by kind, not by name: attributes that are an `ArrayRecord`, or a dict or list of NumPy
    arrays, of the strategy and of one that it wraps. Names are ``attribute/kind/key``.
    """
    found: dict[str, Tensor] = {}
    for place, owner in nested(strategy):
        found |= _tensors(place, vars(owner))
    return found


def _tensors(place: str, attributes: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        f"{place}{attribute}/{kind}/{key}": torch.from_numpy(np.array(array))
        for attribute, value in attributes.items()
        for kind, entries in _entries(value)
        for key, array in entries.items()
    }


def put_arrays(strategy: Strategy, tensors: NamedTensors) -> None:
    """Gives a strategy back what `arrays_in` found in one of its kind.

    Raises:
        ConfigError: Names that `arrays_in` could not have found in this strategy, or arrays of other shapes
            than it has. Nothing was changed.
    """
    places = {
        f"{place}{attribute}": (owner, attribute)
        for place, owner in nested(strategy)
        for attribute, value in vars(owner).items()
        if _may_hold_arrays(value)
    }
    values = []
    for (path, kind), entries in _grouped(tensors).items():
        if path not in places:
            raise ConfigError(
                f"The checkpoint holds {shown(path)}, where {type(strategy).__name__} keeps no arrays: it was"
                f" written with another strategy. {_CHOOSE}"
            )
        owner, attribute = places[path]
        _check_alike(path, kind, entries, vars(owner)[attribute])
        values.append((owner, attribute, _assembled(path, kind, entries)))
    for owner, attribute, value in values:
        setattr(owner, attribute, value)


def _grouped(tensors: NamedTensors) -> dict[tuple[str, str], dict[str, Any]]:
    """Arrays by attribute and kind, then by key; an attribute is of one kind."""
    kinds: dict[str, str] = {}
    grouped: dict[tuple[str, str], dict[str, Any]] = {}
    for name, tensor in tensors.items():
        path, kind, key = [*name.split("/", 2), "", ""][:3]
        if name.count("/") < 2 or kind not in _KINDS or kinds.setdefault(path, kind) != kind:
            raise ConfigError(f"The checkpoint's {shown(name)} is no array of a strategy. {_CHOOSE}")
        if tensor.dtype not in _TORCH_DTYPES or tensor.dim() > _MAX_DIMENSIONS:
            raise ConfigError(f"The checkpoint's {shown(name)} is no array of numbers that NumPy has.")
        grouped.setdefault((path, kind), {})[key] = tensor.numpy()
    return grouped


def _check_alike(path: str, kind: str, entries: Mapping[str, Any], value: object) -> None:
    """Checks arrays against those that a strategy has in their place."""
    for kind_here, here in _entries(value):
        if kind_here != kind:
            raise ConfigError(
                f"The checkpoint's {shown(path)} is a {kind}, expected a {kind_here}. {_CHOOSE}"
            )
        for key, array in entries.items():
            if key in here and array.shape != here[key].shape:
                problem = f"has shape {array.shape}, expected {here[key].shape}"
                raise ConfigError(f"The checkpoint's {shown(f'{path}/{kind}/{key}')} {problem}. {_CHOOSE}")


def _may_hold_arrays(value: object) -> bool:
    """Whether arrays could be found in this attribute, now or once there are some."""
    empty = isinstance(value, (dict, list, ArrayRecord)) and not value
    return value is None or empty or _holds_arrays(value)


def _holds_arrays(value: object) -> bool:
    return bool(value) if isinstance(value, ArrayRecord) else any(True for _ in _entries(value))


def _assembled(path: str, kind: str, entries: dict[str, Any]) -> object:
    if kind == "record":
        return ArrayRecord({key: Array(array) for key, array in entries.items()})
    if kind == "dict":
        return entries
    places = [str(index) for index in range(len(entries))]
    if set(places) != set(entries):
        raise ConfigError(f"The checkpoint's {shown(path)} is a list with places missing. {_CHOOSE}")
    return [entries[index] for index in places]


def _entries(value: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What kind of collection of arrays a value is, and its arrays by key; nothing for all else."""
    if isinstance(value, ArrayRecord) and value:
        try:
            tensors = tensors_of(value, subject="Record")
        except FedKLError:  # the strategy's own bytes
            return
        yield "record", {key: tensor.numpy() for key, tensor in tensors.items()}
    elif isinstance(value, dict) and value and all(map(_is_array, value.values())):
        if all(isinstance(key, str) for key in value):  # others would come back as texts
            yield "dict", value
    elif isinstance(value, list) and value and all(map(_is_array, value)):
        yield "list", {str(index): array for index, array in enumerate(value)}


def _is_array(value: object) -> bool:
    return isinstance(value, (np.ndarray, np.generic)) and value.dtype in _DTYPES


class StrategyMemory:
    """The arrays that a strategy keeps, as they are now, to put them back if a round is given up.

    A strategy changes them while it aggregates: FedAvgM its own copy of the global arrays, FedAdam its
    moments. After an average that is not used they would not fit the global arrays, or never be finite again.

    Args:
        strategy: The strategy.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._owners = [
            (place, owner, set(vars(owner)), _copies(vars(owner))) for place, owner in nested(strategy)
        ]

    def put_back(self) -> None:
        """Gives the strategy the arrays that it had; what else it remembers stays."""
        for _, owner, names, copies in self._owners:
            now = {name for name, value in vars(owner).items() if _holds_arrays(value)}
            had = {name for name, value in copies.items() if _holds_arrays(value)}
            for name in (now | had) & set(copies):
                setattr(owner, name, copies[name])
            for name in now - names:
                delattr(owner, name)

    def spoilt(self, after: NamedTensors) -> list[str]:
        """Arrays that have become non-finite since.

        Args:
            after: What `arrays_in` finds now.
        """
        # single numbers may be what the strategy measures; arrays are what it computes with
        found = [name for name, tensor in after.items() if tensor.dim() and not tensor.isfinite().all()]
        if not found:
            return []
        before: dict[str, Tensor] = {}
        for place, _, _, copies in self._owners:
            before |= _tensors(place, copies)
        return [name for name in found if name not in before or before[name].isfinite().all()]


def _copies(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) for name, value in attributes.items() if _may_hold_arrays(value)}


def _copied(value: Any) -> Any:
    if isinstance(value, ArrayRecord):
        return value.copy()  # copy.copy would share what is in it
    copied = copy.copy(value)
    if isinstance(value, (dict, list)):
        for key, array in value.items() if isinstance(value, dict) else enumerate(value):
            copied[key] = array.copy()
    return copied
