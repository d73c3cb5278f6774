"""A short run on every surface: the same inputs each time, counted, whatever time they take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzzing import surfaces
from tests.fuzzing.state import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")


@pytest.fixture(scope="module")
def state(tmp_path_factory, harness):
    """The state that the run leaves; findings stay there for those who want to replay them."""
    folder = tmp_path_factory.mktemp("fuzz")
    options = ("--quick", "--engine", "random", "--seed", 0, "--jobs", 1, "--patience", 30)
    run = harness(*options, "--state", folder)
    assert run.returncode in (0, 1), run.stderr
    return folder


@pytest.mark.timeout(1200)  # the first one waits for the whole run
@pytest.mark.parametrize("name", surfaces.names())
def test_no_input_breaks_the_contract(state, name):
    found = [_told(path) for path in sorted((state / name / "findings").glob("*/report.txt"))]
    assert not found, "\n\n".join(found)
    assert Store(state, name).counts()["inputs"] >= 100


def _told(report: Path) -> str:
    what = report.read_text(encoding="utf-8").splitlines()[0]
    return f"{what}\n  python -m tests.fuzzing --replay {report.with_name('input')}"
