"""The ledger on disk: one JSON object a line for each round that was begun, never taken back."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from fedkl.errors import ConfigError
from fedkl.files import read_file, sync_folder, write_atomically
from fedkl.formats import check_version
from fedkl.parsing import parse_json_object
from fedkl.privacy.ledger import Ledger, LedgerEntry

_VERSION = 1
_MAX_BYTES = 2**28


class LedgerFile:
    """``ledger.jsonl`` of a run directory.

    Args:
        path: The file; it need not exist.
        delta: δ of every ε in it.
    """

    def __init__(self, path: Path, *, delta: float) -> None:
        self._path = path
        self._delta = delta

    def keep(self, ledger: Ledger, *, rounds: int = 0) -> None:
        """Takes what earlier processes counted into a ledger, and writes down what it counts from now on.

        Rounds that are repeated were sent, and count twice.

        Args:
            ledger: Of the training that begins or goes on.
            rounds: So many are behind it.

        Raises:
            ConfigError: See `entries` and `Ledger.restore`; or the ledger's δ is another one.
        """
        if ledger.options.delta != self._delta:
            raise ConfigError(
                f"{self._path}: expected a ledger of δ = {self._delta}, got one of {ledger.options.delta}. "
                "Give both the same."
            )
        ledger.restore(self.entries(rounds=rounds))
        ledger.on_charge = self.append

    def append(self, entry: LedgerEntry) -> None:
        """Appends a round, on disk when this returns.

        Raises:
            ConfigError: It cannot be written.
        """
        record = {
            "version": _VERSION,
            "round": entry.round,
            "delta": self._delta,
            "epsilon": dict(entry.epsilon),
        }
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            is_new = not self._path.exists()
            with os.fdopen(os.open(self._path, flags, 0o644), "ab", buffering=0) as file:
                before = os.fstat(file.fileno()).st_size
                line = (json.dumps(record, allow_nan=False) + "\n").encode()
                try:
                    while line:
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)  # the next line must not continue half of this one
                    raise
            if is_new:
                sync_folder(self._path.parent)
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be written ({error.strerror}).") from error

    def entries(self, *, rounds: int) -> list[LedgerEntry]:
        """What was counted so far; a last line that was cut off, of a round that was not begun, is dropped.

        Args:
            rounds: Each of so many must be there.

        Raises:
            ConfigError: The file cannot be read, a line is damaged, or a round is missing.
            NewerFormatError: A newer fedkl wrote it.
        """
        try:
            data = read_file(self._path, limit=_MAX_BYTES) if self._path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                write_atomically(self._path, whole)
            found = [self._entry(parse_json_object(line)) for line in whole.splitlines()]
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{self._path}: cannot be read ({reason}). Restore it to continue.") from error
        missing = set(range(rounds)).difference(entry.round for entry in found)
        if missing:
            raise ConfigError(
                f"{self._path}: expected the {rounds} rounds that the checkpoint has behind it, got none of "
                f"round {min(missing)}. Restore it: what is not in it would be spent twice."
            )
        return found

    def _entry(self, record: dict[str, Any]) -> LedgerEntry:
        check_version(record.get("version"), source=self._path, reads=_VERSION)
        round, spent = record.get("round"), record.get("epsilon")
        if record.get("version") != _VERSION or record.get("delta") != self._delta:
            raise ValueError(f"expected version {_VERSION} and δ = {self._delta} on every line")
        if type(round) is not int or round < 0 or not isinstance(spent, dict):
            raise ValueError("expected a round and ε by client on every line")
        if not all(type(value) is float and 0 <= value < math.inf for value in spent.values()):
            raise ValueError("expected finite numbers ≥ 0 as ε")
        return LedgerEntry(round=round, epsilon=spent)
