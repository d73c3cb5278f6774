"""What is in the files that are released: all that git tracks (the wheel: the package), nothing else."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "src/fedkl/"
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
"""What a wheel has beside the package."""


def tracked() -> set[str]:
    """Names of all files that git knows.

    Raises:
        SystemExit: This is no clone: nothing says then which files are the project's.
    """
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{ROOT} is no git clone; releases are made from one: {done.stderr.strip()}")
    return {name for name in done.stdout.split("\0") if name}


def uncommitted() -> list[str]:
    """Files whose content is not what is committed, as `git status` names them: a release has none."""
    command = ["git", "status", "--porcelain", "--untracked-files=no"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [f"{line[3:]} is not committed as it is" for line in done.stdout.splitlines()]


def problems(wheel: Path, source: Path) -> list[str]:
    """What is missing from both, and what does not belong there, a line each."""
    files = tracked()
    expected = {name.removeprefix("src/") for name in files if name.startswith(PACKAGE)}
    expected |= {f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/{name}" for name in METADATA}
    with zipfile.ZipFile(wheel) as archive:
        lines = _difference(wheel.name, archive.namelist(), expected)
    with tarfile.open(source) as tar:
        names = [member.name.partition("/")[2] for member in tar if member.isfile()]
    return lines + _difference(source.name, names, files | {"PKG-INFO"})


def _difference(file: str, names: Iterable[str], expected: set[str]) -> list[str]:
    there = set(names)
    lines = [f"{file} lacks {name}" for name in sorted(expected - there)]
    return lines + [f"{file} has {name}, which is not tracked" for name in sorted(there - expected)]
