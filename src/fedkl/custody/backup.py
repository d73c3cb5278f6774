"""A client in one encrypted file, with a passphrase of its own, and back.

It holds the lock (with key, private statistics and memory such as optimizer moments), ledger, journal and the
member's secret file. It does not hold the member's memory of its cohorts and its last update: with an old
memory a mask could be used twice. The clients's own passphrase may be a machine's, which would die with it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fedkl import lockfile
from fedkl.custody.journal import JOURNAL, Journal, clock_problem_of, entries_of
from fedkl.custody.ledger import Ledger, now, remember_birth
from fedkl.custody.member import identity_of, secret_file
from fedkl.custody.store import LOCK, ClientStore, client_folder
from fedkl.errors import ConfigError, FedKLError, KeyFileError
from fedkl.files import PRIVATE_FILE, PRIVATE_FOLDER, make_folder, rename_new, write_atomically
from fedkl.formats import check_version
from fedkl.keyfile import key_of
from fedkl.locking.options import LockOptions
from fedkl.masking.contents import SUFFIX, Content
from fedkl.types import NamedTensors, under

_VERSION = 1
_FIELDS = {"version", "client", "made", "ledger", "journal", "lock", "member"}
_LOCK, _MEMBER = "lock/", "member/"
Part = tuple[dict[str, Any], NamedTensors]
"""What one encrypted file holds: metadata and tensors."""


@dataclass(frozen=True, kw_only=True)
class Backup:
    """What a backup holds, verified.

    Attributes:
        client: The client's name.
        made: When, UTC.
        ledger: Its ledger; None: it had none.
        journal: Its journal's bytes.
        lock: Content of its lock file; None: it had none.
        member: Content of its member's secret file; None: it had none.
    """

    client: str
    made: str
    ledger: Ledger | None
    journal: bytes = field(repr=False)
    lock: Part | None = field(repr=False)
    member: Content | None = field(repr=False)

    @property
    def saved(self) -> int | None:
        """How often the lock had been saved; None: there is no lock."""
        return None if self.lock is None else self.lock[0].get("about", {}).get("saved", 0)


def write_backup(store: Path, client: str, *, out: Path, passphrase: str, backup_passphrase: str) -> None:
    """Writes a client's backup, reads it back and compares it; also while its node runs.

    Args:
        store: The store.
        client: The client.
        out: The new file; one that is there is never replaced.
        passphrase: That of the store.
        backup_passphrase: Of the backup.

    Raises:
        ConfigError: There is no such client, or nothing of it.
        KeyFileError: Something does not open or is damaged, the backup cannot be written, is there already,
            or is not what was written. There is then no backup.
    """
    folder = client_folder(store, client)
    meta, tensors = _collected(folder, passphrase=passphrase)
    lockfile.write(
        out, kind="backup", meta=meta, tensors=tensors, passphrase=backup_passphrase, replace=False
    )
    try:
        again, found = lockfile.read(out, kind="backup", passphrase=backup_passphrase)
        same = again == meta and found.keys() == tensors.keys()
        if not same or any(not torch.equal(found[name], tensors[name]) for name in tensors):
            raise KeyFileError(f"{out}: does not hold what was written. Is the disk sound?")
        read_backup(out, passphrase=backup_passphrase)
    except FedKLError:
        out.unlink(missing_ok=True)
        raise
    Journal(folder).try_note("backed up", saved=meta["lock"] and meta["lock"].get("about", {}).get("saved"))


def _collected(folder: Path, *, passphrase: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All that a backup holds. The ledger is read first: a lock may be ahead of it, and not behind."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no client of this name is in the store.")
    ledger = Ledger.read(folder)
    meta: dict[str, Any] = {
        "version": _VERSION,
        "client": folder.name,
        "made": now(),
        "ledger": None if ledger is None else ledger.values(),
        "journal": Journal(folder).content().decode(errors="backslashreplace"),
        "lock": None,
        "member": None,
    }
    tensors: dict[str, torch.Tensor] = {}
    if os.path.lexists(folder / LOCK):
        meta["lock"], found = lockfile.read(folder / LOCK, kind="lock", passphrase=passphrase)
        tensors |= {_LOCK + name: tensor for name, tensor in found.items()}
        if ledger is not None:
            ledger.check(folder, meta["lock"].get("about", {}))
    elif ledger is not None:
        raise KeyFileError(
            f"{folder / LOCK}: gone: a backup without it is none. Restore it from an older one."
        )
    secret = secret_file(folder)
    if secret is not None:
        meta["member"], found = lockfile.read(secret, kind="member", passphrase=passphrase)
        tensors |= {_MEMBER + name: tensor for name, tensor in found.items()}
    elif ledger is not None and ledger.member is not None:
        raise KeyFileError(
            f"{folder}: its member's secret file is gone: a backup without it is none. Restore it from an "
            "older one."
        )
    if not tensors:
        raise ConfigError(f"{folder}: neither a lock nor a member's secret file is here.")
    return meta, tensors


def read_backup(path: Path, *, passphrase: str) -> Backup:
    """Reads a backup and verifies each part of it.

    Raises:
        KeyFileError: It does not open, is damaged, of another version, or a part of it could not be used.
    """
    meta, tensors = lockfile.read(path, kind="backup", passphrase=passphrase)
    check_version(meta.get("version"), source=path, reads=_VERSION)
    try:
        if meta.get("version") != _VERSION:
            raise KeyFileError(
                f"{path}: a backup of version {meta.get('version')!s:.20}, expected {_VERSION}. Use the "
                "fedkl that wrote it."
            )
        if set(meta) != _FIELDS or not all(type(meta[name]) is str for name in ("client", "made", "journal")):
            raise ValueError
        lock = _part(meta["lock"], tensors, _LOCK)
        if lock is not None:
            key_of(path, *lock)
            LockOptions.from_file(lock[0]["options"])
            if type(lock[0].get("about", {}).get("saved", 0)) is not int:
                raise TypeError
        member = _part(meta["member"], tensors, _MEMBER)
        return Backup(
            client=meta["client"],
            made=meta["made"],
            ledger=None if meta["ledger"] is None else Ledger.of(meta["ledger"], source=path),
            journal=meta["journal"].encode(),
            lock=lock,
            member=None if member is None else Content.of(path, *member),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KeyFileError(f"{path}: holds no backup that can be used.") from error


def _part(meta: Any, tensors: NamedTensors, prefix: str) -> Part | None:
    if meta is None:
        return None
    if type(meta) is not dict:
        raise TypeError
    return meta, under(tensors, prefix)


def restore(backup: Backup, store: Path, *, client: str, passphrase: str, today: date) -> Path:
    """Puts a client into a store: all of it, or nothing.

    Its member opens sums, but takes no part in a cohort until that is changed: what it has sent since the
    backup is not known here; see `Content.as_restored`.

    Args:
        backup: What is restored.
        store: The store.
        client: The client's name there.
        passphrase: That of the store on this machine.
        today: The date.

    Returns:
        The client's folder.

    Raises:
        ConfigError: The client has something here already, its member is another client's here, everybody
            may write to the store, or the clock is behind the backup.
        KeyFileError: Something cannot be written.
    """
    folder = client_folder(store, client)
    _check_free(folder)
    problem = clock_problem_of(entries_of(backup.journal)[0], where="the backup")
    if problem is None and today.isoformat() < backup.made[:10]:
        problem = (
            f"this machine's clock says {today}, but the backup was made on {backup.made[:10]}. Set the clock"
        )
    if problem:
        raise ConfigError(f"{folder}: nothing was restored: {problem}.")
    _check_no_twin(backup, store)
    ClientStore(store, passphrase=passphrase).check_folder()
    try:
        make_folder(store, mode=PRIVATE_FOLDER)
        built = Path(tempfile.mkdtemp(prefix=f".{client}.", suffix=".restoring", dir=store))
        try:
            _build(backup, built, client=client, passphrase=passphrase, today=today)
            rename_new(built, folder)
        finally:
            shutil.rmtree(built, ignore_errors=True)
    except OSError as error:
        raise KeyFileError(
            f"{folder}: cannot be written ({error.strerror}). Nothing was restored."
        ) from error
    if backup.lock is not None:
        remember_birth(store, client)
    return folder


def _check_no_twin(backup: Backup, store: Path) -> None:
    """Checks that the member has no other client in the store: two memories would use a mask twice.

    Raises:
        ConfigError: It has.
    """
    identity = backup.ledger.member if backup.ledger else None
    if identity is None and backup.member is not None:
        identity = identity_of(backup.member.keys)
    secret = None if backup.member is None else f"{backup.member.keys.name}{SUFFIX}"
    for folder in sorted(store.iterdir()) if identity is not None and store.is_dir() else ():
        ledger = Ledger.read(folder) if folder.is_dir() else None
        known = ledger.member if ledger else None
        # Without a lock no ledger says whose the secret file is; then its name has to do.
        nameless = known is None and secret is not None and os.path.lexists(folder / secret)
        if nameless or known == identity:
            raise ConfigError(
                f"{folder}: has the member of this backup. Nothing was restored: two clients of one member "
                "would use a mask twice. Move that folder out of the store first, or make a new member."
            )


def _build(backup: Backup, folder: Path, *, client: str, passphrase: str, today: date) -> None:
    """Writes all files of a client into an empty folder."""
    identity = backup.ledger.member if backup.ledger else None
    if backup.member is not None:
        member = backup.member.as_restored(today)
        path = folder / f"{member.keys.name}{SUFFIX}"
        member.write(path, passphrase=passphrase, salt=os.urandom(16), replace=False)
        identity = identity or identity_of(member.keys)
    if backup.lock is not None:
        meta, tensors = backup.lock
        saved = backup.saved or 0
        meta = {**meta, "about": {**meta.get("about", {}), "client": client, "saved": saved}}
        lockfile.write(folder / LOCK, kind="lock", meta=meta, tensors=tensors, passphrase=passphrase)
        born = backup.ledger.born if backup.ledger else backup.made
        Ledger(client=client, born=born, saved=saved, member=identity).write(folder)
    write_atomically(folder / JOURNAL, backup.journal, mode=PRIVATE_FILE)
    about = f"backup of {backup.made}" + ("" if client == backup.client else f", of client {backup.client}")
    Journal(folder).note("restored", saved=backup.saved, about=about)


def _check_free(folder: Path) -> None:
    """Checks that nothing of a client would be replaced.

    Raises:
        ConfigError: There is something.
    """
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 (names)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be looked into ({error.strerror}). Nothing was restored."
        ) from error
    if names:
        what = "a lock" if LOCK in names else ", ".join(names[:5])
        place, away = shlex.quote(str(folder)), shlex.quote(f"{folder.parent}.before-restore")
        raise ConfigError(
            f"{folder}: this client has {what} here, and nothing was restored. See what it is: fedkl "
            f"store check {shlex.quote(str(folder.parent))} --client {folder.name}. To restore all the same, "
            f"stop its node and move the folder out of the store: mv {place} {away}"
        )
