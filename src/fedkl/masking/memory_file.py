"""The memory of a member's cohorts on disk, one encrypted file for all of them.

It is encrypted with a key that lies in the secret file: another member's does not open, and a new passphrase
concerns the secret file only. How often it was written stands in both, by cohort, so that one that was lost
or rolled back is noticed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from fedkl import lockfile
from fedkl.errors import KeyFileError, MaskingError
from fedkl.formats import check_version
from fedkl.masking.contents import SUFFIX, count_of, digest_of, free_from
from fedkl.masking.memory import Memory
from fedkl.masking.schedule import Secret

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the file holds of one cohort.

    Attributes:
        roster: The roster's digest, as hexadecimal text.
        saved: How often the memory of this roster was written.
        memory: `Memory.to_json`.
    """

    roster: str
    saved: int
    memory: dict[str, Any] = field(repr=False)


def memory_path(secret_file: Path) -> Path:
    """Where the memory of a member's secret file is: beside it."""
    return secret_file.with_name(secret_file.name.removesuffix(SUFFIX) + ".memory")


class MemoryFile:
    """A memory file, of which nobody else writes as long as the secret file is held.

    Args:
        path: Where it is, or will be.
        key: Encrypts it, 32 bytes.
        restored: The day on which the secret file was made from a backup; None: never.
    """

    def __init__(self, path: Path, *, key: Secret, restored: date | None = None) -> None:
        self.path = path
        self._key = key
        self._restored = restored
        self._salt = os.urandom(16)  # shared, which saves deriving the key at every message
        self._kept: dict[str, Kept] | None = None

    def last(self, cohort: str, *, roster: str, saved: int) -> dict[str, Any] | None:
        """The memory that was written last; None if none ever was.

        Args:
            cohort: The cohort's name.
            roster: Digest of its roster, as hexadecimal text.
            saved: How often it was written, as far as the secret file knows.

        Raises:
            MaskingError: It was written, but is not there, is damaged, or older.
            NewerFormatError: A newer fedkl wrote it.
        """
        try:
            kept = self._read().get(cohort)
        except KeyFileError as error:
            if saved:
                raise self._lost(cohort, "is damaged, or another member's") from error
            return None
        if kept is not None and kept.roster == roster and kept.saved >= saved:
            return kept.memory
        if saved == 0:  # of the epoch before
            return None
        if kept is None or kept.roster != roster:
            there = os.path.lexists(self.path)
            raise self._lost(cohort, "does not hold it" if there else "is gone")
        raise self._lost(cohort, f"is an older one: written {kept.saved} times, expected {saved}")

    def keep(self, cohort: str, *, roster: str, saved: int, memory: Memory, joined: Iterable[str]) -> int:
        """Writes a memory.

        Args:
            cohort: The cohort's name.
            roster: Digest of its roster, as hexadecimal text.
            saved: How often it was written, as far as the secret file knows.
            memory: The memory.
            joined: Names of all cohorts whose memories stay.

        Returns:
            How often it was written now.

        Raises:
            KeyFileError: It cannot be written; the file before stays.
        """
        try:
            kept = self._read()
        except KeyFileError:  # `last` has found that nothing of this cohort can be in it
            lockfile.keep_copy(self.path)
            kept = {}
        before = kept.get(cohort)
        ahead = before.saved if before is not None and before.roster == roster else 0
        now = Kept(roster=roster, saved=max(saved, ahead) + 1, memory=memory.to_json())
        kept = {**{name: kept[name] for name in joined if name in kept}, cohort: now}
        self._write(kept)
        self._kept = kept
        return now.saved

    def forget(self, cohort: str) -> None:
        """Destroys the memory of a cohort, if there is one that can be read.

        Args:
            cohort: The cohort's name.

        Raises:
            KeyFileError: The file cannot be written; it stays as it is.
            NewerFormatError: A newer fedkl wrote it.
        """
        try:
            kept = self._read()
        except KeyFileError:  # damaged, or another member's: `keep` puts it aside
            return
        if cohort in kept:
            rest = {name: each for name, each in kept.items() if name != cohort}
            self._write(rest)
            self._kept = rest

    def _read(self) -> dict[str, Kept]:
        if self._kept is None:
            self._kept = self._from_disk() if os.path.lexists(self.path) else {}
        return self._kept

    def _from_disk(self) -> dict[str, Kept]:
        meta, _ = lockfile.read(self.path, kind="memory", passphrase=self._key.reveal().hex())
        check_version(meta.get("version"), source=self.path, reads=_VERSION)
        try:
            if set(meta) != {"version", "cohorts"} or meta["version"] != _VERSION:
                raise ValueError
            return {name: _kept(values) for name, values in meta["cohorts"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise KeyFileError(f"{self.path}: holds no memory that can be used.") from error

    def _write(self, kept: dict[str, Kept]) -> None:
        cohorts = {
            name: {"roster": each.roster, "saved": each.saved, "memory": each.memory}
            for name, each in kept.items()
        }
        lockfile.write(
            self.path,
            kind="memory",
            meta={"version": _VERSION, "cohorts": cohorts},
            tensors={},
            passphrase=self._key.reveal().hex(),
            salt=self._salt,
        )

    def _lost(self, cohort: str, problem: str) -> MaskingError:
        remedy = (
            "Put the newest file back, or have the cohort changed with `fedkl cohort change`"
            if self._restored is None
            else f"The member was restored on {self._restored}: have the cohort changed with `fedkl cohort "
            f"change` from {free_from(self._restored)} (UTC) on"
        )
        return MaskingError(
            f"{self.path}: the memory of cohort {cohort} is lost: the file {problem}. Without it a mask "
            f"could be used twice. {remedy} and join the new epoch, which starts with an empty one."
        )


def _kept(values: dict[str, Any]) -> Kept:
    if set(values) != {"roster", "saved", "memory"} or type(values["memory"]) is not dict:
        raise ValueError
    return Kept(roster=digest_of(values["roster"]), saved=count_of(values["saved"]), memory=values["memory"])
