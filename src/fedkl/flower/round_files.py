"""A Flower server's rounds on disk: global arrays, what the strategy itself remembers, metrics so far.

round-000003.fedkl   global arrays and the strategy's own arrays after round 3; the last two are kept
history.json         metrics of all rounds so far; numbers that are not finite as texts ("nan", "inf", "-inf")

Nothing in them is private: it is what the server has anyway. Nothing in them is believed: who can write to
the folder could put anything there.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedkl import lockfile
from fedkl.errors import ConfigError, FedKLError, KeyFileError, shown, warn
from fedkl.files import read_file, remove_parts, write_atomically
from fedkl.flower.records import tensors_of
from fedkl.parsing import parse_json_object
from fedkl.types import NamedTensors

History = dict[str, dict[int, dict[str, Any]]]
"""By field of Flower's `Result`, then by round, from 1; the server's own evaluation also of the start, 0."""

TRAIN, EVALUATE, SERVER = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)

_ROUND = re.compile(r"round-([0-9]{6,12})\.fedkl")
_PARTS = ("arrays", "memory")
_NUMBER = re.compile("0|[1-9][0-9]{0,11}")
_NOT_FINITE = ("nan", "inf", "-inf")
_MAX_HISTORY = 2**28
_KINDS = ("record", "dict", "list")
_DTYPES = tuple(map(np.dtype, ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")))
_MAX_DIMENSIONS = 32  # NumPy's own, in its older versions
_TORCH_DTYPES = tuple(torch.from_numpy(np.empty(0, dtype)).dtype for dtype in _DTYPES)
_MAKE_ROOM = "Make room or choose another folder; a new start goes on after the last round that was written."
_CHOOSE = "Use the strategy that it was written with, or another folder for the checkpoints."


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedRound:
    """A checkpoint.

    Attributes:
        round: The last round that was aggregated, from 1.
        arrays: The global arrays after it.
        memory: The strategy's own arrays; see `arrays_in`.
    """

    round: int
    arrays: NamedTensors
    memory: NamedTensors


class RoundFiles:
    """The checkpoints of one training.

    Args:
        folder: Where they lie; not a link.
        keep: How many are kept; a damaged newest one falls back to the one before.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, saved: SavedRound) -> None:
        """Writes a checkpoint, atomically, and removes the oldest ones before it.

        Raises:
            ConfigError: The folder is a link, or cannot be written, e.g. because the disk is full.
        """
        self._check_folder()
        tensors = {f"arrays/{name}": tensor for name, tensor in saved.arrays.items()}
        tensors |= {f"memory/{name}": tensor for name, tensor in saved.memory.items()}
        meta = {"round": saved.round, "order": list(tensors)}  # some strategies go by position
        path = self.folder / _name(saved.round)
        try:
            lockfile.write(path, kind="checkpoint", meta=meta, tensors=tensors, passphrase=None)
            earlier = [number for number in self._rounds() if number <= saved.round]
            for number in earlier[self._keep :]:
                self._remove(number)
        except KeyFileError as error:
            raise ConfigError(f"{error} {_MAKE_ROOM}") from error
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error.strerror}). {_MAKE_ROOM}") from error

    def newest(self) -> SavedRound | None:
        """The newest sound checkpoint; a damaged one is passed over with a warning.

        Raises:
            FedKLError: There are checkpoints, but none can be read.
        """
        failures: list[FedKLError] = []
        for number in self._rounds():
            try:
                saved = _read(self.folder / _name(number), number)
            except FedKLError as error:
                failures.append(error)
                continue
            for failure in failures:
                warn(f"{failure} The checkpoint of round {saved.round} is used instead.")
            return saved
        if failures:
            raise failures[0]
        return None

    def save_history(self, history: History) -> None:
        """Writes the metrics so far, atomically.

        Raises:
            ConfigError: The folder is a link, or cannot be written, e.g. because the disk is full.
        """
        self._check_folder()
        texts = {
            kind: {number: _mapped(_written, values) for number, values in rounds.items()}
            for kind, rounds in history.items()
        }
        try:
            remove_parts(self.folder, of="history.json")
            write_atomically(self.folder / "history.json", json.dumps(texts, allow_nan=False).encode())
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error.strerror}). {_MAKE_ROOM}") from error

    def history(self, *, until: int) -> History:
        """The metrics of rounds up to `until`; none, with a warning, if they cannot be read."""
        path = self.folder / "history.json"
        try:
            history = _history(parse_json_object(read_file(path, limit=_MAX_HISTORY, follow=False)))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError):  # their texts may quote the file
            warn(f"{path}: not the metrics of a training. The result holds those of the rounds to come only.")
            return {}
        return {
            kind: {number: values for number, values in rounds.items() if number <= until}
            for kind, rounds in history.items()
        }

    def _check_folder(self) -> None:
        if self.folder.is_symlink():
            raise ConfigError(
                f"{self.folder}: expected a folder, got a symbolic link. Give the folder itself."
            )

    def _rounds(self) -> list[int]:
        """Rounds that there are files of, newest first."""
        try:
            matches = [_ROUND.fullmatch(path.name) for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be read ({error.strerror}).") from error
        numbers = {int(match[1]) for match in matches if match and match[0] == _name(int(match[1]))}
        return sorted(numbers, reverse=True)

    def _remove(self, number: int) -> None:
        path = self.folder / _name(number)
        if path.is_file() and not path.is_symlink():  # anything else is not ours
            path.unlink()


def _name(number: int) -> str:
    return f"round-{number:06d}.fedkl"


def _read(path: Path, number: int) -> SavedRound:
    """A checkpoint, every way in which it can be unusable as one error."""
    if path.is_symlink() or not path.is_file():
        raise KeyFileError(f"{path}: it is not an ordinary file.")
    try:
        meta, tensors = lockfile.read(path, kind="checkpoint", passphrase=None)
    except FedKLError:
        raise
    except Exception as error:
        raise KeyFileError(f"{path}: cannot be read ({type(error).__name__}).") from error
    order = meta.get("order")
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
        raise KeyFileError(f"{path}: holds no round of a Flower server.")
    if len(order) != len(tensors) or set(order) != set(tensors):
        raise KeyFileError(f"{path}: holds no round of a Flower server: other arrays than it lists.")
    if type(meta.get("round")) is not int or meta["round"] != number or number < 1:
        raise KeyFileError(f"{path}: holds another round than its name says.")
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name in order:
        part, _, key = name.partition("/")
        if part not in parts or not key:
            raise KeyFileError(f"{path}: holds {shown(name)}, which is no array of a Flower server.")
        parts[part][key] = tensors[name]
    return SavedRound(round=number, **parts)


def _history(kinds: dict[str, Any]) -> History:
    """Checked metrics.

    Raises:
        ValueError: Other kinds than a `Result` has, or rounds that are no numbers.
        TypeError: Values that no MetricRecord can hold.
    """
    history: History = {}
    for kind, rounds in kinds.items():
        if kind not in (TRAIN, EVALUATE, SERVER) or not isinstance(rounds, dict):
            raise ValueError("not metrics by kind")
        for number, values in rounds.items():
            if not _NUMBER.fullmatch(number) or not isinstance(values, dict):
                raise ValueError("not metrics by round")
            record = MetricRecord(_mapped(_read_number, values))
            history.setdefault(kind, {})[int(number)] = dict(record)
    return history


def _mapped(change: Callable[[Any], Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics with every number changed."""
    return {
        name: [change(item) for item in value] if isinstance(value, list) else change(value)
        for name, value in values.items()
    }


def _written(value: Any) -> Any:
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _read_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value


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
