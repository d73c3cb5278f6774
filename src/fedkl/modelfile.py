"""Model files: the public tensors of a trained model, as one safetensors file that any program can read.

Metadata: ``format`` is ``fedkl-model-1``, ``kind`` is ``public``, ``rounds`` is how many rounds of training
they have behind them. Private tensors are never in one; a client's lie in its lock file (`fedkl.lockfile`).

A file of kind ``private`` is one client's whole model, for that client to serve (`fedkl.serving`); ``client``
says whose. Nothing that reads public tensors takes it.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fedkl.errors import ConfigError, SecretError, UpdateError, gathered, shown
from fedkl.files import PRIVATE_FILE, put, read_file
from fedkl.formats import check_version, version_of
from fedkl.parsing import parse_tensors
from fedkl.types import NamedTensors

PRIVATE_STATE = "fedkl-private"
"""In the metadata that PyTorch keeps with a module's state: the state holds what a lock kept private."""

_NAME, _VERSION, _KIND, _PRIVATE = "fedkl-model", 1, "public", "private"
_FORMAT = f"{_NAME}-{_VERSION}"
_OURS = "fedkl-"  # before the format of every file that fedkl writes
PUBLIC_MODE = 0o644
"""Of a model file, where nothing else is said."""

_MAX_MODEL = 2**34  # bytes


def write_model(
    path: str | Path, tensors: NamedTensors, *, rounds: int, replace: bool = False, mode: int = PUBLIC_MODE
) -> None:
    """Writes a model file, atomically.

    Args:
        path: Where to; folders above it are made.
        tensors: The public tensors by name, and no others.
        rounds: How many rounds of training they have behind them.
        replace: Whether a file that is there is replaced.
        mode: Of the file.

    Raises:
        SecretError: They are the `state_dict()` of one client's own model.
        UpdateError: There are no tensors, or one is not finite.
        ConfigError: The file is there and is not to be replaced, or cannot be written.
    """
    if any(about.get(PRIVATE_STATE) for about in getattr(tensors, "_metadata", {}).values()):
        raise SecretError(
            f"{path}: not written: it is the state_dict() of one client's own model, made by bake(): "
            "the lock's private numbers are in it. Give lock.public_state()."
        )
    about = {"format": _FORMAT, "kind": _KIND, "rounds": str(rounds)}
    _write_tensors(Path(path), tensors, about, mode=mode, replace=replace)


def private_mark(client: str) -> dict[str, str]:
    """What a file says of itself that holds one client's whole model."""
    return {"format": _FORMAT, "kind": _PRIVATE, "client": client}


def write_private_model(
    path: str | Path, tensors: NamedTensors, *, client: str, replace: bool = False
) -> None:
    """Writes one client's whole model, mode 0600, atomically.

    Args:
        path: Where to; folders above it are made, private ones.
        tensors: All of the model's tensors by name, private ones too.
        client: Whose they are.
        replace: Whether a file that is there is replaced.

    Raises:
        UpdateError: There are no tensors, or one is not finite.
        ConfigError: The file is there and is not to be replaced, or cannot be written.
    """
    _write_tensors(Path(path), tensors, private_mark(client), mode=PRIVATE_FILE, replace=replace)


def _write_tensors(
    path: Path, tensors: NamedTensors, about: dict[str, str], *, mode: int, replace: bool
) -> None:
    check_finite(tensors, subject=f"{path}: not written.")
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(own, about), mode=mode, replace=replace)


def write_whole(path: Path, data: bytes, *, mode: int, replace: bool) -> None:
    """Writes a file that somebody named.

    Raises:
        ConfigError: It is there and is not to be replaced, or cannot be written.
    """
    try:
        if not put(path, data, mode=mode, replace=replace):
            raise ConfigError(f"{path}: exists already. Choose another path, or let it be replaced.")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be written ({reason}).") from error


def read_model(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a model file, or of a safetensors file of another program.

    Raises:
        ConfigError: It cannot be read, or is something else that fedkl wrote, e.g. one client's update, or
            its whole model.
        NewerFormatError: A newer fedkl wrote it.
    """
    remedy = "Give a safetensors file of the model's public tensors."
    tensors, about = read_tensors(path, limit=_MAX_MODEL, problem=f"{path}: cannot be read", remedy=remedy)
    form = about.get("format", "")
    check_version(version_of(form, name=_NAME), source=path, reads=_VERSION)
    if form.startswith(_OURS) and (form, about.get("kind")) != (_FORMAT, _KIND):
        expected = f"expected {_FORMAT!r} of kind {_KIND!r}"
        raise ConfigError(
            f"{path}: {expected}, this is {shown(form)} of kind {shown(about.get('kind'))}. {remedy}"
        )
    return tensors


def read_tensors(
    path: str | Path, *, limit: int, problem: str, remedy: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file that somebody named, and its metadata; of no private model.

    Args:
        path: The file.
        limit: Bytes that it may have.
        problem: What is said if it cannot be read; the reason follows in brackets.
        remedy: What is said then.

    Raises:
        ConfigError: It cannot be read, or is one client's whole model.
    """
    try:
        tensors, about = parse_tensors(read_file(Path(path), limit=limit))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{problem} ({reason}). {remedy}") from error
    if about.get("format", "").startswith(_OURS) and about.get("kind") == _PRIVATE:
        raise ConfigError(
            f"{path}: the private model of client {shown(about.get('client'))}, γ, β and statistics in it: "
            f"for that client to serve, never for a server. {remedy}"
        )
    return tensors, about


def check_finite(tensors: NamedTensors, *, subject: str) -> None:
    """Checks that these can be a model's tensors: there are some, and all are finite.

    Raises:
        UpdateError: They cannot; `subject` is its first line.
    """
    problems = [f"{shown(name)} has non-finite values" for name, t in tensors.items() if not _is_finite(t)]
    if problems or not tensors:
        remedy = "Take the tensors of a training that did not diverge."
        raise UpdateError(gathered(subject, problems or ["there are no tensors"], remedy))


def _is_finite(tensor: Tensor) -> bool:
    try:
        return bool(torch.isfinite(tensor).all())
    except RuntimeError:  # a kind of numbers that PyTorch only stores
        return False
