"""The worst-rung matrix: what is run, that it is resumed, what it says and when it says nothing."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from fedkl.attacking.attackers import RUNGS
from fedkl.attacking.matrix import ROWS, adaptive
from fedkl.attacking.matrix_table import markdown, verdict
from fedkl.cli import app
from fedkl.errors import ConfigError
from fedkl.reproduce import Matrix

SMALL = {
    "rows": ("lenet/sample",),
    "arrangements": ("first", "private-head", "private-stem"),
    "batches": (1,),
    "steps": (1,),
    "images": 2,
    "auxiliary": 60,
    "workers": 1,
}


@pytest.fixture(autouse=True)
def sample(monkeypatch):
    monkeypatch.setitem(ROWS, "lenet/sample", ("lenet", "mnist-sample"))


def no_progress(name):
    return nullcontext(lambda done, total, note: None)


def rate(hits, n):
    share = hits / n
    return {"rate": share, "low": max(share - 0.1, 0), "high": min(share + 0.1, 1), "n": n}


def record(
    rung, hits, *, arrangement="first", control="public-norm, first", arm="lock", ssim=0.5, n=100, batch=1
):
    cell = {
        "row": "lenet/mnist",
        "batch": batch,
        "steps": 1,
        "cohort": 1,
        "rung": rung,
        "arrangement": arrangement,
    }
    cell["control"] = control
    figures = {"identified": rate(hits, n), "ssim": {"median": ssim, "low": ssim, "high": ssim}, "psnr": None}
    return cell | figures | {"arm": arm, "n": n}


def control(rung, hits):
    return record(rung, hits, arrangement="public-norm, first", control=None, arm="public-norm")


def row_of(text):
    return next(line for line in text.splitlines() if line.startswith("| lenet/mnist"))


@pytest.mark.parametrize(
    ("learned", "on_control", "floor", "said"),
    [
        (60, 100, 5, "leaks"),
        (60, 50, 5, "leaks"),
        (6, 100, 5, "at the floor"),
        (6, 50, 5, "undecided"),
    ],
)
def test_what_a_cell_says(learned, on_control, floor, said):
    records = [record("learned", learned), control("learned", on_control), record("floor", floor)]
    assert row_of(markdown(records, refused=[])).endswith(f"| {said} |")


def test_without_a_floor_nothing_is_at_it():
    controls = {"learned": control("learned", 100)}
    assert verdict([record("learned", 6)], controls=controls, floor=None) == "says nothing"


def test_few_images_are_never_at_the_floor():
    few = [record("closed-form", 0, n=20), control("closed-form", 100), record("floor", 5)]
    assert row_of(markdown(few, refused=[])).endswith("| undecided |")


def test_a_rung_leaks_whether_or_not_it_works_on_its_control():
    weak, strong = record("matching", 80), record("learned", 5)
    records = [weak, control("matching", 85), strong, control("learned", 95), record("floor", 3)]
    row = row_of(markdown(records, refused=[]))
    assert "| matching |" in row
    assert row.endswith("| leaks |")


def test_rungs_that_were_not_run_are_named():
    records = [record("learned", 5), control("learned", 95), record("floor", 3)]
    missing = "learned-per-label, learned-16, closed-form, wiener, mean-map, feature-inversion, gauss-newton"
    assert f"Rungs not run: {missing}, matching." in markdown(records, refused=[])


def test_the_ceiling_is_no_rung():
    ceiling = record("matching", 100, arm="lock-known-affine")
    records = [ceiling, record("matching", 5), control("matching", 100), record("floor", 3)]
    text = markdown(records, refused=[])
    assert "| matching | 100 | 5 of 100" in row_of(text)
    assert "| matching, known-affine | 100 | 100 of 100 |" in text


def test_every_rung_is_a_usable_experiment():
    cells = Matrix(rows=("lenet/mnist", "resnet20/cifar10"), rungs=tuple(RUNGS)).cells()
    assert {cell.given["rung"] for cell in cells} == set(RUNGS) - {"wiener"}  # that is for locks per element
    runs = 8 * 3 + 1  # without a lock and two locks; the mean map is for private stems only
    assert len({cell.place for cell in cells}) == len(cells) == 2 * 3 * 2 * runs
    element = Matrix(rows=("lenet/mnist",), arrangements=("element",), rungs=("wiener",)).cells()
    assert {cell.given["victim"] for cell in element} == {"element"}
    sixteen = next(c.experiment for c in cells if c.given["batch"] == 16 and c.given["rung"] == "learned")
    assert (sixteen.trials, sixteen.batch_size, sixteen.networks) == (35, 16, "one")
    wide = Matrix(rows=("lenet/mnist",), batches=(1,), steps=(1,), cohorts=(1, 16)).cells()
    summed = next(c for c in wide if c.given["cohort"] == 16 and c.given["rung"] == "learned")
    assert (summed.experiment.batch_size, summed.experiment.cohort, summed.experiment.trials) == (16, 16, 35)
    assert len({cell.place for cell in wide}) == len(wide)
    rounds = next(c.experiment for c in cells if c.given["batch"] == 4 and c.given["rung"] == "learned-16")
    assert (rounds.trials, rounds.updates_per_client) == (20 * 16, 16)
    large = Matrix(rows=("lenet/mnist",), batches=(16,), cohorts=(4,), rungs=("floor",)).cells()[0].experiment
    assert (large.trials, large.batch_size) == (156, 64)  # all of the 10,000 test images


def test_a_matrix_of_real_attacks_is_resumed(tmp_path, monkeypatch):
    quick = replace(RUNGS["learned"], attack={"type": "learned", "simulations": 60})
    monkeypatch.setitem(RUNGS, "learned", quick)
    matrix = Matrix(**SMALL, rungs=("floor", "learned"))
    records = adaptive(matrix, out=tmp_path, progress=no_progress)
    others = ["private-head", "private-stem", "first"]
    assert [(r["rung"], r["arrangement"]) for r in records] == [
        *(("floor", each) for each in others),
        *(("learned", each) for each in ("no-norm", *others[:2], "public-norm, first", others[2])),
    ]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.jsonl")}
    assert adaptive(matrix, out=tmp_path, progress=no_progress) == records
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.jsonl")}
    assert json.loads((tmp_path / "table.json").read_text()) == records


def test_only_images_with_a_label_of_their_own_count(tmp_path):
    changes = {"batches": (4,), "arrangements": ("first",), "images": 12}
    matrix = Matrix(**SMALL | changes, rungs=("floor",))
    [record] = adaptive(matrix, out=tmp_path, progress=no_progress)
    path = next(tmp_path.rglob("results.jsonl"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    trials = [record for record in records if record["event"] == "trial"]
    alone = [
        score["identified"]
        for trial in trials
        for score, label in zip(trial["scores"], trial["labels"], strict=True)
        if trial["labels"].count(label) == 1
    ]
    assert 0 < len(alone) < 4 * len(trials)
    assert (record["n"], record["identified"]["n"]) == (len(alone), len(alone))
    assert record["identified"]["rate"] == pytest.approx(sum(alone) / len(alone))
    assert (record["updates"], record["broke"], record["floor"]["identified"]["n"]) == (
        len(trials),
        0,
        len(alone),
    )
    del trials[0]["labels"]
    path.write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    with pytest.raises(ConfigError, match="older version"):
        adaptive(matrix, out=tmp_path, progress=no_progress)


def test_a_rung_that_cannot_work_is_named(tmp_path):
    matrix = Matrix(**SMALL | {"batches": (2,)}, rungs=("floor", "closed-form"))
    adaptive(matrix, out=tmp_path, progress=no_progress)
    text = (tmp_path / "table.md").read_text()
    assert (
        "Not run: closed-form, lenet/sample, batch 2, 1 local steps. ClosedForm: expected the gradient"
        in text
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": ("vgg/mnist",)},
        {"rungs": ("magic",)},
        {"batches": (0,)},
        {"arrangements": ("thick",)},
        {"arrangements": ()},
        {"arrangements": ("first", "first")},
        {"batches": (1, 4, 1)},
    ],
)
def test_unknown_names_and_numbers(changes):
    with pytest.raises(ConfigError, match="reproduce"):
        Matrix(**SMALL | changes)


@pytest.mark.parametrize(
    "setting", ["batch_size=8", "defense.layers=all", "local.steps=5", "data.name=cifar10"]
)
def test_settings_do_not_contradict_the_table(setting):
    with pytest.raises(ConfigError, match=rf"--set {setting.split('=')[0].split('.')[0]}.*sets that itself"):
        Matrix(**SMALL, settings=(setting,)).cells()
    (cell,) = Matrix(**SMALL, rungs=("closed-form",), settings=("local.lr=0.5",)).cells()[1:]
    assert cell.experiment.local.lr == 0.5


def test_nothing_to_run_is_said_before_anything_is(tmp_path):
    matrix = Matrix(**SMALL | {"arrangements": ("first",)}, rungs=("mean-map",))
    with pytest.raises(ConfigError, match="mean-map cannot be tried on any of first"):
        adaptive(matrix, out=tmp_path / "table", progress=no_progress)
    assert not (tmp_path / "table").exists()


def test_options_of_trainings_need_trainings(tmp_path):
    result = CliRunner().invoke(app, ["reproduce", "adaptive", "--out", str(tmp_path), "--seeds", "2"])
    assert result.exit_code == 2
    assert "only with --frontier" in " ".join(result.output.split())


def test_batches_on_the_command_line(tmp_path):
    result = CliRunner().invoke(app, ["reproduce", "adaptive", "--out", str(tmp_path), "--batches", "one"])
    assert result.exit_code == 2


def test_what_a_rungs_run_noted_counts_where_it_is_higher():
    """Of batches it has noise, too, which the rung that knows the labels alone has not."""
    rungs = [record("learned", 35) | {"floor": record("floor", 30)}, control("learned", 100)]
    noted = row_of(markdown([*rungs, record("floor", 5)], refused=[]))
    assert noted.endswith("| 30 of 100 | at the floor |")
    assert row_of(markdown(rungs, refused=[])) == noted
    assert row_of(markdown([*rungs, record("floor", 40)], refused=[])).endswith(
        "| 40 of 100 | at the floor |"
    )
