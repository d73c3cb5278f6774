"""The folder of one input, with files around it that nothing may read, change or delete."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.fuzzing.contract import Finding

OUTSIDE = "../outside/target.txt"
"""From an input's own folder: a file that a name in an input may point to."""

_FORBIDDEN = ("/etc/passwd", "/etc/hostname")
_LINK, _FOLDER = b"@link ", b"@folder"


class Sandbox:
    """A folder `place` for the files of an input, beside a folder `outside` with canaries.

    Args:
        base: Holds both.
        precious: Names of files in `place` that belong to somebody else, and must stay.
    """

    def __init__(self, base: Path, *, precious: tuple[str, ...] = ()) -> None:
        self.base = base
        self.place = base / "place"
        self._outside = base / "outside"
        self._precious = precious
        self._known: dict[str, tuple[int, int, int]] = {}

    def prepare(self) -> Path:
        """Empties `place`, and puts the canaries out where there are none yet."""
        if self.place.is_symlink() or not self.place.is_dir():
            self.place.unlink(missing_ok=True)
        else:
            shutil.rmtree(self.place)
        self.place.mkdir(parents=True)
        self._outside.mkdir(exist_ok=True)
        for name in ("canary.txt", "target.txt"):
            if not (self._outside / name).is_file():
                (self._outside / name).write_bytes(b"precious\n")
        for name in self._precious:
            (self.place / name).write_bytes(b"precious\n")
        self._known = self._seen()
        return self.place

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes an input's files into `place`; names that lead out of it are left out.

        A content of ``@link NAME`` makes a symbolic link within the sandbox, ``@folder`` a folder.
        """
        for name, content in files.items():
            if not _inside(name) or name in self._precious:
                continue
            path = self.place / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._put(path, content)
            except OSError:  # a name too long, or a file where a folder has to be: not this input's point
                continue

    def _put(self, path: Path, content: bytes) -> None:
        if content.startswith(_LINK):
            target = content.removeprefix(_LINK).decode("utf-8", "surrogateescape").strip()
            path.symlink_to(target if _inside(target) else self._outside / "target.txt")
        elif content == _FOLDER:
            path.mkdir()
        else:
            path.write_bytes(content)

    def check(self) -> None:
        """Raises a Finding if anything outside `place`, or anything precious in it, is not as it was."""
        seen = self._seen()
        if seen != self._known:
            names = sorted(name for name in seen.keys() | self._known.keys() if self._differs(name, seen))
            shutil.rmtree(self._outside, ignore_errors=True)
            raise Finding(f"files that are not its own were changed or deleted: {', '.join(names)}")

    def _differs(self, name: str, seen: Mapping[str, tuple[int, int, int]]) -> bool:
        return seen.get(name) != self._known.get(name)

    def _seen(self) -> dict[str, tuple[int, int, int]]:
        paths = [*self.base.iterdir(), *self._outside.glob("*")]
        paths += [self.place / name for name in self._precious]
        return {
            path.relative_to(self.base).as_posix(): _stamp(path)
            for path in paths
            if path != self.place and path != self._outside and path.exists()
        }

    @contextmanager
    def confined(self) -> Iterator[None]:
        """Reports files that are opened outside `place` by a name that an input gave."""
        _AUDIT.install()
        _AUDIT.base, _AUDIT.opened = str(self.base), []
        try:
            yield
        finally:
            _AUDIT.base = None
            self._check_opened(_AUDIT.opened)

    def _check_opened(self, paths: Sequence[str]) -> None:
        own = str(self.place)
        strange = [path for path in paths if path != own and not path.startswith(f"{own}/")]
        if strange:
            shown = strange[0] if strange[0] in _FORBIDDEN else os.path.relpath(strange[0], own)
            raise Finding(f"a file outside its folder was opened: {shown}")


class _Audit:
    """Python's audit hooks cannot be taken off again; this one looks away unless a sandbox is confined."""

    def __init__(self) -> None:
        self.base: str | None = None
        self.opened: list[str] = []
        self._installed = False

    def install(self) -> None:
        if not self._installed:
            sys.addaudithook(self)
            self._installed = True

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.base is None or event not in ("open", "os.remove", "os.rename"):
            return
        if isinstance(arguments[0], (str, bytes)):
            path = os.path.normpath(os.fsdecode(arguments[0]))
            if path.startswith(f"{self.base}/") or path in _FORBIDDEN:
                self.opened.append(path)


_AUDIT = _Audit()


def _stamp(path: Path) -> tuple[int, int, int]:
    state = path.lstat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _inside(name: str) -> bool:
    path = Path(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts
