"""Builds what is released, looks at what is in it, and tries it where nothing else of the project is.

``python -m tests.distribution`` or ``make dist``: both files, checked and each in a new environment.
``python -m tests.distribution --oldest`` or ``make oldest``: the wheel with the oldest dependencies.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.distribution.contents import ROOT, problems, uncommitted
from tests.distribution.oldest import bound, oldest, pinned

DIST = ROOT / "dist"
SMOKE = Path(__file__).with_name("smoke.py")
_CONSTRAINTS = (ROOT / "constraints.txt").as_uri()
_PINNED = {"PIP_CONSTRAINT": _CONSTRAINTS, "PIP_BUILD_CONSTRAINT": _CONSTRAINTS}
"""What builds is pinned, too, whichever of the two this pip reads."""


def say(line: str) -> None:
    """At once, between the lines of the commands."""
    print(line, flush=True)


def call(*command: str | Path, folder: Path = ROOT, **environment: str) -> None:
    """Runs a command without the sources on its path.

    Raises:
        SystemExit: It fails.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=kept | environment, check=False)
    if done.returncode:
        raise SystemExit(f"This failed with exit code {done.returncode}: {shlex.join(map(str, command))}")


def build() -> tuple[Path, Path]:
    """The wheel, built from the source distribution, and that; nothing else is in the folder."""
    shutil.rmtree(DIST, ignore_errors=True)
    call(sys.executable, "-m", "build", "--outdir", DIST, **_PINNED)
    (wheel,), (source,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    return wheel, source


def check(wheel: Path, source: Path) -> None:
    """Contents and metadata.

    Raises:
        SystemExit: Something is wrong with them.
    """
    found = uncommitted() + problems(wheel, source)
    if found:
        raise SystemExit("\n".join(["What would be released is wrong:", *(f"  - {line}" for line in found)]))
    call(sys.executable, "-m", "twine", "check", "--strict", wheel, source)


def install(python: Path, *what: str | Path, **variables: str) -> None:
    """By pip, into an environment."""
    call(python, *"-m pip install --quiet --disable-pip-version-check".split(), *what, **variables)


def environment(folder: Path, python: str, torch: str) -> Path:
    """A new environment with PyTorch only: asked for by fedkl, it may bring gigabytes of CUDA libraries."""
    call(python, "-m", "venv", folder)
    made = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install(made, f"torch=={torch}")
    return made


def smoke(python: Path, home: Path) -> None:
    """Tries what is installed, in an empty folder that is the home, too."""
    home.mkdir()
    quiet = {"HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FEDKL_PASSPHRASE": "smoke"}
    call(python, "-I", SMOKE, folder=home, **quiet)


def try_released(files: tuple[Path, ...], python: str, torch: str, folder: Path) -> None:
    """Each file in an environment of its own, with the pinned dependencies."""
    for number, file in enumerate(files):
        say(f"{file.name}:")
        made = environment(folder / f"{number}", python, torch)
        install(made, file, **_PINNED)
        smoke(made, folder / f"{number}-home")


def try_oldest(wheel: Path, python: str, torch: str, folder: Path) -> None:
    """The wheel with the oldest dependencies it claims."""
    requirements = oldest(python)
    say(f"{wheel.name} with torch=={torch} {' '.join(requirements)}:")
    made = environment(folder / "oldest", python, torch)
    install(made, "--no-deps", *requirements, wheel)  # uv named all; pip must find no other PyTorch
    smoke(made, folder / "home")


def main() -> int:
    """Builds, checks and tries; the first thing that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oldest", action="store_true", help="try the wheel with the oldest dependencies")
    parser.add_argument("--python", default=sys.executable, help="what makes the new environments")
    parser.add_argument(
        "--torch", default=pinned("torch"), help=f"version of PyTorch; {bound('torch')} at least"
    )
    options = parser.parse_args()
    wheel, source = build()
    check(wheel, source)
    with tempfile.TemporaryDirectory() as name:
        if options.oldest:
            try_oldest(wheel, options.python, options.torch, Path(name))
        else:
            try_released((wheel, source), options.python, options.torch, Path(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
