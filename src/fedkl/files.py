"""Files that are written whole or not at all, and folders of the right mode, for one process at a time.

Everything that `fedkl` puts on disk goes through here: links are not followed where a link could lead a write
or a removal elsewhere, what killed processes leave is found and removed, and new names survive a power
failure.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from fedkl.errors import ConfigError, FolderError

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
"""Modes of what nobody but its owner may read."""

_PART = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.part", re.DOTALL)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes a file: whoever reads it sees the old content or all of the new one, also after a crash.

    Args:
        path: An existing file is replaced; a link is replaced, not followed. Missing folders are made,
            private ones if the file is.
        data: The content.
        mode: Permissions, less the process's umask, given before any content is written.

    Raises:
        OSError: It cannot be written; nothing was changed.
    """
    make_folder(path.parent, mode=_folder_mode(mode))
    with _part(path, data, mode) as part:
        part.replace(path)
    sync_folder(path.parent)


def create_once(path: Path, data: bytes, *, mode: int) -> bool:
    """Writes a file if there is none yet; of several processes that try, one wins, and whole.

    Returns:
        Whether this call made it.

    Raises:
        OSError: It cannot be written.
    """
    make_folder(path.parent, mode=_folder_mode(mode))
    with _part(path, data, mode) as part:
        try:
            os.link(part, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            return _created(path, data, mode)
    sync_folder(path.parent)
    return True


_WITHOUT_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What FAT, exFAT and many network shares say to a hard link."""


def _created(path: Path, data: bytes, mode: int) -> bool:
    """As `create_once`, where there are no hard links: only a crash of the machine can leave half a file."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, mode)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise
    return True


def put(path: Path, data: bytes, *, mode: int, replace: bool) -> bool:
    """Writes a file, whole; what writes of it that were killed have left beside it is removed.

    Args:
        path: Where to.
        data: Its content.
        mode: Its permissions.
        replace: Whether a file that is there is replaced.

    Returns:
        Whether it was written: False, if one is there that stays.

    Raises:
        OSError: It cannot be written.
    """
    remove_parts(path.parent, of=path.name)
    if not replace:
        return create_once(path, data, mode=mode)
    write_atomically(path, data, mode=mode)
    return True


def _folder_mode(mode: int) -> int:
    return PRIVATE_FOLDER if mode == PRIVATE_FILE else 0o755


@contextlib.contextmanager
def _part(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    """A complete file beside `path`; it is gone afterwards, unless it was renamed.

    While its writer lives, it holds a lock on it: a part that can be locked was left by a process that was
        killed.
    """
    part, handle = _new_part(path, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            yield part
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _new_part(path: Path, mode: int) -> tuple[Path, int]:
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, mode)
        if fcntl:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink > 0:
            return part, handle
        os.close(handle)  # somebody who cleaned up was faster than the lock


def remove_parts(folder: Path, *, of: str | None = None) -> None:
    """Removes what writes that were killed have left in a folder; those of living processes stay.

    Args:
        folder: The folder.
        of: Only those of the file with this name.
    """
    if not fcntl or not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    for name in names:
        match = _PART.fullmatch(name)
        if match and of in (None, match["name"]):
            _remove_if_left(folder / name)


def _remove_if_left(part: Path) -> None:
    try:
        handle = os.open(part, os.O_RDWR | _NO_LINK)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()
    except OSError:  # its writer lives, or was done just now
        pass
    finally:
        os.close(handle)


def make_folder(path: Path, *, mode: int = 0o755) -> None:
    """Makes a folder with all that is missing above it; new names survive a power failure.

    Args:
        path: One that is there stays as it is.
        mode: Of every new folder, less the process's umask.

    Raises:
        OSError: It cannot be made, or something else has its name.
    """
    missing = []
    place = path
    while not place.exists():
        missing.append(place)
        place = place.parent
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster, or it is a broken link
            folder.mkdir(mode=mode)
            sync_folder(folder.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def rename_new(folder: Path, name: Path) -> None:
    """Gives a complete folder its name, at which nothing may be but an empty folder.

    Raises:
        OSError: Something is there, or it cannot be renamed; nothing was changed.
    """
    sync_folder(folder)
    folder.rename(name)
    sync_folder(name.parent)


def read_file(path: Path, *, limit: int | None = None, follow: bool = True) -> bytes:
    """The content of an ordinary file; what else has the name, e.g. a pipe that nobody writes to, is refused.

    Args:
        path: The file.
        limit: Most bytes that it may have.
        follow: Whether it may be a link.

    Raises:
        OSError: It is missing, cannot be read, is no ordinary file, is a link, or is too large.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if follow else _NO_LINK))
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink() and not follow:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from error
        raise
    about = os.fstat(handle)
    problem = None
    if stat.S_ISDIR(about.st_mode):
        problem = os.strerror(errno.EISDIR)
    elif not stat.S_ISREG(about.st_mode):
        problem = "it is not an ordinary file"
    elif limit is not None and about.st_size > limit:
        problem = f"it has {about.st_size} bytes, expected at most {limit}"
    if problem:
        os.close(handle)
        raise OSError(errno.EINVAL, problem, str(path))
    with os.fdopen(handle, "rb") as file:
        return file.read()


def open_to_others(path: Path, *, permissions: int) -> bool:
    """Whether anyone but the owner has one of these permissions (e.g. ``0o077``) on a file or folder."""
    return os.name == "posix" and bool(stat.S_IMODE(path.stat().st_mode) & permissions)


def sync_folder(folder: Path) -> None:
    """Makes the new name itself survive a power failure, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(path: Path, *, mode: int = 0o755, follow: bool = True) -> Iterator[None]:
    """Makes a folder, and keeps other processes from running in it, where the system can (POSIX).

    Args:
        path: The folder.
        mode: Of folders that are made, less the process's umask.
        follow: Whether it may be a link to a folder.

    Raises:
        FolderError: A process is running in it, it is a link, or it cannot be made.
    """
    if not follow and path.is_symlink():
        raise FolderError(f"{path}: expected a folder, got a symbolic link. Give the folder itself.")
    try:
        make_folder(path, mode=mode)
        folder = os.open(path, os.O_RDONLY | (0 if follow else _NO_LINK)) if fcntl else -1
    except OSError as error:
        raise FolderError(f"{path}: cannot be written ({error.strerror}).") from error
    busy = f"{path}: another process is running in this folder. Wait for it, or choose another one."
    with _locked(folder, busy):
        yield


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keeps a file for this process, where the system can (POSIX), by a lock on ``.<name>.lock`` beside it.

    The lock cannot be on the file itself, which every atomic write replaces. The empty file stays: whoever
    removed it could leave two processes with a lock each.

    Args:
        path: The file; its folder is made, a private one, if it is not there.

    Raises:
        ConfigError: Another process, or another part of this one, has it, or the lock cannot be made.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        make_folder(path.parent, mode=PRIVATE_FOLDER)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | _NO_LINK, PRIVATE_FILE) if fcntl else -1
    except OSError as error:
        raise ConfigError(f"{lock}: cannot be written ({error.strerror}).") from error
    busy = f"{path}: in use, by another process or elsewhere in this one. Wait for it, or close it there."
    with _locked(handle, busy):
        yield


@contextlib.contextmanager
def _locked(handle: int, busy: str) -> Iterator[None]:
    """Locks an open file or folder, and closes it in the end; a negative one stands for none.

    Raises:
        FolderError: Somebody has it; the text is `busy`.
    """
    if handle < 0:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FolderError(busy) from error
        yield
    finally:
        os.close(handle)  # gives the lock back; so does the end of the process, however it ends
