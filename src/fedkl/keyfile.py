"""A client's key as a file, without a lock: saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedkl import lockfile
from fedkl.errors import KeyFileError, LockError
from fedkl.keys import Key
from fedkl.types import NamedTensors


def save_key(key: Key, path: str | Path, *, passphrase: str | None, replace: bool = True) -> None:
    """Writes a key to a file, mode 0600, atomically.

    Args:
        key: The key.
        path: Where to.
        passphrase: Encrypts the file; None, given explicitly, leaves it unencrypted.
        replace: Whether a file that is there is replaced.

    Raises:
        KeyFileError: The passphrase is empty or is no text, the file cannot be written, or it is there and is
            not to be replaced.
    """
    meta = {"distribution": key.distribution}
    lockfile.write(
        Path(path),
        kind="key",
        meta=meta,
        tensors={"key": key.reveal()},
        passphrase=passphrase,
        replace=replace,
    )


def load_key(path: str | Path, *, passphrase: str | None) -> Key:
    """Reads a key from a file that `save_key` wrote.

    Raises:
        KeyFileError: The file is missing, truncated, altered, foreign, of another kind, or does not open
            with this passphrase.
        NewerFormatError: A newer fedkl wrote it.
    """
    meta, tensors = lockfile.read(Path(path), kind="key", passphrase=passphrase)
    return key_of(Path(path), meta, tensors)


def key_of(path: Path, meta: dict[str, Any], tensors: NamedTensors) -> Key:
    """The key that a file's content holds.

    Raises:
        KeyFileError: It holds none, or not one that could be used.
    """
    try:
        return Key(tensors["key"], distribution=meta["distribution"])
    except (KeyError, LockError) as error:
        raise KeyFileError(f"{path}: holds no usable key. Restore it from a backup.") from error
