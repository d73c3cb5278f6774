"""Where the files of a dataset come from, and the entry that a dataset file puts into the registry."""

from __future__ import annotations

import gzip
import http.client
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedkl.data.base import Dataset
from fedkl.data.messages import told
from fedkl.errors import DataError

Progress = Callable[[str, int, int | None], None]
"""Called with what is being fetched, the bytes so far, and the bytes in all (None where unknown)."""

_BLOCK = 1 << 20
_URL_TIMEOUT_S = 10


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
class DatasetEntry:
    """One dataset in the registry.

    Attributes:
        info: One line about it.
        load: Its loader.
        size: The usual height and width of its images as delivered, in pixels.
        files: Names and checks of the unpacked files to fetch; empty if there is nothing to fetch.
        reads_dicom: Whether the loader takes `dicom`, see `fedkl.data.FolderImages`.
        unfetched: If there is nothing to fetch: why, and what to do instead.
        sources: Where to fetch them from, in the order to try.
    """

    info: str
    load: Loader
    size: int = 32
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    reads_dicom: bool = False
    unfetched: str = ""
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


def open_url(url: str) -> Any:
    """Opens an address over https only, redirects included; a response to read from and to close."""
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


def save(stream: Any, path: Path, *, record: FileRecord, progress: Progress) -> None:
    """Copies a stream into a file, and stops as soon as it is longer than expected.

    Raises:
        DataError: It is longer.
    """
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
                with (
                    open_url(f"{self.base}{file}.gz") as response,
                    gzip.GzipFile(fileobj=response) as unpacked,
                ):
                    save(unpacked, folder / file, record=record, progress=progress)
            except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
                raise DataError(f"{file}.gz: {told(error)}") from error
