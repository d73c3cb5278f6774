"""Recorded updates and their members' files, as a command line names them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedkl.auditing.recorded.update import RecordedKind, RecordedUpdate
from fedkl.errors import ConfigError, gathered, shown
from fedkl.files import read_file
from fedkl.parsing import parse_json_object
from fedkl.recordingfile import ABOUT, recorded_rounds
from fedkl.validation import problems_of

_MAX_MEMBERS = 2**28  # bytes of a file
_MEMBERS: TypeAdapter[dict[str, list[int]]] = TypeAdapter(dict[str, list[int]])


def read_recorded(path: Path, *, kind: RecordedKind = "gradient") -> dict[str, RecordedUpdate]:
    """Recorded updates by their clients' names.

    Args:
        path: What `fedkl.flower.RecordingMod` wrote: a round's folder, or a node's or the whole one, of which
            each node's newest round is read. Or a safetensors file, or a folder of such files.
        kind: What tensors of a safetensors file are; recordings hold weights.

    Returns:
        By the node's folder, e.g. ``node-1000``, or the file's name without its suffix; in this order.

    Raises:
        ConfigError: There is none, or one cannot be read.
    """
    rounds = [path] if (path / ABOUT).is_file() else _newest(path)
    if rounds:
        return {each.resolve().parent.name: RecordedUpdate.from_recording(each) for each in rounds}
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{path}: no recorded update. Give a safetensors file, or a folder of such files or of what "
            "fedkl.flower.RecordingMod wrote."
        )
    return {each.stem: RecordedUpdate.read(each, kind=kind) for each in files}


def _newest(folder: Path) -> list[Path]:
    """The newest round of a node, or of each node."""
    nodes = [folder, *sorted(each for each in folder.glob("*") if each.is_dir())]
    found = [[path for path in recorded_rounds(node).values() if (path / ABOUT).is_file()] for node in nodes]
    return [rounds[-1] for rounds in found if rounds]


def read_members(path: Path, *, clients: Collection[str]) -> dict[str, list[int]]:
    """Which of a subject's images each client trained on.

    Args:
        path: A JSON file of one object: a list of indexes for each client's name.
        clients: The names.

    Raises:
        ConfigError: It cannot be read, or its names are others.
    """
    example = json.dumps({name: [0, 1, 2] for name in [*clients][:1]})
    remedy = f"Write e.g. {example}, a list of indexes for each recorded client."
    try:
        found = _MEMBERS.validate_python(parse_json_object(read_file(path, limit=_MAX_MEMBERS)), strict=True)
    except ValidationError as error:
        raise ConfigError(gathered(f"{path}: no members' file.", problems_of(error), remedy)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({reason}). {remedy}") from error
    problems = [f"{shown(name)} is missing" for name in clients if name not in found]
    problems += [f"{shown(name)} is no recorded client" for name in found if name not in clients]
    if problems:
        raise ConfigError(gathered(f"{path}: names other clients.", problems, remedy))
    return found
