"""Where a node keeps its clients' keys, locks and memories: encrypted, on disk, under stable names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from fedkl.defenses import KeyLock
from fedkl.errors import ConfigError, KeyFileError
from fedkl.files import exclusive, remove_parts
from fedkl.lockfile import default_passphrase
from fedkl.locking import Lock, load_lock, load_memory

STORE, CLIENT, PASSPHRASE_FILE = "fedkl-store", "fedkl-client", "fedkl-passphrase-file"
"""Entries of a SuperNode's ``--node-config``."""

STORE_VARIABLE = "FEDKL_STORE"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class StoredClient:
    """What one client has on this node.

    Attributes:
        name: Its stable name.
        lock: Its lock; `lock.model` is to be trained.
        memory: Tensors that it keeps between rounds besides, by names of its own, e.g. its optimizer's
            moments. As private as the lock; never sent.
    """

    def __init__(self, name: str, *, lock: Lock, memory: dict[str, Tensor]) -> None:
        self.name = name
        self.lock = lock
        self.memory = memory

    def __repr__(self) -> str:
        return f"StoredClient({self.name!r}, lock={self.lock}, memory={sorted(self.memory)})"

    @property
    def model(self) -> nn.Module:
        """The locked model; call and train it as ever."""
        return self.lock.model


class ClientStore:
    """The clients of a node: a folder each, with one encrypted file in it, `lock.fedkl`.

    `fedkl.load_lock` opens such a file too, e.g. to use the trained model on the node.

    Args:
        folder: Where they lie; on a disk of the node that nobody else can read.
        passphrase: Encrypts them.
    """

    def __init__(self, folder: Path, *, passphrase: str) -> None:
        self._folder = folder
        self._passphrase = passphrase

    @classmethod
    def of_node(cls, node_config: Mapping[str, object]) -> ClientStore:
        """The store that a node's own configuration names; nothing of it comes from the server.

        The folder is ``fedkl-store`` of the node's configuration, or `FEDKL_STORE`. The passphrase is what
        the file ``fedkl-passphrase-file`` holds, or `FEDKL_PASSPHRASE`, or a random one of this machine's
        user; see `fedkl.lockfile.default_passphrase`.

        Raises:
            ConfigError: No folder is named, or the passphrase's file cannot be read.
            KeyFileError: There is no passphrase.
        """
        folder = node_config.get(STORE) or os.environ.get(STORE_VARIABLE)
        if not folder:
            raise ConfigError(
                f"This node has no store for its clients' locks. Start it with --node-config "
                f"'{STORE}=\"/a/folder\" …', or set {STORE_VARIABLE}."
            )
        file = node_config.get(PASSPHRASE_FILE)
        passphrase = _read_passphrase(Path(str(file))) if file else default_passphrase()
        return cls(Path(str(folder)).expanduser(), passphrase=passphrase)

    def path(self, name: str) -> Path:
        """Where a client's file is.

        Raises:
            ConfigError: The name cannot be that of a folder.
        """
        if not _NAME.fullmatch(name):
            expected = "letters, digits, '.', '_' and '-', 64 at most, the first no sign"
            raise ConfigError(f"Client name {name!r}: expected {expected}. Set {CLIENT} in --node-config.")
        return self._folder / name / "lock.fedkl"

    @contextmanager
    def client(self, name: str, *, model: nn.Module, defense: KeyLock) -> Iterator[StoredClient]:
        """Opens a client for a while, in this process only; its first time makes its key and lock.

        Args:
            name: Its stable name.
            model: The plain model; not changed.
            defense: How a new lock is made; one that is there keeps the options that it was made with.

        Raises:
            ConfigError: Another process has this client open, or the folder cannot be written.
            KeyFileError: Its file is damaged, of another model, or does not open with this passphrase. It
                is never replaced by a new one.
        """
        path = self.path(name)
        with exclusive(path.parent):
            remove_parts(path.parent)
            if path.exists():
                lock = load_lock(path, model, passphrase=self._passphrase)
                memory = load_memory(path, passphrase=self._passphrase)
                yield StoredClient(name, lock=lock, memory=memory)
            else:
                client = StoredClient(name, lock=defense.prepare(model), memory={})
                self.save(client)
                yield client

    def save(self, client: StoredClient) -> None:
        """Writes what a client has now, atomically.

        Raises:
            KeyFileError: The file cannot be written; the one before stays.
        """
        memory = {name: tensor.detach().clone() for name, tensor in client.memory.items()}
        client.lock.save(self.path(client.name), passphrase=self._passphrase, memory=memory)


def client_name(node_config: Mapping[str, object]) -> str:
    """The stable name of a node's client.

    ``fedkl-client`` of the node's configuration, or else its ``partition-id``, which simulations set.

    Raises:
        ConfigError: There is neither.
    """
    if CLIENT in node_config:
        return str(node_config[CLIENT])
    if "partition-id" in node_config:
        return f"client-{node_config['partition-id']}"
    raise ConfigError(
        f"This node's client has no stable name. Start it with --node-config '{CLIENT}=\"hospital-a\" …'; "
        "its key is found by this name after a restart."
    )


def _read_passphrase(path: Path) -> str:
    try:
        passphrase = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {PASSPHRASE_FILE} cannot be read ({type(error).__name__}).") from error
    if not passphrase:
        raise KeyFileError(f"{path}: {PASSPHRASE_FILE} is empty. Write a passphrase into it.")
    return passphrase
