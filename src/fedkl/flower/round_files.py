"""A Flower server's rounds on disk: global arrays, what the strategy itself remembers, metrics so far.

round-000003.fedkl   global arrays and the strategy's own arrays after round 3; the last two are kept
history.json         metrics of all rounds so far; numbers that are not finite as texts ("nan", "inf", "-inf")

Nothing in them is private: it is what the server has anyway. Nothing in them is believed: who can write to
the folder could put anything there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import MetricRecord
from torch import Tensor

from fedkl import lockfile
from fedkl.errors import ConfigError, FedKLError, KeyFileError, NewerFormatError, shown, warn
from fedkl.files import read_file, remove_parts, write_atomically
from fedkl.formats import check_version
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
_PARTS = ("arrays", "memory", "kept")
_NUMBER = re.compile("0|[1-9][0-9]{0,11}")
_NOT_FINITE = ("nan", "inf", "-inf")
_MAX_HISTORY = 2**28
_HISTORY_VERSION = 1
_MAKE_ROOM = "Make room or choose another folder; a new start goes on after the last round that was written."


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedRound:
    """A checkpoint.

    Attributes:
        round: The last round that was aggregated, from 1.
        arrays: The global arrays after it.
        memory: The strategy's own arrays; see `strategy_memory.arrays_in`.
        kept: What the aggregation needs of it; see `aggregation.ReplyRound.kept`.
    """

    round: int
    arrays: NamedTensors
    memory: NamedTensors
    kept: NamedTensors = field(default_factory=dict)


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
        tensors |= {f"kept/{name}": tensor for name, tensor in saved.kept.items()}
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
            except NewerFormatError:  # an older round would be gone on from, and this one replaced
                raise
            except FedKLError as error:
                failures.append(error)
                continue
            for failure in failures:
                warn(f"{failure} The checkpoint of round {saved.round} is used instead.")
            return saved
        if failures:
            raise failures[0]
        return None

    def earlier(self, round: int) -> SavedRound | None:
        """The newest sound checkpoint of a round before this one; None if there is none."""
        for number in self._rounds():
            with suppress(FedKLError):
                if number < round:
                    return _read(self.folder / _name(number), number)
        return None

    def save_history(self, history: History) -> None:
        """Writes the metrics so far, atomically.

        Raises:
            ConfigError: The folder is a link, or cannot be written, e.g. because the disk is full.
        """
        self._check_folder()
        texts: dict[str, Any] = {
            kind: {number: _mapped(_written, values) for number, values in rounds.items()}
            for kind, rounds in history.items()
        }
        try:
            remove_parts(self.folder, of="history.json")
            data = json.dumps({"version": _HISTORY_VERSION, **texts}, allow_nan=False).encode()
            write_atomically(self.folder / "history.json", data)
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error.strerror}). {_MAKE_ROOM}") from error

    def history(self, *, until: int) -> History:
        """The metrics of rounds up to `until`; none, with a warning, if they cannot be read.

        Raises:
            NewerFormatError: A newer fedkl wrote them.
        """
        path = self.folder / "history.json"
        try:
            kinds = parse_json_object(read_file(path, limit=_MAX_HISTORY, follow=False))
            check_version(kinds.pop("version", 1), source=path, reads=_HISTORY_VERSION)
            history = _history(kinds)
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
