"""Tables 4, 5, 6 and the threat grid with tiny budgets on the packaged sample."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from fedkl import config as configs
from fedkl.attacking.records import _paper, perceptual_distances
from fedkl.attacks.generators.files import load_generator
from fedkl.data import DATASETS
from fedkl.defenses import PUBLISHED_LOCK
from fedkl.errors import ConfigError, DataError
from fedkl.metrics import SSIM_SUCCESS, SUCCESS_DB
from fedkl.metrics.perceptual import LPIPS
from fedkl.models import MODELS
from fedkl.reproduce import LeakageTable, all_arms, gallery, grid_arms, leakage, leakage_rows, rows_of
from fedkl.reproduce.leakage import LeakageRow
from fedkl.runs import RunDirectory

# arXiv 2305.04095, Table 6: true PSNR without and with the lock, as others have converted it.
TRUE_PSNR = {
    "dlg/lenet/mnist": (17.3, 5.2),
    "dlg/lenet/cifar10": (34.2, 8.3),
    "grnn/lenet/mnist": (57.4, 7.9),
    "grnn/lenet/cifar10": (50.5, 8.9),
    "grnn/resnet20/mnist": (47.5, 8.2),
    "grnn/resnet20/cifar10": (33.6, 9.6),
    "grnn/resnet18/cifar10": (28.7, 11.0),
    "ggl/resnet18/ilsvrc": (12.3, 9.5),
}
OWN = ("ig/lenet/cifar10", "ig/resnet20/cifar10", "ggl/lenet/mnist", "ggl/lenet/cifar10")
SAMPLE = ("data.name=mnist-sample", "attack.evaluations=2")
DLG = "dlg/lenet/mnist"


def silent(name):
    return nullcontext(lambda done, total, note: None)


def tiny(**options):
    options = {
        "rows": (DLG,),
        "arms": ("no-norm", "lock"),
        "trials": 2,
        "workers": 1,
        "settings": SAMPLE,
    } | options
    return LeakageTable(**options)


def test_a_table_holds_what_the_runs_gave_and_is_not_repeated(tmp_path):
    table = tiny(rows=(DLG, "grnn/lenet/mnist", "grnn/resnet18/cifar10"))
    records = leakage(table, out=tmp_path, progress=silent)
    assert json.loads((tmp_path / "table.json").read_text()) == records
    assert [(r["row"], r["arm"], r["n"]) for r in records] == [(DLG, "no-norm", 2), (DLG, "lock", 2)]
    run = RunDirectory.open(tmp_path / "dlg-lenet-mnist" / "seed-0")
    for record in records:
        scores = [s for r in run.results() if r.get("arm") == record["arm"] for s in r["scores"]]
        psnr = sorted(s["psnr"] for s in scores)
        assert record["psnr"]["median"] == pytest.approx(sum(psnr) / 2)
        assert record["psnr"]["low"] == pytest.approx(psnr[0] + (psnr[1] - psnr[0]) / 4)
        assert record["success"]["rate"] == sum(s["psnr"] >= SUCCESS_DB for s in scores) / 2
        assert record["ssim_success"]["rate"] == sum(s["ssim"] >= SSIM_SUCCESS for s in scores) / 2
        assert record["paper"] is None, "the sample is not the paper's data"
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (
        "| dlg | lenet (uniform) | mnist-sample | train | given | no-norm | 2 | 0 | 0 of 2 [0–66 %]" in text
    )
    assert "Budget quick" in text
    assert "Not run: grnn/lenet/mnist. grnn/lenet/mnist: The command line is not a usable" in text
    assert "grnn/resnet18/cifar10 has no quick budget" in text
    before = (run.path / "results.jsonl").read_bytes()
    assert leakage(table, out=tmp_path, progress=silent) == records
    assert (run.path / "results.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="other settings"):
        leakage(tiny(trials=3), out=tmp_path, progress=silent)


def test_an_interrupted_table_goes_on(tmp_path):
    table = tiny(rows=(DLG, "dlg/lenet/cifar10"), trials=1)
    begun = []

    def interrupted(name):
        if begun:
            raise KeyboardInterrupt
        begun.append(name)
        return silent(name)

    with pytest.raises(KeyboardInterrupt):
        leakage(table, out=tmp_path, progress=interrupted)
    assert begun == ["dlg-lenet-mnist/seed-0"]
    first = json.loads((tmp_path / "table.json").read_text())
    assert [record["row"] for record in first] == [DLG, DLG]
    records = leakage(table, out=tmp_path, progress=silent)
    assert records[:2] == first
    assert [record["row"] for record in records[2:]] == ["dlg/lenet/cifar10"] * 2


def test_the_threat_grid_runs_where_labels_are_not_known(tmp_path):
    table = tiny(rows=("ggl/lenet/mnist",), arms=grid_arms(), trials=1)
    assert not {"private-head", "private-stem", "lock-calibrated"} & set(table.arms)


def test_every_cell_of_the_threat_grid(tmp_path):
    records = leakage(tiny(arms=all_arms(), trials=1), out=tmp_path, progress=silent, described=True)
    assert [record["arm"] for record in records] == list(all_arms())
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (
        "| lock-seen-gradient | key-lock, gradient of the lock layers matched too | labels, gradient of the"
        in text
    )
    assert {len(line.split(" | ")) for line in text.splitlines() if line.startswith("| ")} == {18}


@pytest.mark.parametrize("repeats", [1, 2])
def test_pictures(tmp_path, repeats):
    table = tiny(repeats=repeats)
    gallery(table, title="Table 4 <DLG>", out=tmp_path, progress=silent)
    assert (tmp_path / "figures" / "dlg-lenet-mnist.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "pictures.html").read_text(encoding="utf-8")
    assert "Table 4 &lt;DLG&gt;" in page
    assert page.count("data:image/png;base64,") == 1
    columns = "no-norm, lock" if repeats == 1 else "no-norm 1, no-norm 2, lock 1, lock 2"
    alt = f"dlg/lenet/mnist: 2 of 2 images; columns: the true image, {columns}"
    assert alt in page
    assert f"![{alt}](<figures/dlg-lenet-mnist.png>)" in (tmp_path / "pictures.md").read_text(
        encoding="utf-8"
    )


def test_lpips_of_the_saved_reconstructions(tmp_path):
    leakage(tiny(), out=tmp_path, progress=silent)
    run = RunDirectory.open(tmp_path / "dlg-lenet-mnist" / "seed-0")

    class Measure(LPIPS):
        calls = 0

        def __init__(self):
            self.backbone = "vgg"

        def __call__(self, found, truth):
            self.calls += 1
            return (found - truth).abs().mean((1, 2, 3)).double()

    measure = Measure()
    distances = perceptual_distances(run, [measure])
    assert [len(distances[arm]["lpips_vgg"]) for arm in ("no-norm", "lock")] == [2, 2]
    assert perceptual_distances(run, [measure]) == distances
    assert measure.calls == 4, "kept beside the run"


def test_lpips_without_its_weights_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKL_LPIPS_WEIGHTS", str(tmp_path))
    with pytest.raises(DataError, match="FEDKL_LPIPS_WEIGHTS"):
        leakage(tiny(), out=tmp_path / "out", progress=silent, lpips=True)
    assert not (tmp_path / "out").exists()


def test_missing_data_is_named_with_what_the_row_needs(tmp_path):
    table = tiny(rows=("ggl/resnet18/ilsvrc",), budget="paper", settings=(), data_root=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"(?s)No row can be run.*imagefolder.*BigGAN-deep-256"):
        leakage(table, out=tmp_path / "out", progress=silent)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": ("dlg/vit/mnist",)}, "got 'dlg/vit/mnist'. Choose from dlg/lenet/mnist"),
        ({"arms": ("magic",)}, "got 'magic'. Choose from no-norm"),
        ({"trials": 0, "repeats": 0}, "trials ≥ 1, got 0, repeats ≥ 1, got 0"),
    ],
)
def test_what_there_is_not_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        tiny(**options)


def test_an_attack_that_is_not_there_names_its_row():
    row = LeakageRow(name="magic/lenet/mnist", model="lenet", activation="relu", paper={}, quick={})
    with pytest.raises(ConfigError, match="magic/lenet/mnist: "):
        tiny().cells(row)


def test_printed_figures():
    rows = leakage_rows()
    assert tuple(name for name, row in rows.items() if row.printed is None) == OWN
    assert len(rows) == 17
    for name, (without, locked) in TRUE_PSNR.items():
        found = [_paper(arm, rows[name].printed)["psnr"] for arm in ("no-norm", "lock")]
        assert found == [pytest.approx(without, abs=0.06), pytest.approx(locked, abs=0.06)]
    paper = _paper("no-norm", rows["grnn/resnet20/cifar100"].printed)
    assert paper["mse"] == pytest.approx((20.79 / 255) ** 2)
    assert (paper["ssim"], paper["lpips_vgg"], paper["lpips_alex"]) == (0.963, 0.0, 0.0)
    assert _paper("public-norm", rows[DLG].printed) is None


@pytest.mark.parametrize("budget", ["quick", "paper"])
@pytest.mark.parametrize("name", leakage_rows())
def test_settings_of_a_row(name, budget):
    row = leakage_rows()[name]
    attack, network, dataset = name.split("/")
    table = LeakageTable(rows=(name,), budget=budget)
    if budget == "quick" and network == "resnet18":
        with pytest.raises(ConfigError, match="no quick budget"):
            table.cells(row)
        return
    (cell,) = table.cells(row)
    experiment = cell.experiment
    assert configs.parse(configs.values_of(experiment), source="test") == experiment
    assert experiment.attack.type == attack
    assert experiment.model.name in MODELS
    assert experiment.data.name in DATASETS
    assert experiment.defense.activation == ("relu" if network == "lenet" else "sigmoid")
    assert experiment.defense.key_distribution == PUBLISHED_LOCK.key_distribution == "uniform"
    assert experiment.labels_known == (attack != "ggl")
    assert experiment.norm_mode == ("eval" if attack == "ggl" or name == "ig/resnet20/cifar10" else "train")
    if attack == "ggl" and dataset != "ilsvrc":
        assert load_generator(experiment.attack.generator).fits((3, 32, 32), 10)


def test_rows_of_the_pictures():
    assert len(rows_of("dlg", "grnn")) == 12
    assert rows_of("ggl") == ("ggl/resnet18/ilsvrc", "ggl/lenet/mnist", "ggl/lenet/cifar10")
