"""Table 1: its settings are the paper's, its cells run once, and its figures are those of the runs."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from statistics import mean, stdev

import pytest

from fedkl import data, report, reproduce, training
from fedkl.data import AUGMENTATIONS, DATASETS, IID, Shards
from fedkl.errors import ConfigError
from fedkl.models import MODELS
from fedkl.reproduce import Row, Table1, table1, table1_rows
from fedkl.runs import RunDirectory
from fedkl.study import Progress

# arXiv 2305.04095, Table 1, in its own order of columns: centralized, centralized with lock, FedAvg, FedKL.
PRINTED = {
    "lenet/mnist": (98.09, 98.07, 98.14, 97.45),
    "resnet20/cifar10": (91.63, 90.58, 91.20, 88.45),
    "resnet20/cifar100": (67.59, 67.49, 58.58, 61.97),
    "resnet32/cifar10": (92.34, 91.05, 91.37, 89.29),
    "resnet32/cifar100": (70.35, 69.89, 61.91, 64.17),
    "resnet18/cifar10": (91.62, 93.12, 89.50, 91.66),
    "resnet18/cifar100": (72.15, 75.90, 68.59, 74.19),
    "resnet34/cifar10": (92.20, 94.68, 89.27, 93.27),
    "resnet34/cifar100": (73.21, 78.22, 68.30, 76.61),
    "vgg16/cifar10": (89.13, 93.84, 88.13, 93.54),
    "vgg16/cifar100": (63.23, 74.86, 61.91, 73.06),
}
# The two networks behind a printed row: without and with the lock.
PAIRS = {
    "lenet": ("lenet", "lenet"),
    "resnet20": ("resnet20", "resnet20-projection"),
    "resnet32": ("resnet32", "resnet32-projection"),
    "resnet18": ("resnet18", "resnet18-nopool"),
    "resnet34": ("resnet34", "resnet34-nopool"),
    "vgg16": ("vgg16", "vgg16-bn"),
}
WITHOUT_LOCK = ("centralized", "fedavg")
TINY = Row(
    name="lenet/mnist-sample",
    model="lenet",
    rounds=3,
    expected={"fedavg": 98.14, "fedkl": 97.45, "centralized": 98.09},
)
ARMS = ("fedavg", "fedkl-published")


@pytest.fixture
def tiny(monkeypatch):
    """Two arms × two seeds × one round on a few images, without the server's fill-ins."""
    whole = data.load("mnist-sample")
    few = replace(
        whole,
        train_images=whole.train_images[:120],
        train_labels=whole.train_labels[:120],
        test_images=whole.test_images[:150],
        test_labels=whole.test_labels[:150],
    )
    monkeypatch.setattr(training, "server_fill_ins", lambda **_: [])
    monkeypatch.setattr(data, "load", lambda *_, **__: few)
    monkeypatch.setattr(reproduce.accuracy, "table1_rows", lambda: {TINY.name: TINY})
    return Table1(rows=(TINY.name,), arms=ARMS, seeds=2, rounds=1)


def silent(name: str) -> nullcontext[Progress]:
    return nullcontext(lambda done, total, note: None)


def written(out):
    return json.loads((out / "table.json").read_text(encoding="utf-8"))


def summaries(out, arm):
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"*/*/{arm}/seed-*/summary.json"))]


def test_the_table_holds_what_the_runs_gave(tmp_path, tiny):
    records = table1(tiny, out=tmp_path, progress=silent)
    assert written(tmp_path) == records
    assert [record["arm"] for record in records] == list(ARMS)
    for record, paper, shared in zip(records, (98.14, 97.45), (None, False), strict=True):
        runs = [100 * summary["accuracy"] for summary in summaries(tmp_path, record["arm"])]
        assert len(runs) == record["seeds"] == 2
        assert record["accuracy"] == pytest.approx(mean(runs))
        assert record["spread"] == pytest.approx(stdev(runs))
        assert (record["paper"], record["paper_rounds"], record["rounds"]) == (paper, 200, 1)
        assert record["statistics_shared"] is shared
    markdown = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[:6] for line in markdown.splitlines()[2:]] == [
        ["| lenet/mnist-sample", "fedavg", "lenet", "none", "1 of 200", "2"],
        ["| lenet/mnist-sample", "fedkl-published", "lenet", "private", "1 of 200", "2"],
    ]
    for line, record in zip(markdown.splitlines()[2:], records, strict=True):
        assert f"| {record['accuracy']:.2f} ± {record['spread']:.2f} |" in line
        assert line.endswith(f"| {record['paper']:.2f} |")
    html = report.build(tmp_path).html.read_text(encoding="utf-8")
    assert html.count("<figure>") == 2, "one partition a seed, shared by the arms"


