"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

_PART = ".part"


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes a file: whoever reads it sees the old content or all of the new one, also after a crash.

    Args:
        path: An existing file is replaced; missing folders are made.
        data: The content.
        mode: Permissions, given before any content is written.

    Raises:
        OSError: It cannot be written; nothing was changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            if mode != 0o600:
                Path(temporary).chmod(mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    _sync_folder(path.parent)


def remove_parts(folder: Path) -> None:
    """Removes what writes that were killed have left in a folder; nobody else may be writing there."""
    for path in folder.glob(f".*{_PART}"):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the new name itself survive a power failure, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
