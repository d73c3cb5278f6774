"""What a SuperNode's own configuration says: where its clients are kept, who its client is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedkl.coredumps import forbid_core_dumps
from fedkl.custody import ClientStore
from fedkl.custody.store import CLIENT, NEW_KEYS
from fedkl.errors import ConfigError, shown
from fedkl.passphrases import default_passphrase, read_passphrase

STORE, PASSPHRASE_FILE = "fedkl-store", "fedkl-passphrase-file"
"""Entries of a SuperNode's ``--node-config``."""

STORE_VARIABLE = "FEDKL_STORE"


def node_store(node_config: Mapping[str, object]) -> ClientStore:
    """The store that a node's own configuration names; nothing of it comes from the server.

    The folder is ``fedkl-store`` of the node's configuration, or `FEDKL_STORE`. The passphrase is what
    the file ``fedkl-passphrase-file`` holds, or `FEDKL_PASSPHRASE`, or a random one of this machine's
    user; see `fedkl.lockfile.default_passphrase`. ``fedkl-new-keys=false`` keeps new keys from being
    made.

    Raises:
        ConfigError: No folder is named, or ``fedkl-new-keys`` is neither true nor false.
        KeyFileError: There is no passphrase, or its file cannot be read, or others may write to it.
    """
    folder = store_folder(node_config)
    if folder is None:
        raise ConfigError(
            f"This node has no store for its clients' locks. Start it with --node-config "
            f"'{STORE}=\"/a/folder\" …', or set {STORE_VARIABLE}."
        )
    new_keys = node_config.get(NEW_KEYS, True)
    if not isinstance(new_keys, bool):
        raise ConfigError(f"{NEW_KEYS}: expected true or false in --node-config, got {shown(new_keys)}.")
    passphrase = node_passphrase(node_config)
    return ClientStore(folder, passphrase=passphrase, new_keys=new_keys)


def store_folder(node_config: Mapping[str, object]) -> Path | None:
    """Where a node keeps its clients; None: it names no store."""
    folder = node_config.get(STORE) or os.environ.get(STORE_VARIABLE)
    return Path(str(folder)).expanduser() if folder else None


def node_passphrase(node_config: Mapping[str, object]) -> str:
    """The passphrase of a node's private files; see `node_store`. From here on, no crash leaves a core file.

    Raises:
        KeyFileError: There is none, or its file cannot be read, or others may write to it.
    """
    forbid_core_dumps()
    file = node_config.get(PASSPHRASE_FILE)
    return read_passphrase(Path(str(file)).expanduser()) if file else default_passphrase()


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
