"""Takes one protection after the other out of a copy of the project and runs its tests, which must fail.

``python -m tests.mutants [NAME …]`` or ``make mutants``. The table is ``mutants.toml``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("mutants.toml")
_COPIED = ("src", "tests", "benchmarks", "examples", "docs", "conftest.py", "pyproject.toml", "README.md")
_LIMIT_S = 900


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change that removes a protection.

    Attributes:
        name: What is taken out.
        file: Where, below ``src/fedkl``.
        old: The text that stands there exactly once.
        new: What it becomes.
        tests: What must fail then, as pytest takes it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The file's text with the change.

        Raises:
            ValueError: The old text is not there exactly once: the table has to follow the code.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: expected once in {self.file}, found {text.count(self.old)} times")
        return text.replace(self.old, self.new)


def mutants() -> list[Mutant]:
    """All of the table."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**row | {"tests": tuple(row["tests"])}) for row in rows]


def survives(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests pass without the protection."""
    path = copy / "src" / "fedkl" / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(mutant.applied(before), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", *mutant.tests]
    try:
        ended = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=_LIMIT_S)
    finally:
        path.write_text(before, encoding="utf-8")
    if ended.returncode not in (0, 1):  # 1: tests failed; all else is no verdict
        text = ended.stdout.decode()[-500:]
        raise RuntimeError(f"{mutant.name}: pytest ended with {ended.returncode}: {text}")
    return ended.returncode == 0


def main() -> int:
    """Runs all mutants, or those that are named; 1 if one survives."""
    wanted = sys.argv[1:]
    chosen = [mutant for mutant in mutants() if not wanted or mutant.name in wanted]
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        for name in _COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, Path(folder) / name)
        for number, mutant in enumerate(chosen, start=1):
            start = perf_counter()
            lives = survives(mutant, Path(folder))
            alive += [mutant.name] if lives else []
            verdict, seconds = "SURVIVED" if lives else "killed", perf_counter() - start
            print(f"{number}/{len(chosen)} {verdict} {mutant.name} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - len(alive)} of {len(chosen)} killed.", *alive, sep="\n  survived: ")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
