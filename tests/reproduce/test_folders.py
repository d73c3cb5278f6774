"""Whose folder it is that a table writes into."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from fedkl import experiments, study
from fedkl.attacks import DLG
from fedkl.config import AttackConfig
from fedkl.errors import ConfigError
from fedkl.reproduce import LeakageTable, Matrix, Table1, adaptive, gallery, leakage, table1

PLACES = [Path("lenet-mnist", "seed-0")]
ROW = ("dlg/lenet/mnist",)
TABLES = {
    "table1": lambda out: table1(Table1(), out=out, progress=nullcontext),
    "adaptive": lambda out: adaptive(
        Matrix(rows=("lenet/mnist",), rungs=("closed-form",)), out=out, progress=nullcontext
    ),
    "table6": lambda out: leakage(LeakageTable(rows=ROW), out=out, progress=nullcontext),
    "table4": lambda out: gallery(LeakageTable(rows=ROW), title="Table 4", out=out, progress=nullcontext),
}


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(out, holding, *, table):
    before = files_in(out)
    with pytest.raises(ConfigError) as error:
        TABLES[table](out)
    assert str(error.value) == (
        f"{out}: reproduce {table} expects an empty folder or this table's own, and it holds {holding}. "
        "Choose another --out, or remove the folder."
    )
    assert files_in(out) == before


@pytest.mark.parametrize("table", TABLES)
def test_the_folder_of_a_run_is_not_written_into(tmp_path, table):
    experiments.run(AttackConfig(attack=DLG(evaluations=1), arms=("no-norm",), trials=1), out=tmp_path)
    refused(tmp_path, "a run", table=table)


@pytest.mark.parametrize("table", TABLES)
def test_the_folder_of_another_table_is_not_written_into(tmp_path, table):
    study.claim(tmp_path, table="table5", places=PLACES)
    study.write_table(tmp_path, [], "")
    refused(tmp_path, "the table 'table5'", table=table)


def test_files_of_no_table_are_not_written_among(tmp_path):
    (tmp_path / "thesis.md").write_text("mine")
    refused(tmp_path, "files of no table", table="table6")


def test_a_damaged_mark_is_named(tmp_path):
    (tmp_path / "reproduce.json").write_text("[")
    with pytest.raises(ConfigError, match=r"reproduce\.json: damaged .* Remove it, or choose another"):
        study.claim(tmp_path, table="table6", places=PLACES)


def test_a_folder_without_a_cell_is_free(tmp_path):
    study.claim(tmp_path, table="table5", places=PLACES)
    study.claim(tmp_path, table="table6", places=PLACES)
    study.write_table(tmp_path, [], "")
    with pytest.raises(ConfigError, match="the table 'table6'"):
        study.claim(tmp_path, table="table5", places=PLACES)


@pytest.mark.parametrize("left", ["table.json", "lenet-mnist"])
def test_a_table_of_an_older_version_goes_on(tmp_path, left):
    (tmp_path / left).mkdir()
    study.claim(tmp_path, table="table6", places=PLACES)
    study.claim(tmp_path, table="table6", places=PLACES)
    assert (tmp_path / "reproduce.json").read_text() == '{"version": 1, "table": "table6"}\n'


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: cannot be written"):
        study.claim(tmp_path / "file", table="table6", places=PLACES)
