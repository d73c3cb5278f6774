"""What a node remembers of its clients beside their locks: when they were born, how often they were saved.

``<store>/<client>/ledger.json``                  in the store: tells a lock that was lost, swapped or rolled
back ``<config>/fedkl/stores/<store>/<client>.json``   outside of it: tells a store that is not there, e.g.
not mounted

Neither holds a secret.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fedkl.errors import KeyFileError, shown
from fedkl.files import PRIVATE_FILE, create_once, read_file, write_atomically
from fedkl.formats import check_version
from fedkl.parsing import parse_json_object
from fedkl.passphrases import config_folder

_NAME = "ledger.json"
_VERSION = 1
_LIMIT = 4096


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What the store remembers of one client.

    Attributes:
        client: Its name.
        born: When its key was made, or first seen here: UTC, ISO 8601.
        saved: How often its lock was saved.
        member: Who its member is, as `fedkl.custody.member.identity_of` names it; None: none was seen yet.
    """

    client: str
    born: str
    saved: int
    member: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Ledger | None:
        """The ledger of a client's folder; None if there is none.

        Raises:
            KeyFileError: It is damaged.
            NewerFormatError: A newer fedkl wrote it.
        """
        path = folder / _NAME
        try:
            return cls.of(parse_json_object(read_file(path, limit=_LIMIT, follow=False)), source=path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise KeyFileError(
                f"{path}: damaged. Restore it from a backup together with the lock."
            ) from error

    @classmethod
    def of(cls, values: dict[str, Any], *, source: Path) -> Ledger:
        """The ledger that `values` gave.

        Args:
            values: What was read.
            source: The file that it is from; errors name it.

        Raises:
            NewerFormatError: A newer fedkl wrote it.
            TypeError: They are not those of one.
        """
        version = values.get("version", 1)  # the first ones had none
        check_version(version, source=source, reads=_VERSION)
        ledger = cls(**{name: value for name, value in values.items() if name != "version"})
        if not (
            version == _VERSION
            and isinstance(ledger.client, str)
            and isinstance(ledger.born, str)
            and type(ledger.saved) is int
            and isinstance(ledger.member, str | None)
        ):
            raise TypeError
        return ledger

    def values(self) -> dict[str, str | int]:
        """All that is known, as JSON can hold it."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {"version": _VERSION, **known}

    def write(self, folder: Path) -> None:
        """Writes it into a client's folder, atomically.

        Raises:
            OSError: It cannot be written.
        """
        write_atomically(folder / _NAME, json.dumps(self.values()).encode(), mode=PRIVATE_FILE)

    def check(self, folder: Path, about: Mapping[str, str | int]) -> None:
        """Checks that a lock file is the last one that was saved here.

        Raises:
            KeyFileError: It is another client's, an older one, or was put here by somebody else.
        """
        on_purpose = f"If you put it there on purpose, e.g. from a backup, remove {folder / _NAME}."
        if about.get("client") != self.client:
            raise KeyFileError(f"{folder}: the lock is not the one that this client saved last. {on_purpose}")
        saved = about.get("saved")
        if not isinstance(saved, int) or saved < self.saved:
            raise KeyFileError(
                f"{folder}: the lock was saved {shown(saved)[1:-1]} times, but this client has saved it "
                f"{self.saved} times: an older file was put in its place. {on_purpose}"
            )


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def remember_birth(store: Path, client: str) -> None:
    """Notes outside of the store that a client has a key in it; nowhere if this user has no home."""
    record = _record(store, client)
    if record is not None:
        about = {"version": _VERSION, "store": str(store), "client": client, "born": now()}
        try:
            create_once(record, json.dumps(about).encode(), mode=PRIVATE_FILE)
        except OSError:  # a read-only home: the store's own ledger remains
            return


def check_never_born(store: Path, client: str) -> None:
    """Checks that a client may get a new key in a store.

    Raises:
        KeyFileError: It had one there, which is not to be found.
    """
    record = _record(store, client)
    if record is None or not record.exists():
        return
    try:
        known: dict[str, Any] = parse_json_object(read_file(record, limit=_LIMIT))
    except (OSError, ValueError):
        known = {}
    since = shown(known.get("born", "some day"))[1:-1]
    raise KeyFileError(
        f"{store}: client {client!r} had a key in this store (since {since}), but nothing of it is there. "
        f"Is the disk mounted? No new key was made. To start it afresh, remove {record}."
    )


def _record(store: Path, client: str) -> Path | None:
    """Where a birth is noted; None for stores in temporary folders, and where there is no home."""
    place = store.absolute()
    if place.is_relative_to(Path(tempfile.gettempdir()).absolute()):
        return None
    try:
        folder = config_folder() / "stores" / hashlib.sha256(str(place).encode()).hexdigest()[:16]
    except RuntimeError:
        return None
    return folder / f"{client}.json"
