"""Whatever fails, and wherever: no key or lock number in output, runs, temporary files, or objects' texts."""

from __future__ import annotations

import os
import sys

import pytest

from tests.hygiene.__main__ import attempt, chosen
from tests.hygiene.scenarios import SCENARIOS, leak

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="Flower needs Python 3.11"),
]

CRITICAL = {
    "train": ("lockfile.py:write:", "locking/layers.py:forward:"),
    "attack": ("attacking/",),
    "audit": (),
    "keys": ("files.py:_part:", "lockfile.py:_derive:"),
    "flower": ("secret_search.py:in_numbers:", "masking/member.py:upload:"),
}
"""Stages at which the secrets are in the hands of the function that is stopped; others: by the command line."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_left_whatever_fails(name, tmp_path):
    found, stages = attempt(name, at=None, root=tmp_path)
    assert found.secrets > 0, "the scenario made no secrets: nothing was tried"
    assert found.leaks == []
    for start in CRITICAL[name]:
        at = next(stage for stage in stages if stage.startswith(start))
        stopped, _ = attempt(name, at=at, root=tmp_path)
        assert stopped.leaks == [], at


@pytest.mark.parametrize("form", ["float32", "float64, big-endian", "base64", "hex", "decimal"])
def test_a_planted_leak_is_found(form, tmp_path, monkeypatch):
    monkeypatch.setitem(SCENARIOS, "leak", leak)
    monkeypatch.setenv("LEAK", form)
    found, _ = attempt("leak", at=None, root=tmp_path)
    assert any("work/left" in line for line in found.leaks)
    if form in ("base64", "hex", "decimal"):
        assert any("stderr" in line for line in found.leaks)


def test_a_traceback_shows_no_values_of_variables(tmp_path, monkeypatch):
    """Neither typer nor rich prints locals: where one does, a key that a function holds is on the screen."""
    from tests.hygiene.stopping import run

    folder, secrets = tmp_path / "folder", tmp_path / "secrets"
    folder.mkdir()
    secrets.mkdir()
    stages = run(SCENARIOS["keys"], at=None, folder=folder, secrets=secrets)
    at = next(stage for stage in stages if stage.startswith("keys.py:reveal:"))
    again, others = tmp_path / "again", tmp_path / "others"
    again.mkdir()
    others.mkdir()
    run(SCENARIOS["keys"], at=at, folder=again, secrets=others)
    text = (again / "stderr").read_text()
    assert "StoppedError: stopped in keys.py:reveal" in text
    assert "locals" not in text
    assert (again / "locals.txt").read_text().count("<secret>") > 0


def test_stages_are_spread():
    assert chosen([str(place) for place in range(100)], 4) == ["0", "25", "50", "75"]
