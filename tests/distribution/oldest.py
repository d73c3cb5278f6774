"""The oldest versions that fedkl claims to work with, as uv resolves them."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.distribution.contents import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(rf"^{re.escape(package)}==(\S+)$", text, re.MULTILINE)
    return str(version)


def bound(package: str) -> str:
    """The oldest version of a dependency in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (version,) = (line.split(">=")[1] for line in project["dependencies"] if line.startswith(f"{package}>="))
    return str(version)


def oldest(python: str) -> list[str]:
    """What to install beside PyTorch: direct dependencies at their bounds, what these need as it is today.

    PyTorch is left out, which would bring gigabytes of CUDA libraries.

    Args:
        python: The Python that they are for.
    """
    with tempfile.TemporaryDirectory() as folder:
        nothing = Path(folder) / "without-torch.txt"
        nothing.write_text("torch; python_version < '3'\n", encoding="utf-8")
        command = ["-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-config"]
        command += [
            "--resolution",
            "lowest-direct",
            "--python",
            python,
            "--override",
            str(nothing),
            "pyproject.toml",
        ]
        command += ["pyproject.toml"]
        done = subprocess.run(
            [sys.executable, *command, "pyproject.toml"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"uv finds no versions as old as pyproject.toml claims:\n{done.stderr}")
    return done.stdout.split()
