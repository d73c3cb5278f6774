"""Where a node keeps its clients' keys, locks and memories: encrypted, on disk, under stable names."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from fedkl.custody.journal import Journal
from fedkl.custody.ledger import Ledger, check_never_born, now, remember_birth
from fedkl.defenses import KeyLock
from fedkl.errors import ConfigError, KeyFileError, TrainingError, shown
from fedkl.files import PRIVATE_FOLDER, exclusive, open_to_others, remove_parts
from fedkl.lockfile import keep_copy
from fedkl.locking import Lock, read_lock, recalibrate_norms_
from fedkl.norms import BATCH_STATISTICS
from fedkl.types import Images

CLIENT, NEW_KEYS = "fedkl-client", "fedkl-new-keys"
"""Entries of a Flower SuperNode's ``--node-config``; errors name them."""

LOCK = "lock.fedkl"
_ROLLED_BACK = "rolled back"

_LOG = logging.getLogger("fedkl.flower")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
_DEVICES = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE
)  # no file may be called so on Windows


class StoredClient:
    """What one client has on this node.

    Attributes:
        name: Its stable name.
        lock: Its lock; `lock.model` is to be trained.
        memory: Tensors that it keeps between rounds besides, by names of its own, e.g. its optimizer's
            moments. As private as the lock; never sent.
        ledger: What the store remembers of it.
        statistics: The norm statistics that `recalibrate_norms_` counted, by name; empty: it was not called.
    """

    def __init__(self, name: str, *, lock: Lock, memory: dict[str, Tensor], ledger: Ledger) -> None:
        self.name = name
        self.lock = lock
        self.memory = memory
        self.ledger = ledger
        self.statistics: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"StoredClient({self.name!r}, lock={self.lock}, memory={sorted(self.memory)})"

    @property
    def model(self) -> nn.Module:
        """The locked model; call and train it as ever."""
        return self.lock.model

    def recalibrate_norms_(self, images: Images) -> bool:
        """Makes the norms' private running statistics those of the model that came, before it is used.

        See `fedkl.locking.recalibrate_norms_`. On Flower they are stored afterwards, of an evaluation too:
        they, and nothing else that an evaluation changes.

        Args:
            images: The client's own training images, in [0, 1]. No label is needed.

        Returns:
            Whether it did. With fewer than two images, or where they would not be finite, statistics stay as
            they were, as in `fedkl train`.
        """
        if len(images) < 2:
            return False
        try:
            recalibrate_norms_(self.lock, images)
        except TrainingError:
            return False
        state = self.lock.private_state()
        counted = [name for name in state if name.rpartition(".")[2] in BATCH_STATISTICS]
        self.statistics = {name: state[name] for name in counted}
        return True


