"""A recorded round of one client: what arrived at its node, what it sent, and what was said beside.

Three files in a folder: ``received.safetensors`` and ``sent.safetensors`` are ordinary tensors by name, and
``about.json`` (``fedkl-recording-1``), written last, says that both are whole. What a client sends is as
private as its data: folders get mode 0700, files 0600.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fedkl.errors import ConfigError, shown
from fedkl.files import PRIVATE_FILE, PRIVATE_FOLDER, make_folder, read_file, write_atomically
from fedkl.formats import check_version, version_of
from fedkl.parsing import parse_json_object, parse_tensors
from fedkl.types import NamedTensors

RECEIVED, SENT, ABOUT = "received.safetensors", "sent.safetensors", "about.json"

_NAME, _VERSION = "fedkl-recording", 1
_FORMAT = f"{_NAME}-{_VERSION}"
_ROUND = re.compile(r"round-(\d{1,12})")
_MAX_TENSORS, _MAX_ABOUT = 2**34, 2**20  # bytes of a file


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """One client's round.

    Attributes:
        received: The tensors that arrived; none where `masked`.
        sent: Those of the reply; none where `masked`.
        about: What stood beside them: ``round``, ``config`` and ``metrics``, with numbers and texts only.
        masked: Whether the reply was masked before it was recorded: its words say nothing.
    """

    received: NamedTensors = field(repr=False)
    sent: NamedTensors = field(repr=False)
    about: Mapping[str, Any]
    masked: bool = False

    def write(self, folder: Path) -> None:
        """Puts a recording on disk; one that was there is replaced.

        Raises:
            OSError: It cannot be written; `remove` takes away what there is of it.
        """
        make_folder(folder, mode=PRIVATE_FOLDER)
        with contextlib.suppress(FileNotFoundError):  # until the new one is whole, there is none
            (folder / ABOUT).unlink()
        for name, tensors in ((RECEIVED, self.received), (SENT, self.sent)):
            data = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()})
            write_atomically(folder / name, data, mode=PRIVATE_FILE)
        about = {"format": _FORMAT, "masked": self.masked, **self.about}
        data = (json.dumps(about, indent=1, allow_nan=False) + "\n").encode()
        write_atomically(folder / ABOUT, data, mode=PRIVATE_FILE)

    @classmethod
    def read(cls, folder: Path) -> Recording:
        """Reads a recording.

        Raises:
            ConfigError: It is not there, not whole, damaged, or of another format.
            NewerFormatError: A newer fedkl wrote it.
        """
        try:
            about = parse_json_object(read_file(folder / ABOUT, limit=_MAX_ABOUT))
            form, masked = about.pop("format", None), about.pop("masked", None)
            check_version(version_of(form, name=_NAME), source=folder, reads=_VERSION)
            if form != _FORMAT or type(masked) is not bool:
                raise ValueError(f"{ABOUT} is not of a {_FORMAT}")
            received, sent = (_tensors(folder / name) for name in (RECEIVED, SENT))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"{folder}: not a recording that can be read ({reason}). {_remedy(folder)}"
            ) from error
        return cls(received=received, sent=sent, about=about, masked=masked)


def _tensors(path: Path) -> dict[str, Tensor]:
    return parse_tensors(read_file(path, limit=_MAX_TENSORS))[0]


def _remedy(folder: Path) -> str:
    inside = [path.parent for path in sorted(folder.glob(f"**/{ABOUT}"))[:5]] if folder.is_dir() else []
    if not inside:
        return "Give the folder of one round, which fedkl.flower.RecordingMod wrote."
    return f"Give the folder of one round, e.g. {', '.join(shown(path) for path in inside)}."


def recorded_rounds(node: Path) -> dict[int, Path]:
    """The folders of a node's rounds by number, in the order in which they were written."""
    found = {}
    for path in node.iterdir() if node.is_dir() else ():
        match = _ROUND.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found[int(match[1])] = path
    return dict(sorted(found.items(), key=lambda item: (_written(item[1]), item[0])))


def round_folder(node: Path, number: int) -> Path:
    """Where a round's recording lies."""
    return node / f"round-{number}"


def remove(folder: Path) -> None:
    """Removes a recording, whole or not; a folder with anything else in it stays.

    Raises:
        OSError: A file cannot be removed.
    """
    for name in (ABOUT, SENT, RECEIVED):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _written(folder: Path) -> int:
    """When; one that is not whole comes before all others."""
    about = folder / ABOUT
    return about.stat().st_mtime_ns if about.is_file() else 0
