"""Files that are written whole or not at all, and folders that one process has to itself."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from fedkl.errors import ConfigError

_PART = ".part"


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes a file: whoever reads it sees the old content or all of the new one, also after a crash.

    Args:
        path: An existing file is replaced; missing folders are made.
        data: The content.
        mode: Permissions, less the process's umask, given before any content is written.

    Raises:
        OSError: It cannot be written; nothing was changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _write_part(path, data, mode)
    try:
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    _sync_folder(path.parent)


def create_once(path: Path, data: bytes, *, mode: int) -> None:
    """Writes a file if there is none yet; of several processes that try, one wins, and whole.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _write_part(path, data, mode)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink()
    _sync_folder(path.parent)


def _write_part(path: Path, data: bytes, mode: int) -> Path:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    return part


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


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Makes a folder, and keeps other processes from running in it, where the system can (POSIX).

    Raises:
        ConfigError: A process is running in it, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder = os.open(path, os.O_RDONLY) if fcntl else -1
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from error
    if folder < 0:
        yield
        return
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise ConfigError(
            f"{path}: another process is running in this folder. Wait for it, or choose another one."
        ) from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(folder)  # gives the lock back; so does the end of the process, however it ends
