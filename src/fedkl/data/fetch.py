"""Fetches the files of a dataset: several sources, every file checked, all or nothing."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedkl.data.base import default_root
from fedkl.data.messages import place, told
from fedkl.data.registry import entry_of
from fedkl.data.sources import FileRecord, Progress, Source
from fedkl.data.staging import remove_left, staging
from fedkl.errors import DataError, gathered


def fetch(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    sources: Sequence[Source] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Makes sure that the files of a dataset are on disk.

    A file that is there (plain or gzipped) with the right MD5 is kept, any other replaced. Files wait in a
    temporary folder in `root` until all are sound: a failure or interrupt before that changes nothing. What
    fetches that were killed have left in `root` is removed (POSIX).

    Args:
        name: One of `DATASETS`.
        root: The data root, `default_root()` by default; the files go into its folder `name`.
        sources: Where to fetch from, in the order to try; the dataset's own by default.
        progress: Called with what is being fetched, the bytes so far, and the bytes in all or None.

    Returns:
        The folder with the files.

    Raises:
        DataError: The name is unknown, nothing is there to fetch, sources failed, or root is not writable.
    """
    entry = entry_of(name)
    if not entry.files:
        raise DataError(
            f"fetch: expected a dataset with files to fetch, got {name!r}, which {entry.unfetched}"
        )
    folder = (default_root() if root is None else Path(root)) / name
    if "\0" in str(folder):
        raise DataError("fetch: expected a data root, got a name with a null character. Give another root.")
    sources = entry.sources if sources is None else sources
    try:
        _install(entry.files, folder, sources, progress=progress or _silent)
    except OSError as error:
        raise DataError(
            f"fetch: expected to read and write below {place(folder.parent)}, got {told(error)}. "
            "Give another root or set FEDKL_DATA."
        ) from error
    return folder


def _install(
    files: Mapping[str, FileRecord], folder: Path, sources: Sequence[Source], *, progress: Progress
) -> None:
    remove_left(folder.parent)
    wanted = {file: record for file, record in files.items() if not _present(folder / file, record)}
    if not wanted:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staging(folder.parent) as temporary:
        ready = _collect(wanted, temporary, sources, progress=progress, folder=folder)
        folder.mkdir(exist_ok=True)
        for file in wanted:
            (ready / file).replace(folder / file)


def _collect(
    wanted: Mapping[str, FileRecord],
    temporary: Path,
    sources: Sequence[Source],
    *,
    progress: Progress,
    folder: Path,
) -> Path:
    """Returns the folder inside `temporary` that holds all `wanted` files, checked."""
    ready = temporary / "ready"
    ready.mkdir()
    missing = dict(wanted)
    problems: list[str] = []
    for index, source in enumerate(sources):
        arrived = temporary / str(index)
        arrived.mkdir()
        failure = _deliver(source, missing, arrived, progress=progress)
        flaws = {file: _flaw(arrived / file, record) for file, record in missing.items()}
        for file in [file for file, flaw in flaws.items() if flaw is None]:
            (arrived / file).replace(ready / file)
            del missing[file]
        if not missing:
            return ready
        reasons = [failure] if failure else [flaw for flaw in flaws.values() if flaw]
        problems += [f"{source.name}: {reason}" for reason in reasons]
    summary = f"Could not fetch {', '.join(missing)}: no source has it (tried {len(sources)})."
    remedy = (
        f"Check the network and try again, or put the files, plain or as .gz, into {place(folder)} by hand."
    )
    raise DataError(gathered(summary, problems, remedy))


def _deliver(
    source: Source, files: Mapping[str, FileRecord], folder: Path, *, progress: Progress
) -> str | None:
    """Returns why the source failed, or None."""
    try:
        source.deliver(dict(files), folder=folder, progress=progress)
    except (DataError, OSError) as error:
        return f"{error}" if isinstance(error, DataError) else told(error)
    return None


def _flaw(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path.name}: not delivered"
    came = _md5(path)
    return None if came == record.md5 else f"{path.name}: expected the MD5 {record.md5}, got {came}"


def _present(path: Path, record: FileRecord) -> bool:
    """Whether what the loaders would read, the plain file or else the gzipped one, is sound."""
    packed = path.with_name(f"{path.name}.gz")
    if path.is_file() or not packed.is_file():
        return path.is_file() and path.stat().st_size == record.size and _md5(path) == record.md5
    try:
        with gzip.open(packed) as file:
            content = file.read(record.size + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == record.md5


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _silent(what: str, done: int, total: int | None) -> None:
    """Reports nothing."""
