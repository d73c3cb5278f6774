"""What a server must not forget: how many calls there were, and for whom members were asked to reveal."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from fedkl.errors import ConfigError, warn
from fedkl.files import read_file, write_atomically
from fedkl.formats import check_version
from fedkl.masking import SealedSum
from fedkl.masking.attempts import RevealSets
from fedkl.parsing import parse_json_object

_FILE, _LIMIT = "calls.json", 2_000_000
_VERSION = 1


class Calls:
    """Run and rounds of one training: `run` is its name, `count` the rounds so far, `sets` who was listed.

    A round is counted, on disk, before anybody is asked: a server that was killed meanwhile begins another.
    So are the names that members are asked to reveal for: on one model they reveal for no others.

    Args:
        folder: Of the checkpoints; None: nothing is written, and a new start is a new run.
        last: The last sum, whose run goes on.

    Raises:
        NewerFormatError: A newer fedkl wrote the file.
    """

    def __init__(self, folder: Path | None, last: SealedSum | None) -> None:
        self._path = None if folder is None else folder / _FILE
        run, count, self.sets = self._read()
        if last is not None:
            run, count = last.call.run, max(count, last.call.round)
        self.run = run or secrets.token_bytes(16)
        self.count = count

    def next(self) -> int:
        """The number of a new round, from 1.

        Raises:
            ConfigError: It cannot be written down.
        """
        self.count += 1
        self._write()
        return self.count

    def _write(self) -> None:
        if self._path is None:
            return
        values = {
            "version": _VERSION,
            "run": self.run.hex(),
            "round": self.count,
            "reveals": self.sets.to_json(),
        }
        try:
            write_atomically(self._path, json.dumps(values).encode())
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be written ({error.strerror}).") from error

    def _keep(self, sets: RevealSets) -> None:
        self._write()

    def _read(self) -> tuple[bytes, int, RevealSets]:
        nothing = b"", 0, RevealSets(keep=self._keep)
        if self._path is None:
            return nothing
        try:
            values = parse_json_object(read_file(self._path, limit=_LIMIT, follow=False))
            check_version(values.get("version", 1), source=self._path, reads=_VERSION)
            run, count = bytes.fromhex(values["run"]), values["round"]
            if len(run) != 16 or type(count) is not int or count < 0:
                raise ValueError
            return run, count, RevealSets.from_json(values.get("reveals", []), keep=self._keep)
        except FileNotFoundError:
            return nothing
        except (OSError, ValueError, KeyError, TypeError):
            warn(f"{self._path}: cannot be read. Members may refuse a round or two before they go on.")
            return nothing