def test_an_interrupted_table_goes_on(tmp_path, tiny):
    begun: list[str] = []

    def interrupted(name: str) -> nullcontext[Progress]:
        if len(begun) == 3:
            raise KeyboardInterrupt
        begun.append(name)
        return silent(name)

    with pytest.raises(KeyboardInterrupt):
        table1(tiny, out=tmp_path, progress=interrupted)
    folder = "lenet-mnist-sample/matched"
    assert begun == [f"{folder}/fedavg/seed-0", f"{folder}/fedkl-published/seed-0", f"{folder}/fedavg/seed-1"]
    assert [(record["seeds"], record["spread"] is None) for record in written(tmp_path)] == [
        (2, False),
        (1, True),
    ]
    files = [file for name in begun for file in (tmp_path / name).rglob("*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in files if file.name != "config.toml"}
    records = table1(tiny, out=tmp_path, progress=silent)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert [record["seeds"] for record in records] == [2, 2]


SUMMARY = {"accuracy": 0.5, "local_accuracy": 0.5, "rounds": 1, "statistics_shared": True, "seconds": 1.0}


def finished(table, out):
    for cell in table.cells():
        run = RunDirectory.create(out / cell.place, config=cell.experiment, version="0")
        run.finish(SUMMARY)


def test_a_single_seed_has_no_spread(tmp_path, tiny):
    table = replace(tiny, seeds=1)
    finished(table, tmp_path)
    (record, _) = reproduce.summarized(table, out=tmp_path)
    assert record["spread"] is None
    line = reproduce.markdown([record]).splitlines()[-1]
    assert "| shared | 1 of 200 | 1 | 50.00 | 50.00 | 98.14 |" in line


def test_runs_of_other_seeds_do_not_count(tmp_path, tiny):
    finished(replace(tiny, seeds=5), tmp_path)
    assert [record["seeds"] for record in reproduce.summarized(tiny, out=tmp_path)] == [2, 2]


def test_runs_with_other_settings_do_not_count(tmp_path, tiny):
    finished(tiny, tmp_path)
    other = replace(tiny, rounds=7)
    assert reproduce.summarized(other, out=tmp_path) == []
    with pytest.raises(ConfigError, match="other settings"):
        table1(other, out=tmp_path, progress=silent)
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize("change", [{"clients": 10}, {"partition": Shards()}])
def test_the_paper_is_shown_beside_its_own_setting_only(tmp_path, tiny, change):
    arms = ("centralized", "fedavg")
    table = replace(tiny, arms=arms, seeds=1, **change)
    finished(table, tmp_path)
    assert [record["paper"] for record in reproduce.summarized(table, out=tmp_path)] == [98.09, None]


def test_printed_accuracies():
    arms = ("centralized", "centralized-lock", "fedavg", "fedkl")
    rows = table1_rows()
    assert {name: tuple(row.expected[arm] for arm in arms) for name, row in rows.items()} == PRINTED
    assert {len(row.expected) for row in rows.values()} == {4}


@pytest.mark.parametrize("name", PRINTED)
def test_settings_of_a_row(name):
    row = table1_rows()[name]
    network, dataset = name.split("/")
    assert row.model in MODELS
    assert dataset in DATASETS
    assert row.augmentation in AUGMENTATIONS
    assert (row.augmentation == "none") == (dataset == "mnist")
    assert row.size == (224 if network in ("resnet18", "resnet34", "vgg16") else None)
    assert MODELS[row.model].size == (row.size or 32)


@pytest.mark.parametrize("arm", reproduce.ARMS)
@pytest.mark.parametrize("name", PRINTED)
def test_networks_of_matched_and_published_pairs(name, arm):
    row = table1_rows()[name]
    plain, locked = PAIRS[name.split("/")[0]]
    assert row.network(arm, "matched") == row.model
    assert row.network(arm, "published") == (plain if arm in WITHOUT_LOCK else locked)
    assert {plain, locked} <= MODELS.keys()
    (cell,) = Table1(rows=(name,), arms=(arm,), seeds=1, rounds=1, pairs="published").cells()
    assert cell.experiment.model.name == row.network(arm, "published")


def test_budgets():
    for name, row in table1_rows().items():
        assert Table1(rows=(name,), budget="paper").rounds_of(row) == 200
        if row.size == 224:
            with pytest.raises(ConfigError, match="no quick budget"):
                Table1(rows=(name,)).rounds_of(row)
        else:
            assert Table1(rows=(name,)).rounds_of(row) == row.rounds < 200
        assert Table1(rows=(name,), budget="paper", rounds=7).rounds_of(row) == 7


def test_centralized_arms_have_one_client_and_the_others_the_papers_three():
    table = Table1(arms=tuple(reproduce.ARMS), seeds=1, partition=Shards())
    for cell in table.cells():
        centralized = cell.arm.startswith("centralized")
        assert cell.experiment.training.clients == (1 if centralized else 3)
        assert isinstance(cell.experiment.training.partition, IID if centralized else Shards)


@pytest.mark.parametrize("how", ["recalibrated", "kept"])
def test_norm_statistics_are_those_of_all_arms(how):
    table = Table1(arms=tuple(reproduce.ARMS), seeds=1, norm_statistics=how)
    assert {cell.experiment.training.norm_statistics for cell in table.cells()} == {how}


def test_every_seed_is_done_before_the_next():
    table = Table1(arms=ARMS, seeds=2, first_seed=5)
    assert [(cell.arm, cell.experiment.seed) for cell in table.cells()] == [
        (arm, seed) for seed in (5, 6) for arm in ARMS
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": ("lenet/svhn",)}, r"rows: got 'lenet/svhn'\. Choose from lenet/mnist, resnet20/cifar10"),
        ({"arms": ("fedavg", "fedprox")}, r"arms: got 'fedprox'\. Choose from centralized, .*fedkl"),
        ({"rows": ()}, "rows: got none"),
        ({"arms": ("",)}, "arms: got ''\\. Choose"),
        ({"seeds": 0, "clients": 0}, "at least 1, got seeds=0, clients=0"),
        ({"rounds": 0}, "at least 1, got rounds=0"),
    ],
)
def test_what_there_is_not_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Table1(**options)
