"""The frontier: trainings beside the matrix, resumed, and the figures behind each cell."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from fedkl.attacking.matrix import ROWS
from fedkl.errors import ConfigError
from fedkl.reproduce import RUNGS, Frontier, Matrix, frontier
from fedkl.reproduce.frontier import markdown, points


def no_progress(name):
    return nullcontext(lambda done, total, note: None)


@pytest.fixture
def wanted(monkeypatch):
    monkeypatch.setitem(ROWS, "lenet/sample", ("lenet", "mnist-sample"))
    quick = replace(RUNGS["learned"], attack={"type": "learned", "simulations": 60})
    monkeypatch.setitem(RUNGS, "learned", quick)
    matrix = Matrix(
        rows=("lenet/sample",), arrangements=("first", "private-head"), batches=(1,), steps=(1,),
        rungs=("floor", "learned"), images=2, auxiliary=60, workers=1,
    )  # fmt: skip
    return Frontier(matrix=matrix, rounds=1, images=90, seeds=1)


def test_a_frontier_of_real_runs_is_resumed(wanted, tmp_path):
    records = frontier(wanted, out=tmp_path, progress=no_progress)
    assert [r["arrangement"] for r in records] == ["no-norm", "first", "private-head"]
    plain, lock, _ = records
    assert (plain["cost"], plain["worst"], plain["server"]) == (0, None, None)
    summary = json.loads((tmp_path / "lenet-sample/accuracy/first-seed-0/summary.json").read_text())
    assert lock["accuracy"] == summary["accuracy"]
    assert lock["cost"] == pytest.approx(plain["accuracy"] - lock["accuracy"])
    assert (lock["worst"], lock["seeds"], lock["identified"]["n"]) == ("learned", 1, 2)
    assert 0 < lock["server"] < 1
    table = (tmp_path / "frontier" / "table.md").read_text()
    assert "updates of 1 images after 1 local steps, the mean over 1 clients" in table
    assert table.count("| lenet/sample |") == 3
    assert (tmp_path / "frontier" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.jsonl")}
    assert len(before) == 4 + 3
    assert frontier(wanted, out=tmp_path, progress=no_progress) == records
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.jsonl")}


def test_the_figure_leaves_out_what_says_nothing():
    missing = dict.fromkeys(("spread", "server", "worst", "identified", "ssim", "floor", "verdict"))
    record = missing | {"row": "lenet/mnist", "arrangement": "no-norm", "rounds": 1, "seeds": 1}
    record |= {"accuracy": 0.9, "cost": 0.0}
    read = {"rate": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    other = record | {"arrangement": "first", "accuracy": 0.88, "cost": 0.02, "identified": read}
    silent = other | {"arrangement": "all", "verdict": "says nothing"}
    (point,) = points([record, other, silent])
    assert point == ("lenet/mnist", "first", pytest.approx(2.0), 0.0, 50.0, 25.0, 75.0)
    assert "| 88.0 | 2.0 | – | – | 2 of 4" in markdown([record, other], batch=1, steps=1, cohort=1)


def test_the_oracle_is_not_the_servers(wanted, tmp_path, monkeypatch):
    frontier(wanted, out=tmp_path, progress=no_progress)
    path = tmp_path / "lenet-sample/accuracy/first-seed-0/summary.json"
    summary = json.loads(path.read_text())
    own = [f["accuracy"] for f in summary["fill_ins"] if f["arm"] != "mean-affine"]
    oracle = next(f for f in summary["fill_ins"] if f["arm"] == "mean-affine")
    oracle["accuracy"] = 0.99
    path.write_text(json.dumps(summary))
    lock = frontier(wanted, out=tmp_path, progress=no_progress)[1]
    assert lock["server"] == max(own) < 0.99


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"seeds": 0}, {"images": 0}, {"test_images": 0}])
def test_numbers_below_one(wanted, changes):
    with pytest.raises(ConfigError, match="frontier: expected"):
        replace(wanted, **changes)
