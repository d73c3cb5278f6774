"""Without Flower, its surfaces cannot even be imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.fuzzing.engine import ROOT

collect_ignore_glob = []
if sys.version_info < (3, 11):  # which Flower needs
    collect_ignore_glob = [f"surfaces/{name}.py" for name in ("records", "guard", "mod", "rounds")]


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the harness in a process of its own, where nothing checks the types of calls."""
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def harness():
    """The command line of the harness."""
    return _command
