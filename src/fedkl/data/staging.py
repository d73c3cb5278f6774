"""The temporary folders in which fetched files wait; what killed processes leave of them is removed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".fetch-"
_NAME = re.compile(r"\.fetch-[a-z0-9_]{8}")  # as `tempfile` makes them


@contextlib.contextmanager
def staging(root: Path) -> Iterator[Path]:
    """Makes a folder in `root`, and removes it afterwards.

    While its process lives, it holds a lock on it, where the system can (POSIX): a folder that can be locked
    was left by a process that was killed.

    Raises:
        OSError: It cannot be made.
    """
    folder, handle = _new(root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_left(root: Path) -> None:
    """Removes the folders of killed processes from `root`, as far as it may; those of living ones stay."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        names = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
        for name in names:
            with contextlib.suppress(OSError):
                _remove_if_left(root / name)


def _new(root: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        if fcntl is None:
            return folder, None
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                return folder, handle
            os.close(handle)  # somebody who cleaned up was faster than the lock


def _remove_if_left(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
