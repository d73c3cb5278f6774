"""Inputs that once broke a contract; the name of each says how."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.fuzzing import surfaces

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path for name in surfaces.names() for path in (CORPUS / name).glob("*") if path.is_file())

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")


@pytest.fixture(scope="module")
def outcomes(harness):
    """What came of each file."""
    run = harness("--patience", 30, "--replay", *FILES)
    assert run.returncode in (0, 1), run.stderr
    lines = [re.fullmatch(r"(\S+): (ok|FINDING .*)", line) for line in run.stdout.splitlines()]
    return {Path(line[1]): line[2] for line in lines if line}


@pytest.mark.timeout(600)  # the first one waits for all
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_it_breaks_it_no_more(outcomes, path):
    assert outcomes[path] == "ok", f"python -m tests.fuzzing --replay {path}"


def test_files_are_small():
    assert FILES
    assert max(path.stat().st_size for path in FILES) < 20_000
