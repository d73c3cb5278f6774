"""Whatever fails, and wherever: no key or lock number in output, runs, temporary files, or objects' texts."""

from __future__ import annotations

import os
import sys

import pytest

from tests.hygiene.__main__ import attempt, chosen
from tests.hygiene.scenarios import SCENARIOS, leak
from tests.hygiene.stopping import run

pytestmark = [
    pytest.mark.usefixtures("unchecked"),  # with type checks, the search takes ten times as long
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="Flower needs Python 3.11"),
]

CRITICAL = {
    "train": ("lockfile.py:write:", "locking/layers.py:forward:"),
    "attack": ("attacks/base.py:reconstruct:",),
    "audit": (),
    "keys": ("files.py:_part:", "lockfile.py:_derive:"),
    "flower": ("secret_search.py:in_numbers:", "masking/member.py:upload:"),
}
"""Where a function that is stopped holds secrets. All other stages: ``python -m tests.hygiene``."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_left_of_a_whole_run(name, tmp_path):
    found, _, _ = attempt(name, at=None, root=tmp_path)
    assert found.secrets > 0, "the scenario made no secrets: nothing was tried"
    assert found.leaks == []


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, stages in CRITICAL.items() for at in stages])
def test_nothing_is_left_whatever_fails(name, at, tmp_path):
    found, stopped, _ = attempt(name, at=at, root=tmp_path)
    assert stopped, f"{at} is never called: name a stage that is"
    assert found.secrets > 0
    assert found.leaks == []


FORMS = ["float32", "float64, big-endian", "base64", "hex", "decimal"]


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_leak_is_found(form, tmp_path, monkeypatch):
    monkeypatch.setitem(SCENARIOS, "leak", leak)
    monkeypatch.setenv("LEAK", form)
    found, _, _ = attempt("leak", at=None, root=tmp_path)
    assert any("work/left" in line for line in found.leaks)
    if form in ("base64", "hex", "decimal"):
        assert any("stderr" in line for line in found.leaks)


def test_a_traceback_shows_no_values_of_variables(tmp_path, monkeypatch):
    """Neither typer nor rich prints locals: where one does, a key that a function holds is on the screen."""
    folder, secrets = tmp_path / "folder", tmp_path / "secrets"
    folder.mkdir()
    secrets.mkdir()
    stopped, _ = run(SCENARIOS["keys"], at="keys.py:reveal:", folder=folder, secrets=secrets)
    assert stopped
    text = (folder / "stderr").read_text()
    assert "StoppedError: stopped in keys.py:reveal" in text
    assert "locals" not in text
    assert (folder / "locals.txt").read_text().count("<secret>") > 0


def test_stages_are_spread():
    assert chosen([str(place) for place in range(100)], 4) == ["0", "25", "50", "75"]