class ClientStore:
    """The clients of a node: a folder each, mode 0700, with one encrypted file in it, `lock.fedkl`.

    `fedkl.load_lock` opens such a file too, e.g. to use the trained model on the node. Beside it lie
    `ledger.json`, by which a lock that was lost, swapped with another client's or rolled back is noticed
    (such a client gets no new key and no old one, but an error), and `journal.jsonl`, which says when keys
    were born, opened, rolled back and so on. The secret file of a masked federation's member may lie there
    too.

    Args:
        folder: Where they lie; on a disk of the node that nobody else can read.
        passphrase: Encrypts them.
        new_keys: Whether a client that was never here gets a key; False where all have theirs.
    """

    def __init__(self, folder: Path, *, passphrase: str, new_keys: bool = True) -> None:
        self._folder = folder
        self._passphrase = passphrase
        self._new_keys = new_keys

    def path(self, name: str) -> Path:
        """Where a client's file is.

        Raises:
            ConfigError: The name cannot be that of a folder.
        """
        return client_folder(self._folder, name) / LOCK

    @contextmanager
    def client(self, name: str, *, model: nn.Module, defense: KeyLock) -> Iterator[StoredClient]:
        """Opens a client for a while, in this process only; its first time makes its key and lock.

        Args:
            name: Its stable name.
            model: The plain model; not changed.
            defense: How a new lock is made; one that is there keeps the options that it was made with.

        Raises:
            ConfigError: Another process has this client open, or the folder cannot be written, is a link, or
                is open to others.
            KeyFileError: Its file is damaged, of another model or client, an older one, or does not open with
                this passphrase, or it had one that is not there. It never gets a new key instead.
        """
        path = self.path(name)
        if not os.path.lexists(path):
            self._check_birth(name)  # before anything is made: a new folder would hide a missing mount
        self.check_folder()
        with exclusive(path.parent, mode=PRIVATE_FOLDER, follow=False):
            _close(path.parent)
            remove_parts(path.parent)
            yield self._opened(name, model) if os.path.lexists(path) else self._born(name, model, defense)

    def check_new(self, name: str) -> None:
        """Checks that a client may be given a lock here: it has none, and never had one.

        Raises:
            KeyFileError: It has one, or had one, or no new keys are made here.
            ConfigError: The name cannot be that of a folder, or is another client's but for its capitals.
        """
        path = self.path(name)
        if os.path.lexists(path):
            raise KeyFileError(
                f"{path}: client {name!r} has a lock here, which is never replaced. Choose another name, or "
                "give it a new key."
            )
        self._check_birth(name)

    def add(self, name: str, lock: Lock) -> None:
        """Takes in the lock of a client that was never here, e.g. of one that was enrolled.

        Raises:
            ConfigError: See `client` and `check_new`.
            KeyFileError: See `check_new`; or the file cannot be written.
        """
        self.check_new(name)
        self.check_folder()
        folder = self.path(name).parent
        with exclusive(folder, mode=PRIVATE_FOLDER, follow=False):
            _close(folder)
            remove_parts(folder)
            self.check_new(name)  # another process may have been faster
            self._taken_in(name, lock)

    def rotate(self, client: StoredClient, lock: Lock) -> Path:
        """Gives a client another lock, and keeps the file of the old one beside it.

        What it remembered is forgotten: the moments of a lock layer hold its key, up to a factor.

        Args:
            client: As `client` has opened it.
            lock: The new one.

        Returns:
            The old one's file.

        Raises:
            KeyFileError: A file cannot be written; the old lock stays.
        """
        new = StoredClient(client.name, lock=lock, memory={}, ledger=client.ledger)
        copy = keep_copy(self.path(client.name))
        self.save(new)
        client.lock, client.memory, client.ledger = new.lock, new.memory, new.ledger
        Journal(copy.parent).try_note("rotated", saved=new.ledger.saved)
        return copy

    def save(self, client: StoredClient) -> None:
        """Writes what a client has now, atomically.

        Raises:
            KeyFileError: The file cannot be written; the one before stays.
        """
        path = self.path(client.name)
        ledger = replace(client.ledger, saved=client.ledger.saved + 1)
        memory = {name: tensor.detach().clone() for name, tensor in client.memory.items()}
        about: dict[str, str | int] = {"client": ledger.client, "saved": ledger.saved}
        client.lock.save(path, passphrase=self._passphrase, memory=memory, about=about)
        try:
            ledger.write(path.parent)  # after the lock: one that is ahead of its ledger is no older one
        except OSError as error:
            raise KeyFileError(f"{path.parent}: cannot be written ({error.strerror}).") from error
        client.ledger = ledger

    def _opened(self, name: str, model: nn.Module) -> StoredClient:
        path = self.path(name)
        if path.is_symlink():
            raise KeyFileError(f"{path}: expected a file, got a symbolic link. Put the file itself there.")
        saved = read_lock(path, model, passphrase=self._passphrase)
        owner = saved.about.get("client", name)  # files of earlier versions do not say
        if owner != name:
            raise KeyFileError(
                f"{path}: the lock of client {shown(owner)}, not of {name!r}. Restore {name}'s from a backup."
            )
        count = saved.about.get("saved")
        count = count if isinstance(count, int) else 0
        ledger = Ledger.read(path.parent)
        if ledger is not None:
            _check(ledger, path.parent, saved.about, count=count)
        found = replace(ledger or Ledger(client=name, born=now(), saved=count), saved=count)
        if ledger is None and "client" in saved.about:
            _note_missing_ledger(path.parent, found)
        Journal(path.parent).note_opening(saved=count)
        return StoredClient(name, lock=saved.lock, memory=saved.memory, ledger=found)

    def _born(self, name: str, model: nn.Module, defense: KeyLock) -> StoredClient:
        self._check_birth(name)
        return self._taken_in(name, defense.prepare(model))

    def _taken_in(self, name: str, lock: Lock) -> StoredClient:
        """Writes down a client whose key is new."""
        ledger = Ledger(client=name, born=now(), saved=0)
        client = StoredClient(name, lock=lock, memory={}, ledger=ledger)
        self.save(client)
        remember_birth(self._folder, name)
        Journal(self.path(name).parent).try_note("born", saved=client.ledger.saved)
        _LOG.warning(
            "Client %s has a new key, in %s. If it has trained before, stop: this is not its store.",
            name,
            self.path(name).parent,
        )
        return client

    def _check_birth(self, name: str) -> None:
        """Checks that a client without a lock never had one.

        Raises:
            KeyFileError: It had one, or no new keys are made here.
            ConfigError: Another client's name differs in its capitals only.
        """
        folder = self.path(name).parent
        if Ledger.read(folder) is not None:
            raise KeyFileError(
                f"{folder}: client {name!r} had a lock here, but lock.fedkl is gone. Restore it from a "
                "backup. No new key was made; to start this client afresh, remove the folder."
            )
        if any(entry.saved for entry in Journal(folder).read()[0]):
            raise KeyFileError(
                f"{folder}: client {name!r} had a lock here, as its journal says, but its files are "
                "gone. Restore it from a backup. No new key was made; to start this client afresh, remove "
                "the folder."
            )
        check_never_born(self._folder, name)
        if not self._new_keys:
            raise KeyFileError(
                f"{folder}: client {name!r} has no key here, and {NEW_KEYS} is false. Is the disk mounted? "
                f"To give it one, start its node once without {NEW_KEYS}."
            )
        for other in os.listdir(self._folder) if self._folder.is_dir() else ():  # noqa: PTH208 (names)
            if other != name and other.casefold() == name.casefold():
                raise ConfigError(
                    f"Client name {name!r}: {other!r} is there, and some disks take them for the same. "
                    "Choose a name that differs in more than capitals."
                )

    def check_folder(self) -> None:
        """Checks that nobody else can exchange the clients' folders.

        Raises:
            ConfigError: Everybody can, or the folder cannot be read.
        """
        try:
            foreign = self._folder.is_dir() and open_to_others(self._folder, permissions=0o002)
        except OSError as error:
            raise ConfigError(f"{self._folder}: cannot be read ({error.strerror}).") from error
        if foreign:
            raise ConfigError(f"{self._folder}: everybody may write to this store. Run chmod go-w on it.")


