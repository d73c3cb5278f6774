"""What a client's folder holds, and what is wrong with it; nothing is changed, and no secret is shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from fedkl import lockfile
from fedkl.custody.journal import JOURNAL, Journal, JournalEntry
from fedkl.custody.ledger import Ledger
from fedkl.custody.member import identity_of, secret_file
from fedkl.custody.store import LOCK, ClientStore, client_folder, is_client_name
from fedkl.errors import ConfigError, FedKLError, MaskingError, printable
from fedkl.files import open_to_others
from fedkl.keyfile import key_of
from fedkl.masking.cards import CARD_DAYS, date_problem
from fedkl.masking.contents import SUFFIX, Content
from fedkl.masking.memory_file import MemoryFile, memory_path

Level = Literal["problem", "note", "fact"]
_LEVELS: tuple[Level, ...] = ("problem", "note", "fact")
_PUBLIC = (".member", ".cohort")
_OURS = (*_PUBLIC, SUFFIX, ".memory", ".update", ".safetensors")
_SHOWN_LINES = 3


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing that was found.

    Attributes:
        client: Whose; empty: of the store.
        level: A problem has to be mended; a note should be read.
        text: A sentence without secrets, in which what came from elsewhere is printable.
    """

    client: str
    level: Level
    text: str


def check_store(store: Path, *, passphrase: str, today: date, client: str | None = None) -> list[Fact]:
    """Looks at all that a store holds, also while its node runs.

    Args:
        store: The folder.
        passphrase: That of the store.
        today: The date, with which days of expiry are compared.
        client: Only this one's folder; None: all.

    Returns:
        What was found, the worst first.

    Raises:
        ConfigError: The store or the client is not there.
    """
    names = _clients(store) if client is None else [client]
    facts: list[Fact] = []
    try:
        ClientStore(store, passphrase=passphrase).check_folder()
    except ConfigError as error:
        facts.append(Fact(client="", level="problem", text=str(error)))
    facts += _left_over(store) if client is None else []
    for name in names:
        folder = client_folder(store, name)
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no client of this name is in the store.")
        found = _Client(folder, passphrase=passphrase, today=today).facts()
        facts += [Fact(client=name, level=level, text=printable(text, limit=None)) for level, text in found]
    return sorted(facts, key=lambda fact: _LEVELS.index(fact.level))


def _clients(store: Path) -> list[str]:
    if not store.is_dir():
        raise ConfigError(f"{store}: no such folder. Is the disk mounted?")
    found = sorted(path.name for path in store.iterdir() if path.is_dir() and is_client_name(path.name))
    if not found:
        raise ConfigError(f"{store}: no client is in this store. Is the disk mounted?")
    return found


def _left_over(store: Path) -> list[Fact]:
    """Folders that are no clients'."""
    facts = []
    for path in sorted(path for path in store.iterdir() if path.is_dir() and not is_client_name(path.name)):
        text = f"{path}: no client's folder."
        if path.name.endswith(".restoring"):
            text = f"{path}: left by a restore that was killed, with a client's secrets in it. Remove it."
        facts.append(Fact(client="", level="note", text=printable(text, limit=None)))
    return facts


Found = Iterator[tuple[Level, str]]


