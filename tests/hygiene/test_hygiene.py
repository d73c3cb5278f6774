"""Whatever fails, and wherever: no key or lock number in output, runs, temporary files, or objects' texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from tests.hygiene.__main__ import chosen

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="Flower needs Python 3.11"),
]

CRITICAL = {
    "train": ("lockfile.py:write:",),
    "keys": ("lockfile.py:_derive:",),
    "enrollment": ("lockfile.py:write:",),
    "flower": ("masking/member.py:upload:",),
}
"""Where a stopped function holds secrets. All stages, attacks, audits: ``python -m tests.hygiene``."""

FORMS = ("float32", "float64, big-endian", "base64", "hex", "decimal")
WHOLE = [(name, None) for name in CRITICAL]
STOPPED = [(name, at) for name, stages in CRITICAL.items() for at in stages]
LEAKS = [("leak", form) for form in FORMS]
HELD = ("keys", "keyfile.py:save_key:")


@cache
def _found():
    """By case, what was found; one process forks all, so that what they import is imported once."""
    cases = [*WHOLE, *STOPPED, *LEAKS, HELD]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hygiene.cases"],
        input=json.dumps(cases),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


def found(case):
    return _found()[case]


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_nothing_is_left_of_a_whole_run(case):
    assert found(case)["secrets"] > 0, "the scenario made no secrets: nothing was tried"
    assert found(case)["leaks"] == []


@pytest.mark.parametrize("case", STOPPED, ids=str)
def test_nothing_is_left_whatever_fails(case):
    assert found(case)["stopped"], "this function is never called: name one that is"
    assert found(case)["secrets"] > 0
    assert found(case)["leaks"] == []


@pytest.mark.parametrize("case", LEAKS, ids=str)
def test_a_planted_leak_is_found(case):
    leaks = found(case)["leaks"]
    assert any("work/left" in line for line in leaks)
    if case[1] in ("base64", "hex", "decimal"):
        assert any("stderr" in line for line in leaks)


def test_a_traceback_shows_no_values_of_variables():
    """Neither typer nor rich prints locals: where one does, a key that a function holds is on the screen."""
    assert found(HELD)["stopped"]
    assert "StoppedError: stopped in keyfile.py:save_key" in found(HELD)["stderr"]
    assert "locals" not in found(HELD)["stderr"]


def test_stages_are_spread():
    assert chosen([str(place) for place in range(100)], 4) == ["0", "25", "50", "75"]
