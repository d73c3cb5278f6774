"""Model files: the public tensors of a trained model, as one safetensors file that any program can read.

Metadata: ``format`` is ``fedkl-model-1``, ``kind`` is ``public``, ``rounds`` is how many rounds of training
they have behind them. Private tensors are never in one; a client's lie in its lock file (`fedkl.lockfile`).
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fedkl.errors import ConfigError, UpdateError, gathered, shown
from fedkl.files import put, read_file
from fedkl.formats import check_version, version_of
from fedkl.parsing import parse_tensors
from fedkl.types import NamedTensors

_NAME, _VERSION, _KIND = "fedkl-model", 1, "public"
_FORMAT = f"{_NAME}-{_VERSION}"
_OURS = "fedkl-"  # before the format of every file that fedkl writes
_MODE = 0o644
_MAX_MODEL = 2**34  # bytes


def write_model(
    path: str | Path, tensors: NamedTensors, *, rounds: int, replace: bool = False, mode: int = _MODE
) -> None:
    """Writes a model file, atomically.

    Args:
        path: Where to; folders above it are made.
        tensors: The public tensors by name, and no others.
        rounds: How many rounds of training they have behind them.
        replace: Whether a file that is there is replaced.
        mode: Of the file.

    Raises:
        UpdateError: There are no tensors, or one is not finite.
        ConfigError: The file is there and is not to be replaced, or cannot be written.
    """
    path = Path(path)
    check_finite(tensors, subject=f"{path}: not written.")
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = safetensors.torch.save(own, {"format": _FORMAT, "kind": _KIND, "rounds": str(rounds)})
    try:
        if not put(path, data, mode=mode, replace=replace):
            raise ConfigError(f"{path}: exists already. Choose another path, or let it be replaced.")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be written ({reason}).") from error


def read_model(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a model file, or of a safetensors file of another program.

    Raises:
        ConfigError: It cannot be read, or is something else that fedkl wrote, e.g. one client's update.
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
    """The tensors of a safetensors file that somebody named, and its metadata.

    Args:
        path: The file.
        limit: Bytes that it may have.
        problem: What is said if it cannot be read; the reason follows in brackets.
        remedy: What is said then.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return parse_tensors(read_file(Path(path), limit=limit))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{problem} ({reason}). {remedy}") from error


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
