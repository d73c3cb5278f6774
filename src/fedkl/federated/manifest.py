"""What belongs to a checkpoint: the names of its files, and the manifest that lists them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from fedkl.errors import shown
from fedkl.formats import check_version
from fedkl.parsing import parse_json_object

VERSION = 1
"""Of a manifest."""
REMEDY = "Choose another --out, or remove the folder 'checkpoints' to start again."
"""What to do with checkpoints that do not fit."""
_ROUND = r"([0-9]{6}|[1-9][0-9]{6,17})"
_MANIFEST = re.compile(rf"round-{_ROUND}\.json")
_PUBLIC = re.compile(rf"public-{_ROUND}\.safetensors")
_PRIVATE = re.compile(rf"private-{_ROUND}-[0-9]{{1,9}}\.fedkl")
_MASKS = re.compile(rf"masks-{_ROUND}\.fedkl")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One checkpoint.

    Attributes:
        version: Of this format.
        round: The round that comes next.
        public: Name of the server's file.
        digest: SHA-256 of the server's file.
        clients: Name of the private file by client.
        masks: Name of the aggregation's file; empty if it keeps nothing.
        workers: How the clients were run; the last bits of results depend on it.
        threads: The same for PyTorch's threads.
    """

    version: int
    round: int
    public: str
    digest: str
    clients: dict[str, str]
    masks: str
    workers: int
    threads: int


_FIELDS = {name: get_origin(kind) or kind for name, kind in get_type_hints(Manifest).items()}


def is_ours(name: str) -> bool:
    """Whether a file of this name belongs to a checkpoint."""
    return any(pattern.fullmatch(name) for pattern in (_MANIFEST, _PUBLIC, _PRIVATE, _MASKS))


def round_named(name: str) -> int | None:
    """The round that comes next, of a manifest by its name; None for other files."""
    match = _MANIFEST.fullmatch(name)
    return None if match is None else int(match[1])


def manifest_name(round: int) -> str:
    """How the manifest of the checkpoint before a round is named."""
    return f"round-{round:06d}.json"


def public_name(round: int) -> str:
    """How the server's file of the checkpoint before a round is named."""
    return f"public-{round:06d}.safetensors"


def masks_name(round: int) -> str:
    """How the aggregation's file of the checkpoint before a round is named."""
    return f"masks-{round:06d}.fedkl"


def sealed(values: dict[str, Any]) -> bytes:
    """JSON with a digest of itself: a flipped bit may well name another round, or a file that exists."""
    return json.dumps({"sha256": _digest(values), **values}).encode()


def unsealed(data: bytes, *, source: Path) -> Manifest:
    """What `sealed` was given.

    Raises:
        ValueError: It is damaged, or not what `Checkpoints` writes.
        NewerFormatError: A newer fedkl wrote it.
    """
    values = parse_json_object(data)
    digest = values.pop("sha256", None)
    check_version(values.get("version"), source=source, reads=VERSION)
    if values.get("version") != VERSION:
        raise ValueError(f"of version {shown(values.get('version'))}, expected {VERSION}")
    found = {"masks": ""} | values  # earlier ones had none
    _check_manifest(found)
    if digest != _digest(values):
        raise ValueError("it was altered")
    return Manifest(**found)


def _check_manifest(values: dict[str, Any]) -> None:
    """Raises ValueError for files but our own, or of a later round: no others are ever opened or removed."""
    if values.keys() != _FIELDS.keys() or any(type(values[n]) is not kind for n, kind in _FIELDS.items()):
        raise ValueError(f"expected the fields {', '.join(_FIELDS)}")
    round = values["round"]
    if not 0 <= round < 10**18:
        raise ValueError("expected a round from 0 to 10¹⁸")
    if values["public"] != public_name(round):
        raise ValueError(f"round {round} cannot have the file {shown(values['public'])}")
    if values["masks"] not in ("", masks_name(round)):
        raise ValueError(f"round {round} cannot have the file {shown(values['masks'])}")
    for name in values["clients"].values():
        match = _PRIVATE.fullmatch(name) if isinstance(name, str) else None
        if match is None or int(match[1]) > round:
            raise ValueError(f"round {round} cannot have the file {shown(name)}")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
