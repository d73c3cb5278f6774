"""The table of defenses: trained and audited cells, resumed, and the figures behind each cell."""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from fedkl.attacking.matrix import ROWS
from fedkl.defenses import DEFENSES
from fedkl.errors import ConfigError, FolderError, gathered
from fedkl.files import exclusive
from fedkl.protocol import Procedure
from fedkl.reproduce import DefensesTable, compared, defenses
from fedkl.reproduce.defenses_table import markdown, points
from tests.auditing.subjects import subject


def no_progress(name):
    return nullcontext(lambda done, total, note: None)


def test_every_registered_defense_is_compared():
    """Whoever adds one finds out here what stops it."""
    controls = {"public-norm", "private-norm", "masked"}  # of the lock; masks are `masking`
    found = {each.defense.type for each in compared().values()}
    assert found == set(DEFENSES.names()) - controls
    assert {each.masking for each in compared().values()} == {"none", "blind"}
    assert len({each.title for each in compared().values()}) == len(compared())


def test_a_subject_is_audited_behind_each_and_not_trained(tmp_path):
    wanted = DefensesTable(subject=subject(), defenses=("noise-strong",), minutes=0.01)
    records = defenses(wanted, out=tmp_path, progress=no_progress)
    assert [each["name"] for each in records] == ["none", "noise-strong"]
    plain, noisy = (each["exposed"]["your-client"]["presence"] for each in records)
    assert plain["outcome"] == "leaks"
    assert noisy["rate"] < 0.7 * plain["rate"]
    assert all(each["accuracy"] is None for each in records)
    first = (tmp_path / "table.md").read_text()
    audited = (tmp_path / "audited/noise-strong/results.jsonl").read_bytes()
    assert defenses(wanted, out=tmp_path, progress=no_progress) == records
    assert (tmp_path / "table.md").read_text() == first
    assert (tmp_path / "audited/noise-strong/results.jsonl").read_bytes() == audited
    assert json.loads((tmp_path / "table.json").read_text()) == records
    assert (tmp_path / "defenses.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_table_is_not_written_over_with_blanks(tmp_path):
    wanted = DefensesTable(subject=subject(), defenses=("noise-strong",), minutes=1e-9)
    defenses(wanted, out=tmp_path, progress=no_progress)
    first = (tmp_path / "table.md").read_text()
    other = replace(wanted, subject=subject(images_per_client=4))
    with pytest.raises(FolderError, match=r"something else .*: exposures"):
        defenses(other, out=tmp_path, progress=no_progress)
    with exclusive(tmp_path / "audited/none"), pytest.raises(FolderError, match="another process"):
        defenses(wanted, out=tmp_path, progress=no_progress)
    assert (tmp_path / "table.md").read_text() == first


def test_each_is_trained_with_and_with_its_own_learning_rate(monkeypatch):
    monkeypatch.setitem(ROWS, "lenet/sample", ("lenet", "mnist-sample"))
    wanted = DefensesTable(row="lenet/sample", defenses=("precode", "masked"), seeds=2, images=90)
    cells = wanted.trainings()
    assert [str(cell.place) for cell in cells] == [
        f"trained/{name}-seed-{seed}" for seed in (0, 1) for name in ("none", "precode", "masked")
    ]
    plain, precode, masked = (cell.experiment.training for cell in cells[:3])
    assert (plain.local.lr, precode.local.lr) == (0.03, 0.01)
    assert (plain.aggregation.type, masked.aggregation.type) == ("plain", "masked")


def test_the_plan_counts_trainings_and_audits():
    wanted = DefensesTable(defenses=("precode", "masked"), seeds=2, rounds=7, minutes=1.5)
    assert wanted.plan.startswith("Plan: 6 trainings of 7 rounds, then 3 audits of up to about 1.5 minutes")
    assert "4.5 together" in wanted.plan
    own = replace(wanted, subject=subject())
    assert own.plan.startswith("Plan: 3 audits")


def test_what_was_spent_comes_from_the_ledger(tmp_path, monkeypatch):
    pytest.importorskip("dp_accounting")
    monkeypatch.setitem(ROWS, "lenet/sample", ("lenet", "mnist-sample"))
    wanted = DefensesTable(
        row="lenet/sample", defenses=("client-dp",), rounds=2, images=90, seeds=1, minutes=0.01
    )
    monkeypatch.setattr(DefensesTable, "audited", lambda self, out: subject())
    plain, private = defenses(wanted, out=tmp_path, progress=no_progress)
    summary = json.loads((tmp_path / "trained/client-dp-seed-0/summary.json").read_text())
    assert plain["epsilon"] is None
    assert private["epsilon"] == max(summary["privacy"]["epsilon"].values()) > 0
    assert private["accuracy"] == summary["accuracy"]
    assert f"| {private['epsilon']:.3g} |" in (tmp_path / "table.md").read_text()


def share(rate, outcome="leaks"):
    return {"attacker": "a", "outcome": outcome, "rate": rate, "low": rate, "high": rate, "n": 9,
            "floor": 0.0, "auc": None}  # fmt: skip


def record(name, **changes):
    exposed = {
        "your-client": {"title": "2 steps", "presence": share(0.5), "identified": None},
        "gradient-of-1": {"title": "one", "presence": share(1.0), "identified": share(0.2)},
    }
    trained = {"accuracy": 0.9, "spread": None, "seeds": 1, "epsilon": None}
    about = {"name": name, "title": f"the {name}", "defense": name, "masking": "none"}
    return about | trained | {"exposed": exposed, "reasons": []} | changes


def test_what_says_nothing_is_no_defense():
    silent = {"your-client": {"title": "2 steps", "presence": share(0.0, "says nothing"), "identified": None}}
    records = [record("none"), record("odd", accuracy=0.7, exposed=silent)]
    assert [(p.name, p.cost, p.share) for p in points(records, row="x")] == [
        ("the none", 0.0, 50.0),
        ("the none", 0.0, 20.0),
    ]
    (line,) = [
        line for line in markdown(records, row="x").splitlines() if line.startswith("| the odd | 70.0")
    ]
    assert line == "| the odd | 70.0 | – | undecided | – |"


def test_upper_bounds_stand_by_exposure_one_table_a_question():
    lines = markdown([record("odd")], row="x").splitlines()
    at = lines.index("Upper bounds, easier for attackers: recognized")
    assert lines[at + 2] == "| defense | one |"
    assert lines[at + 4] == "| the odd | 100 % [100–100] |"
    at = lines.index("Upper bounds, easier for attackers: identified")
    assert lines[at + 4] == "| the odd | 20 % [20–20] a |"


def test_what_could_not_be_trained_stands_there_with_its_reason():
    text = markdown([record("none"), record("odd", accuracy=None, reasons=["it *diverged*"])], row="x")
    assert "* the odd: it \\*diverged\\*" in text
    assert len(points([record("none"), record("odd", accuracy=None)], row="x")) == 2


def test_a_reason_of_many_problems_is_one_line():
    told = gathered("Norms mix images.", ["'bn1'", "'bn2'.", "'bn3'"], "Replace them.")
    text = markdown([record("odd", accuracy=None, reasons=[told])], row="x")
    assert "\n* the odd: Norms mix images: 'bn1' and 2 more. Replace them.\n" in text


@pytest.mark.parametrize(
    "changes", [{"row": "lenet/none"}, {"defenses": ("wall",)}, {"rounds": 0}, {"minutes": 0.0}]
)
def test_wrong_use_is_named(changes):
    with pytest.raises(ConfigError, match="reproduce defenses"):
        replace(DefensesTable(), **changes)


def test_somebodys_own_subject_keeps_its_learning_rate(tmp_path, monkeypatch):
    """A row's own is that of its training, and here nothing is trained."""
    rates = []

    def audited(subject, **options):
        rates.append(subject.procedure.lr)
        raise ConfigError("not run")

    module = importlib.import_module("fedkl.reproduce.defenses")  # a function of that name hides it
    monkeypatch.setattr(module, "audit", audited)
    own = subject(procedure=Procedure(algorithm="fedavg", lr=0.001))
    defenses(DefensesTable(subject=own, defenses=("precode",)), out=tmp_path, progress=no_progress)
    assert rates == [0.001, 0.001]


def test_a_floor_beside_more_that_is_undecided_says_so():
    figures = {"low": 0.02, "high": 0.11, "n": 100, "floor": 0.02, "auc": None}
    share = {"attacker": "linear-rows", "outcome": "at the floor", "rate": 0.05, **figures}
    for undecided, cell in (([], "at the floor"), (["matching"], "at the floor (matching: undecided)")):
        exposed = {"title": "a client", "presence": None, "identified": share | {"undecided": undecided}}
        record = {
            "name": "none", "title": "none", "accuracy": None, "spread": None, "epsilon": None,
            "exposed": {"your-client": exposed}, "reasons": [],
        }  # fmt: skip
        assert f"| {cell} |" in markdown([record], row="mine")
