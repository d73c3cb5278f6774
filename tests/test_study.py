"""The one runner of a table's cells: what is checked at once, what ends a cell and what the table."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedkl import config as configs
from fedkl.config import AttackConfig
from fedkl.errors import AttackError, ConfigError, DataError
from fedkl.runs import RunDirectory
from fedkl.study import run_cells


@dataclass(frozen=True)
class Cell:
    place: Path
    experiment: AttackConfig


CELLS = [Cell(Path(f"cell-{seed}"), AttackConfig(seed=seed)) for seed in range(3)]


def test_an_error_that_is_passed_over_ends_its_cell_only(tmp_path):
    ran = []

    def run(experiment, *, out, progress):
        ran.append(experiment.seed)
        if experiment.seed == 1:
            raise AttackError("does not apply")
        return RunDirectory(out)

    options = {"table": "tiny", "out": tmp_path, "progress": nullcontext}
    found = list(run_cells(CELLS, run, passed_over=(AttackError,), **options))
    assert [cell for cell, _ in found] == CELLS
    first, error, last = (result for _, result in found)
    assert (first.path, last.path) == (tmp_path / "cell-0", tmp_path / "cell-2")
    assert str(error) == "does not apply"
    ran.clear()
    with pytest.raises(AttackError):
        list(run_cells(CELLS, run, passed_over=(DataError,), **options))
    assert ran == [0, 1]


def test_folders_are_checked_before_anything_runs(tmp_path):
    other = tmp_path / "cell-2"
    other.mkdir()
    (other / "config.toml").write_text(configs.dump(AttackConfig(seed=9)))
    (other / "results.jsonl").write_text("")
    with pytest.raises(ConfigError, match="cell-2: holds a run with other settings"):
        run_cells(CELLS, RunDirectory, table="tiny", out=tmp_path, progress=nullcontext)
