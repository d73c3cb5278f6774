"""What became of a client over the years, a line for each event: for people, and to notice clocks and moves.

``<store>/<client>/journal.jsonl``   one JSON object a line, mode 0600, only ever appended to; no secrets
``<config>/fedkl/machine``           the random id by which lines name this user on this machine
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from fedkl.errors import KeyFileError
from fedkl.files import PRIVATE_FILE, create_once, make_folder, read_file
from fedkl.formats import check_version
from fedkl.parsing import parse_json_object
from fedkl.passphrases import config_folder

JOURNAL = "journal.jsonl"
_VERSION = 1
_LIMIT = 2**24  # of bytes: a line a day for 300 years
_AHEAD = timedelta(days=1)
_LOG = logging.getLogger("fedkl.flower")


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """One line.

    Attributes:
        when: In UTC, to the second.
        what: E.g. born, opened, rotated, restored, rolled back, backed up, moved.
        machine: The id of the user and machine where it happened; empty: unknown.
        saved: How often the lock had been saved, where that says something.
        about: More words; no secrets.
    """

    when: datetime
    what: str
    machine: str
    saved: int | None = None
    about: str = ""

    def line(self) -> bytes:
        """As it is written down."""
        record = {
            "version": _VERSION,
            "when": self.when.isoformat(timespec="seconds"),
            "what": self.what,
            "machine": self.machine,
            "saved": self.saved,
            "about": self.about,
        }
        return (json.dumps(record) + "\n").encode()

    @classmethod
    def of(cls, line: bytes) -> JournalEntry:
        """As it was written down.

        Raises:
            NewerFormatError: A newer fedkl wrote it.
            ValueError: It was cut off, or is damaged.
        """
        values = parse_json_object(line)
        version = values.pop("version", None)
        check_version(version, source=JOURNAL, reads=_VERSION)
        if version != _VERSION or not isinstance(values.get("when"), str):
            raise ValueError("expected a line of this version")
        when = datetime.fromisoformat(values.pop("when"))
        texts = [values.get(name) for name in ("what", "machine", "about")]
        saved = values.get("saved")
        if when.tzinfo is None or not all(isinstance(text, str) for text in texts):
            raise ValueError("expected a time in UTC, and texts")
        if set(values) != {"what", "machine", "saved", "about"} or type(saved) not in (int, type(None)):
            raise ValueError("expected a number of saves, and nothing else")
        return cls(when=when, **values)


class Journal:
    """The journal of one client.

    Args:
        folder: The client's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL

    def read(self) -> tuple[list[JournalEntry], int]:
        """All lines in the order in which they were written, and how many cannot be read.

        A line that was cut off, as the last one by a power failure, does not hide the others.

        Raises:
            KeyFileError: The file cannot be read at all.
            NewerFormatError: A newer fedkl wrote a line.
        """
        return entries_of(self.content())

    def note(self, what: str, *, saved: int | None = None, about: str = "") -> None:
        """Appends a line, on disk when this returns.

        Args:
            what: The event, e.g. ``"rotated"``.
            saved: How often the lock had been saved.
            about: More words; no secrets.

        Raises:
            KeyFileError: It cannot be written.
        """
        entry = JournalEntry(when=_now(), what=what, machine=machine_id(), saved=saved, about=about)
        data = self.content()
        start = b"\n" if data and not data.endswith(b"\n") else b""  # a line that was cut off stays alone
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            make_folder(self.path.parent, mode=0o700)
            with os.fdopen(os.open(self.path, flags, PRIVATE_FILE), "ab") as file:
                _give_to_owner(file.fileno(), self.path.parent)
                file.write(start + entry.line())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise KeyFileError(f"{self.path}: cannot be written ({error.strerror}).") from error

    def try_note(self, what: str, *, saved: int | None = None, about: str = "") -> None:
        """As `note`, but what has happened has happened: a line that cannot be written is a warning."""
        try:
            self.note(what, saved=saved, about=about)
        except KeyFileError as error:
            _LOG.warning("%s It does not say now: %s.", error, what)

    def note_opening(self, *, saved: int | None = None) -> None:
        """Notes a client's first opening of a day, and its first one on another machine, which is logged too.

        A clock that was turned back is logged. So is a journal that cannot be read or written: it keeps no
        client from its lock.
        """
        try:
            entries, _ = self.read()
        except KeyFileError as error:
            _LOG.warning("%s", error)
            return
        problem = clock_problem_of(entries, where=str(self.path))
        if problem:
            _LOG.warning("%s: %s.", self.path.parent, problem)
        here, now = machine_id(), _now()
        before = next((entry for entry in reversed(entries) if entry.machine), None)
        if here and before is not None and before.machine != here:
            _LOG.warning(
                "%s: this machine is %s; up to %s the client was on %s. If that one still runs it, stop one.",
                self.path.parent,
                here,
                before.when.date(),
                before.machine,
            )
            self.try_note("moved", saved=saved, about=f"from {before.machine}")
        known = {entry.when.date() for entry in entries if entry.what in ("born", "opened")}
        if now.date() not in known:
            self.try_note("opened", saved=saved)

    def clock_problem(self) -> str | None:
        """What is wrong with this machine's clock, as far as the journal knows; None: nothing.

        Raises:
            KeyFileError: It cannot be read.
        """
        return clock_problem_of(self.read()[0], where=str(self.path))

    def content(self) -> bytes:
        """All of the file; empty if there is none.

        Raises:
            KeyFileError: It cannot be read.
        """
        try:
            return read_file(self.path, limit=_LIMIT, follow=False)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise KeyFileError(f"{self.path}: cannot be read ({error.strerror}).") from error


def _give_to_owner(handle: int, folder: Path) -> None:
    """Of a command that root runs: the node, who is another user, has to write on."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(handle, owner.st_uid, owner.st_gid)


def entries_of(data: bytes) -> tuple[list[JournalEntry], int]:
    """The lines of a journal's bytes, and how many cannot be read."""
    entries, damaged = [], 0
    for line in data.split(b"\n"):
        try:
            entries += [JournalEntry.of(line)] if line.strip() else []
        except ValueError:
            damaged += 1
    return entries, damaged


def clock_problem_of(entries: Sequence[JournalEntry], *, where: str) -> str | None:
    """What is wrong with this machine's clock, as far as lines know that stand somewhere; None: nothing."""
    now = _now()
    newest = max((entry.when for entry in entries), default=now)
    if newest - now <= _AHEAD:
        return None
    return (
        f"this machine's clock says {now.date()}, but {where} has a line of {newest.date()}. Set the clock. "
        "If it is right now and was wrong then, remove that line from the journal"
    )


def journal_beside(path: Path) -> Journal | None:
    """The journal of the client in whose folder a file lies; None: it lies in no client's folder."""
    return Journal(path.parent) if (path.parent / JOURNAL).is_file() else None


def machine_id() -> str:
    """Names this user on this machine: random, made at the first use; empty where there is no home."""
    try:
        path = config_folder() / "machine"
        if not path.exists():
            create_once(path, secrets.token_hex(8).encode(), mode=PRIVATE_FILE)
        found = read_file(path, limit=64).decode().strip()
    except (OSError, RuntimeError, ValueError):
        return ""
    return found if re.fullmatch("[0-9a-f]{16}", found) else ""


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
