"""What `Lock.save` wrote, read: a client's lock and what lies beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedkl import lockfile
from fedkl.errors import KeyFileError, LockError, UpdateError
from fedkl.keyfile import key_of
from fedkl.locking import surgery
from fedkl.locking.copying import copied
from fedkl.locking.keylock import Lock
from fedkl.locking.making import check_model, install
from fedkl.locking.options import LockOptions
from fedkl.modelfile import read_model
from fedkl.types import NamedTensors, under
from fedkl.update import check_tensors


@dataclass(frozen=True, kw_only=True, repr=False)
class SavedLock:
    """What a lock file holds.

    Attributes:
        lock: The lock, on a copy of the model.
        memory: What `Lock.save` was given as `memory`; empty if nothing.
        about: What it was given as `about`; empty if nothing, as in files of earlier versions.
    """

    lock: Lock
    memory: dict[str, Tensor]
    about: dict[str, str | int]


def load_lock(
    path: str | Path,
    model: nn.Module,
    *,
    passphrase: str | None,
    public: str | Path | NamedTensors | None = None,
) -> Lock:
    """Locks a copy of a plain model with the key and private state of a file that `Lock.save` wrote.

    **A lock file holds the private tensors only.** With the public ones of the training beside it, the result
    is the client's trained model; without, it is its lock on whatever the model holds.

    Args:
        path: The file.
        model: A plain model of the structure that was locked.
        passphrase: As given to `save`; None for an unencrypted file.
        public: The public tensors by name, or a safetensors file of them; see `fedkl.modelfile`. None: those
            of `model` are used as they are.

    Raises:
        KeyFileError: The file is missing, truncated, altered, foreign, of another kind, does not open with
            this passphrase, or belongs to another model.
        LockError: The model is locked already.
        ConfigError: The file of public tensors cannot be read, or is another one.
        UpdateError: Public tensors are missing, unexpected, wrongly shaped or typed, or non-finite.

    >>> import tempfile
    >>> from fedkl import lock
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> trained = lock(net)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trained.save(f"{folder}/client.lock", passphrase="horse")
    ...     public = trained.public_state()
    ...     again = load_lock(f"{folder}/client.lock", net, passphrase="horse", public=public)
    """
    loaded = read_lock(path, model, passphrase=passphrase).lock
    if public is not None:
        _put_public(loaded, public)
    return loaded


def _put_public(loaded: Lock, public: str | Path | NamedTensors) -> None:
    """Puts the public tensors of a training into a lock that was loaded."""
    if isinstance(public, str | Path):
        place, tensors = str(public), read_model(public)
    elif isinstance(public, Mapping):
        place, tensors = "public", dict(public)
    else:
        raise LockError(
            f"load_lock: public= must be tensors by name, or a file, got {type(public).__name__}."
        )
    check_tensors(
        tensors,
        loaded.schema("weights").specs,
        subject=f"{place}: not the public tensors of this lock's {type(loaded.model).__name__}.",
        remedy="Give those of the training that the lock is of, all of them and no others.",
    )
    loaded.load_public_state(tensors)


def read_lock(path: str | Path, model: nn.Module, *, passphrase: str | None) -> SavedLock:
    """All that a lock file holds, read once; see `load_lock` for arguments and errors."""
    check_model(model)
    meta, tensors = lockfile.read(Path(path), kind="lock", passphrase=passphrase)
    key = key_of(Path(path), meta, tensors)
    foreign = KeyFileError(
        f"{path}: this lock belongs to another model: names or shapes of the public tensors differ. "
        f"Load it into a {type(model).__name__} built exactly as when it was saved."
    )
    try:
        options = LockOptions.from_file(meta["options"])
        about = _about(meta.get("about", {}))
    except (KeyError, TypeError, ValueError, AttributeError, LockError) as error:
        raise KeyFileError(
            f"{path}: unknown options, not such as fedkl writes. Restore it from a backup."
        ) from error
    private = under(tensors, "private/")
    if any(math.prod(shape) > sum(t.numel() for t in private.values()) for shape in options.shapes):
        raise foreign  # before tensors of that size are made
    try:
        plain = copied(model, subject="load_lock")
        loaded = install(plain, key=key, options=options, chosen=options.targets(plain))
        if loaded._structure() != meta.get("structure"):
            raise foreign
        loaded.load_private_state(private)
        surgery.start_at(loaded.model, under(tensors, "start/"))
    except (LockError, UpdateError) as error:
        raise foreign from error
    return SavedLock(lock=loaded, memory=under(tensors, "memory/"), about=about)


def _about(values: dict[str, Any]) -> dict[str, str | int]:
    if not all(type(value) in (str, int) for value in values.values()):
        raise TypeError
    return dict(values)


def load_memory(path: str | Path, *, passphrase: str | None) -> dict[str, Tensor]:
    """What `Lock.save` was given as `memory`; empty if nothing.

    Raises:
        KeyFileError: The file is missing, damaged, foreign, or does not open with this passphrase.
    """
    return under(lockfile.read(Path(path), kind="lock", passphrase=passphrase)[1], "memory/")
