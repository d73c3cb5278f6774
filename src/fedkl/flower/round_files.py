"""A Flower server's rounds on disk: global arrays, what the strategy itself remembers, metrics so far.

round-000003.fedkl   global arrays and the strategy's own arrays after round 3; the last two are kept
history.json         metrics of all rounds so far

Nothing in them is private: it is what the server has anyway.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedkl import lockfile
from fedkl.errors import ConfigError, FedKLError, KeyFileError, warn
from fedkl.files import write_atomically
from fedkl.types import NamedTensors

History = dict[str, dict[int, dict[str, Any]]]
"""By field of Flower's `Result`, then by round, from 1."""


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
        folder: Where they lie.
        keep: How many are kept; a damaged newest one falls back to the one before.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, saved: SavedRound) -> None:
        """Writes a checkpoint, atomically, and removes the oldest.

        Raises:
            ConfigError: The folder cannot be written.
        """
        tensors = {f"arrays/{name}": tensor for name, tensor in saved.arrays.items()}
        tensors |= {f"memory/{name}": tensor for name, tensor in saved.memory.items()}
        meta = {"round": saved.round, "order": list(tensors)}  # some strategies go by position
        path = self.folder / f"round-{saved.round:06d}.fedkl"
        try:
            lockfile.write(path, kind="checkpoint", meta=meta, tensors=tensors, passphrase=None)
            for old in self._newest_first()[self._keep :]:
                old.unlink()
        except (OSError, KeyFileError) as error:
            raise ConfigError(f"{self.folder}: the checkpoint cannot be written ({error}).") from error

    def newest(self) -> SavedRound | None:
        """The newest sound checkpoint; a damaged one is passed over with a warning.

        Raises:
            FedKLError: There are checkpoints, but none can be read.
        """
        failures: list[FedKLError] = []
        for path in self._newest_first():
            try:
                saved = _read(path)
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
            ConfigError: The folder cannot be written.
        """
        try:
            write_atomically(self.folder / "history.json", json.dumps(history).encode())
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error.strerror}).") from error

    def history(self, *, until: int) -> History:
        """The metrics of rounds up to `until`; empty if there are none, or none that can be read."""
        try:
            kinds = json.loads((self.folder / "history.json").read_text(encoding="utf-8"))
            return {
                kind: {int(round): values for round, values in rounds.items() if int(round) <= until}
                for kind, rounds in kinds.items()
            }
        except (OSError, ValueError, AttributeError):
            return {}

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("round-*.fedkl"), reverse=True)


def _read(path: Path) -> SavedRound:
    meta, tensors = lockfile.read(path, kind="checkpoint", passphrase=None)
    order = meta.get("order")
    if type(meta.get("round")) is not int or not isinstance(order, list) or set(order) != set(tensors):
        raise KeyFileError(f"{path}: holds no round of a Flower server.")
    parts: dict[str, dict[str, Tensor]] = {"arrays": {}, "memory": {}}
    for name in order:
        part, _, key = name.partition("/")
        parts[part][key] = tensors[name]
    return SavedRound(round=meta["round"], **parts)


def arrays_in(strategy: Strategy) -> dict[str, Tensor]:
    """The arrays that a strategy keeps between rounds, e.g. FedAdam's moments.

    They are found by kind, not by name: attributes that are an `ArrayRecord`, or a dict or list of NumPy
    arrays, of the strategy and of one that it wraps. Names are ``attribute/kind/key``.
    """
    found = {}
    for place, owner in _nested(strategy):
        for attribute, value in vars(owner).items():
            for kind, entries in _entries(value):
                for key, array in entries.items():
                    tensor = torch.from_numpy(np.array(array))
                    found[f"{place}{attribute}/{kind}/{key}"] = tensor
    return found


def put_arrays(strategy: Strategy, tensors: NamedTensors) -> None:
    """Gives a strategy back what `arrays_in` found in one of its kind."""
    grouped: dict[tuple[str, str], dict[str, Any]] = {}
    for name, tensor in tensors.items():
        attribute, kind, key = name.split("/", 2)
        grouped.setdefault((attribute, kind), {})[key] = tensor.numpy()
    owners = dict(_nested(strategy))
    for (path, kind), entries in grouped.items():
        place, _, attribute = path.rpartition(".")
        owner = owners.get(f"{place}." if place else "")
        if owner is None or not hasattr(owner, attribute):
            raise ConfigError(
                f"The checkpoint holds '{path}', which {type(strategy).__name__} does not have: it was "
                "written with another strategy. Use that one, or another folder for the checkpoints."
            )
        setattr(owner, attribute, _assembled(kind, entries))


def _nested(strategy: Strategy, place: str = "") -> Iterator[tuple[str, Strategy]]:
    yield place, strategy
    inner = getattr(strategy, "strategy", None)
    if isinstance(inner, Strategy):
        yield from _nested(inner, f"{place}strategy.")


def _entries(value: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What kind of collection of arrays a value is, and its arrays by key; nothing for all else."""
    if isinstance(value, ArrayRecord):
        if value:
            yield "record", {key: array.numpy() for key, array in value.items()}
    elif isinstance(value, dict) and value and all(map(_is_array, value.values())):
        yield "dict", value
    elif isinstance(value, list) and value and all(map(_is_array, value)):
        yield "list", {str(index): array for index, array in enumerate(value)}


def _is_array(value: object) -> bool:
    return isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub"


def _assembled(kind: str, entries: dict[str, Any]) -> object:
    if kind == "record":
        return ArrayRecord({key: Array(array) for key, array in entries.items()})
    if kind == "list":
        return [entries[str(index)] for index in range(len(entries))]
    return entries