class _Client:
    def __init__(self, folder: Path, *, passphrase: str, today: date) -> None:
        self._folder, self._passphrase, self._today = folder, passphrase, today
        self._ledger: Ledger | None = None

    def facts(self) -> Found:
        for part in (self._permissions, self._lock, self._member, self._journal, self._others):
            try:
                yield from part()
            except FedKLError as error:
                yield "problem", str(error)
            except OSError as error:
                yield "problem", f"{error.filename or self._folder}: cannot be read ({error.strerror})."

    def _permissions(self) -> Found:
        if self._folder.is_symlink():
            yield "problem", f"{self._folder}: a symbolic link. Put the folder itself there."
        for path in (self._folder, *sorted(self._folder.iterdir())):
            private = path.suffix not in _PUBLIC and not path.is_symlink()
            if private and open_to_others(path, permissions=0o077):
                yield "problem", f"{path}: open to others. Run chmod go= on it."

    def _lock(self) -> Found:
        path = self._folder / LOCK
        self._ledger = Ledger.read(self._folder)
        if not os.path.lexists(path):
            if self._ledger is not None:
                yield "problem", f"{path}: gone. This client had a lock here; restore it from a backup."
            else:
                yield "note", f"{path}: this client has no lock yet."
            return
        meta, tensors = lockfile.read(path, kind="lock", passphrase=self._passphrase)
        key, about = key_of(path, meta, tensors), meta.get("about", {})
        yield "fact", f"{LOCK}: opens; key of {key.length} numbers, {key.distribution}."
        model, version = str(meta.get("structure"))[:12], lockfile.version_of(path)
        yield "fact", f"{LOCK}: model {model}, saved {about.get('saved', '?')} times, file version {version}."
        if about.get("client", self._folder.name) != self._folder.name:
            yield "problem", f"{path}: the lock of another client, {about['client']}."
        if self._ledger is None:
            yield "note", f"{self._folder}: no ledger.json yet: an older lock would not be noticed."
        else:
            self._ledger.check(self._folder, about)
            yield "fact", f"ledger.json: fits the lock; born {self._ledger.born}."

    def _member(self) -> Found:
        path = secret_file(self._folder)
        if path is None:
            if self._ledger and self._ledger.member:
                yield "problem", f"{self._folder}: its member's file is gone. Restore it from a backup."
            return
        content = Content.read(path, passphrase=self._passphrase)
        keys = content.keys
        yield "fact", f"{path.name}: opens; member {keys.name}, file version {lockfile.version_of(path)}."
        if self._ledger and self._ledger.member not in (None, identity_of(keys)):
            yield "problem", f"{path}: not the member that this client has had. Put that one back."
        yield self._until(f"card of {keys.name}", keys.expires, days=CARD_DAYS)
        memory = MemoryFile(
            memory_path(path),
            key=content.memory_key,
            restored=content.restored,
        )
        for name, joined in content.cohorts.items():
            roster = joined.membership.roster
            whom = f"cohort {name}, epoch {roster.epoch}, {len(roster.cards)} members"
            expires = min(roster.expires, *(card.expires for card in roster.cards))
            yield self._until(whom, expires, days=CARD_DAYS)
            try:
                memory.last(name, roster=roster.digest.hex(), saved=joined.saved)
            except MaskingError as error:
                yield "problem", str(error)

    def _until(self, what: str, expires: date, *, days: int) -> tuple[Level, str]:
        problem = date_problem(expires, today=self._today, days=days)
        if problem:
            return "problem", f"{what}: {problem}."
        return "fact", f"{what}: good until {expires}, {(expires - self._today).days} days left."

    def _journal(self) -> Found:
        journal = Journal(self._folder)
        problem = journal.clock_problem()
        if problem:
            yield "problem", f"{problem}."
        entries, damaged = journal.read()
        if damaged:
            yield "note", f"{journal.path}: {damaged} of its lines cannot be read."
        backups = [entry.when.date() for entry in entries if entry.what == "backed up"]
        if backups:
            yield "fact", f"last backup: {max(backups)}."
        else:
            yield "note", f"never backed up. Run fedkl store backup {self._folder.parent} --client …"
        for entry in entries[-_SHOWN_LINES:]:
            yield "fact", f"{JOURNAL}: {_told(entry)}"

    def _others(self) -> Found:
        for path in sorted(self._folder.iterdir()):
            if ".old-" in path.name:
                yield (
                    "note",
                    f"{path}: an old copy, with what it held then. Remove it when nobody needs it.",
                )
            elif path.name.endswith(".part"):
                yield "note", f"{path}: left by a write that was killed, or of one that runs."
            elif path.suffix not in _OURS and path.name not in (LOCK, "ledger.json", JOURNAL):
                if not path.name.startswith("."):
                    yield "note", f"{path}: none of fedkl's files."


def _told(entry: JournalEntry) -> str:
    saved = "" if entry.saved is None else f", saved {entry.saved} times"
    about = f" ({entry.about})" if entry.about else ""
    machine = entry.machine or "unknown"
    return f"{entry.when:%Y-%m-%d %H:%M} UTC {entry.what}{about}{saved}, machine {machine}."