def is_client_name(name: str) -> bool:
    """Whether a client can be called so: any disk can have a folder of this name."""
    return bool(_NAME.fullmatch(name)) and not _DEVICES.fullmatch(name)


def client_folder(store: Path, name: str) -> Path:
    """Where a client's files are in a store.

    Raises:
        ConfigError: The name cannot be that of a folder.
    """
    if not is_client_name(name):
        expected = "letters, digits, '.', '_' and '-', 64 at most, the first no sign, the last no dot"
        raise ConfigError(f"Client name {shown(name)}: expected {expected}. Set {CLIENT} in --node-config.")
    return store / name


def _check(ledger: Ledger, folder: Path, about: Mapping[str, str | int], *, count: int) -> None:
    """Checks a lock against its ledger; an older one stands in the journal, once.

    Raises:
        KeyFileError: It is not the last one that was saved here.
    """
    try:
        ledger.check(folder, about)
    except KeyFileError:
        journal = Journal(folder)
        entries, _ = journal.read()
        noted = any((entry.what, entry.saved) == (_ROLLED_BACK, count) for entry in entries[-1:])
        if count < ledger.saved and not noted:
            journal.try_note(_ROLLED_BACK, saved=count, about=f"refused: it was saved {ledger.saved} times")
        raise


def _note_missing_ledger(folder: Path, found: Ledger) -> None:
    """Writes a ledger where there is none; if the journal knows a later lock, somebody has removed it."""
    journal = Journal(folder)
    entries, _ = journal.read()
    known = 0
    for entry in entries:
        on_purpose = entry.what == "restored" or entry.about.startswith("accepted")
        known = entry.saved or 0 if on_purpose else max(known, entry.saved or 0)
    refused = any(entry.about.startswith("refused") for entry in entries[-1:])
    if known > found.saved or refused:
        _LOG.warning("%s: an older lock is in use: its ledger had been removed.", folder)
        journal.try_note(_ROLLED_BACK, saved=found.saved, about="accepted: its ledger had been removed")
    elif entries:
        _LOG.warning("%s: its ledger was missing, and is made anew.", folder)
        journal.try_note("ledger made anew", saved=found.saved, about="it was missing")
    found.write(folder)


def _close(folder: Path) -> None:
    """Takes all permissions of others from a client's folder; earlier versions left some."""
    if open_to_others(folder, permissions=0o077):
        try:
            folder.chmod(PRIVATE_FOLDER)
        except OSError as error:
            raise ConfigError(
                f"{folder}: open to others, and not ours to close ({error.strerror})."
            ) from error
