"""The command line as a user meets it: real commands, tiny budgets, exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys

import pytest

from fedkl import cli, demo
from fedkl.attacks import DLG, ClosedForm
from fedkl.cli.terminal import progress_bar
from fedkl.config import AttackConfig, DataConfig, TrainConfig
from fedkl.defenses import PUBLISHED_LOCK
from fedkl.federated import FederatedTraining
from fedkl.runs import RunDirectory

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHORT = ("--set", "attack.evaluations=2")

pytestmark = pytest.mark.usefixtures("short_refits")


@pytest.fixture
def fedkl(capsys, monkeypatch):
    monkeypatch.setenv("FEDKL_PASSPHRASE", "correct horse")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fedkl", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def test_train_then_repeat_from_its_own_config(fedkl, tmp_path):
    out = tmp_path / "run"
    given = tmp_path / "given.toml"
    given.write_text('type = "train"\ndefense = {type = "keylock", key_length = 77}\n')
    flags = ("--defense", "keylock", "--rounds", 1, "--lock", "published")
    code, text = fedkl("train", "--config", given, "--out", out, *flags)
    assert code == 0, text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"] == 1
    assert len(summary["fill_ins"]) == 8
    config = tomllib.loads((out / "config.toml").read_text())
    assert config["defense"]["key_distribution"] == "uniform"
    assert config["defense"]["key_length"] == 77
    assert (out / "report.html").is_file()
    code, text = fedkl("train", "--config", out / "config.toml", "--out", tmp_path / "again")
    assert code == 0, text
    assert (tmp_path / "again" / "config.toml").read_text() == (out / "config.toml").read_text()
    before = (out / "results.jsonl").read_text()
    code, _ = fedkl("train", "--config", out / "config.toml", "--out", out)
    assert code == 0
    assert (out / "results.jsonl").read_text() == before, "a finished run is not repeated"


def test_centralized_training_is_one_client(fedkl, tmp_path):
    assert fedkl("train", "--out", tmp_path / "run", "--clients", 1, "--rounds", 1)[0] == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["clients"] == 1


def test_attack(fedkl, tmp_path):
    out = tmp_path / "run"
    words = ("attack", "--out", out, "--arms", "no-norm,lock", "--trials", 2, *SHORT)
    code, text = fedkl(*words)
    assert code == 0, text
    arms = json.loads((out / "summary.json").read_text())["arms"]
    assert [arm["name"] for arm in arms] == ["no-norm", "lock"]
    assert [arm["figures"]["psnr"]["n"] for arm in arms] == [2, 2]
    assert len(list((out / "reconstructions").iterdir())) == 4


def test_an_interrupted_attack_continues(fedkl, tmp_path):
    out = tmp_path / "run"
    words = (
        "attack",
        "--out",
        out,
        "--arms",
        "no-norm",
        "--trials",
        2,
        *SHORT,
        "--attack",
        "idlg",
    )
    assert fedkl(*words)[0] == 0
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text(lines[0] + lines[1][:20])
    (out / "summary.json").unlink()
    assert fedkl(*words)[0] == 0
    again = (out / "results.jsonl").read_text().splitlines(keepends=True)
    assert again[0] == lines[0]
    records = [json.loads(line) for line in again]
    assert [record["trial"] for record in records if record["event"] == "trial"] == [0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--defense", "magic"), "magic"),
        (("train", "--defense", "keylock", "--lock", "gold"), "--lock"),
        (("train", "--lock", "published"), "no lock"),
        (("train", "--layers", "all"), "no lock"),
        (("train", "--centralized"), "--centralized is now --clients 1."),
        (("attack", "--evaluations=20"), "--evaluations is now --set attack.evaluations=NUMBER."),
        (("train", "--rounds", "0"), "rounds"),
        (("train", "--partition", "magic"), "magic"),
        (("train", "--clients", "3", "--set", "training.cohort=4"), "cohort"),
        (("train", "--set", "training.local.epochs"), "PLACE=VALUE"),
        (("train", "--set", "training.local.augmentation=magic"), "crop-flip"),
        (("train", "--set", "execution.device=cuda"), "no GPU"),
        (("train", "--resume"), "not a run directory"),
        (("train", "--resume", "--rounds", "1", "--set", "a=1"), "leave out --rounds, --set"),
        (("reproduce", "table1", "--rows", "alexnet/mnist"), "resnet20/cifar10"),
        (("reproduce", "table1", "--arms", "magic"), "fedkl-published"),
        (("reproduce", "table1", "--rounds", "0"), "at least 1"),
        (("reproduce", "table6", "--rows", "dlg/vit/mnist"), "grnn/lenet/mnist"),
        (("reproduce", "table6", "--rows", "grnn/resnet18/cifar10"), "no quick budget"),
        (("reproduce", "table4", "--arms", "magic"), "public-norm"),
        (("reproduce", "threats", "--trials", "0"), "trials ≥ 1"),
        (("train", "--data", "mnits"), "mnist"),
        (("train", "--data", "./mine", "--set", "data.root=./other"), "name two folders"),
        (("attack", "--arms", "no-nrom"), "no-nrom"),
        (("attack", "--arms", "lock,lock"), "more than once"),
        (("attack", "--attack", "idlg", "--batch-size", "2"), "one image"),
        (("attack", "--set", "attack.box=nan"), "finite"),
        (("attack", "--trials", "100000"), "at most"),
        (("attack", "--attack", "magic"), "magic"),
        (("train", "--config", "nowhere.toml"), "cannot be read"),
        (("train", "--config", "x" * 5000), "cannot be read"),
        (("train", "--config", "/dev/null"), "not an ordinary file"),
        (("train", "--config", "/"), "cannot be read"),
        (("train", "--set", "lock=[[]]"), "lock"),
        (("train", "--set", "defense=3"), "defense"),
        (("train", "--set", "defense=3", "--lock", "published"), "defense"),
        (("train", "--set", "a." * 50_000 + "a=1"), "at most 8 parts"),
        (("train", "--set", "seed=" + "[" * 10_000), "seed"),
        (("train", "--set", f"training.local.batch_size={10**30}"), "64 bits"),
        (("train", "--seed", "9" * 30), "64 bits"),
        (("train", "--set", "data.name=\udcff"), "data.name"),
        (("train", "--set", "model.name=\x1b[2J"), "\\x1b[2J"),
        (("train", "--partition", "shards:" + "9" * 5000), "--partition"),
        (("train", "--partition", "dirichlet:nan"), "alpha"),
        (("attack", "--lock", "gold"), "--lock"),
        (("attack", "--set", "lock=[[]]"), "lock"),
        (("attack", "--set", 'arms=["\\u001b[2J"]'), "arms: unknown '\\x1b[2J'"),
        (("attack", "--set", "type=train"), "not a usable experiment"),
        (("attack", "--attack", "ggl", "--trials", "1", "--set", "attack.generator=/dev/null"), "generator"),
        (("attack", "--attack", "ig", "--set", "attack.evaluations=20"), "one of iterations, restarts, lr"),
        (("attack", "--attack", "ig", "--set", "attack.evaluations=20"), "--set attack.NAME=VALUE"),
        (("attack", "--attack", "ggl", "--trials", "1"), "--set attack.generator=NAME"),
        (("generator", "train", "--data", "mnist-sample", "--seed", "9" * 25), "seed"),
        (("generator", "train", "--data", "mnist-sample", "--latent", "5000"), "latent"),
        (("generator", "train", "--data", "mnist-sample", "--noise", "nan"), "noise"),
        (("generator", "samples", "mnist", "--columns", "999999999"), "columns"),
        (("generator", "samples", "/dev/null"), "not an ordinary file"),
        (("reproduce", "adaptive", "--batches", "9" * 20), "up to a million"),
        (("reproduce", "adaptive", "--batches", "9" * 5000), "whole numbers"),
        (("reproduce", "table6", "--rows", "dlg/lenet/mnist", "--set", "lock=[[]]"), "lock"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_a_clear_line(fedkl, tmp_path, words, message):
    code, text = fedkl(*words, "--out", tmp_path / "run")
    assert code == 2
    assert message in text
    assert "Traceback" not in text
    assert "\x1b[2J" not in text
    assert len(text) < 6000


NOWHERE = ("/proc/nowhere", "file/inside", "x" * 5000)
WRITERS = [
    ("train", "--rounds", 1),
    ("train", "--resume"),
    ("attack", "--trials", 1),
    ("demo",),
    ("reproduce", "table6", "--rows", "dlg/lenet/mnist", "--set", "data.name=mnist-sample"),
]
SAMPLES = ("generator", "samples", "mnist")  # a file or a link is replaced


@pytest.mark.parametrize(
    ("words", "out"),
    [
        *((words, out) for words in WRITERS for out in (*NOWHERE, "file", "loop")),
        *((SAMPLES, out) for out in NOWHERE),
    ],
)
def test_a_place_that_nothing_can_be_written_to_is_exit_code_2(fedkl, tmp_path, words, out):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    code, text = fedkl(*words, "--out", tmp_path / out)
    assert code == 2
    assert "Error: " in text
    assert "Traceback" not in text
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("path", ["nowhere", "file", "x" * 5000, "loop", "not \udcff text"])
def test_a_report_of_nothing_is_exit_code_2(fedkl, tmp_path, path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    code, text = fedkl("report", tmp_path / path)
    assert code == 2
    assert "no run directory here or below" in text


def test_a_path_that_is_no_text_is_told_in_escapes(fedkl, tmp_path):
    code, text = fedkl("generator", "samples", "mnist", "--out", tmp_path / "not \udcff text.png")
    assert code == 0, text
    assert "not \\udcff text.png" in text


def test_a_link_in_place_of_the_checkpoints_costs_nobody_a_file(fedkl, tmp_path):
    out, documents = tmp_path / "run", tmp_path / "documents"
    documents.mkdir()
    for name in ("thesis.tex", "public-000001.safetensors", "round-000009.json"):
        (documents / name).write_text("precious")
    RunDirectory.create(out, config=TrainConfig(), version="0")
    (out / "checkpoints").symlink_to(documents)
    code, text = fedkl("train", "--resume", "--out", out)
    assert code == 2
    assert "checkpoints: a symbolic link" in text
    assert {path.name: path.read_text() for path in documents.iterdir()} == {
        "thesis.tex": "precious",
        "public-000001.safetensors": "precious",
        "round-000009.json": "precious",
    }


COMMANDS = {
    "train": ("train", "--rounds", 2, "--clients", 2, "--set", "checkpoints.seconds=0"),
    "attack": ("attack", "--arms", "no-norm", "--trials", 2, *SHORT),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_full_disk_is_exit_code_2_and_the_same_command_goes_on(fedkl, tmp_path, monkeypatch, words):
    count, fsync = [0], os.fsync

    def full(handle):
        count[0] += 1
        if count[0] > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, text = fedkl(*words, "--out", tmp_path / "run")
    assert code == 2
    assert "No space left on device" in text
    assert "make room, then the same command goes on" in text
    assert "Traceback" not in text
    code, text = fedkl(*words, "--out", tmp_path / "run")
    assert code == 0, text


LIMITED = """
import json, resource, sys
from fedkl.cli import main
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for words in json.loads(sys.argv.pop()):
    for limit in (12000, hard):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        sys.argv[1:] = words
        try:
            main()
        except SystemExit as end:
            print("exit", end.code, file=sys.stderr)
    print("next", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """What each command says of a disk where no file may have more than 12,000 bytes, and its folder.

    Then, in the same process, they may. One process for all of them: it takes longer to start than they do.
    """
    pytest.importorskip("resource")
    folder = tmp_path_factory.mktemp("limited")
    environment = {"OMP_NUM_THREADS": "1", "FEDKL_PASSPHRASE": "correct horse"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # it would be cut off, too, and other processes read it
    commands = [[*map(str, words), "--out", str(folder / name)] for name, words in COMMANDS.items()]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(commands)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    *texts, rest = done.stderr.split("next\n")
    assert rest == "", rest
    return {name: (text, folder / name) for name, text in zip(COMMANDS, texts, strict=True)}


@pytest.mark.parametrize("name", COMMANDS)
def test_so_is_a_disk_that_really_takes_no_more(limited, name):
    text, out = limited[name]
    assert "Traceback" not in text
    first, _, then = text.partition("exit 2\n")
    assert "cannot be written (File too large)" in first
    assert "make room, then the same command goes on" in first
    assert "exit 0" in then, then
    assert (out / "report.html").exists()


def test_an_error_of_the_system_is_a_clear_line(fedkl, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fedkl.reproduce.leakage", full)
    code, text = fedkl("reproduce", "table6", "--out", tmp_path)
    assert code == 2
    assert "Error: No space left on device. What was finished is kept" in text


def test_resume_takes_the_experiment_from_the_run(fedkl, tmp_path):
    out = tmp_path / "run"
    words = ("train", "--out", out, "--rounds", 2, "--set", "checkpoints.seconds=0", "--clients", 2)
    assert fedkl(*words)[0] == 0
    (out / "summary.json").unlink()
    code, text = fedkl("train", "--out", out, "--resume")
    assert code == 0, text
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2


def test_an_attack_is_not_resumed_as_a_training(fedkl, tmp_path):
    out = tmp_path / "run"
    RunDirectory.create(out, config=AttackConfig(), version="0")
    code, text = fedkl("train", "--out", out, "--resume")
    assert code == 2
    assert "not a training" in text


def test_an_attack_config_does_not_train(fedkl, tmp_path):
    (tmp_path / "attack.toml").write_text('type = "attack"\n')
    code, text = fedkl("train", "--config", tmp_path / "attack.toml", "--out", tmp_path / "run")
    assert code == 2
    assert "expected a train experiment" in text


def test_report_needs_a_run(fedkl, tmp_path):
    assert fedkl("report", tmp_path)[0] == 2


def test_key_files(fedkl, tmp_path, monkeypatch):
    path = tmp_path / "alice.key"
    code, text = fedkl("key", "new", path, "--length", 64)
    assert code == 0
    assert "<secret>" in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = path.read_bytes()
    assert fedkl("key", "new", path)[0] == 2, "an existing key is not overwritten"
    assert path.read_bytes() == first
    assert "length=64" in fedkl("key", "info", path)[1]
    assert fedkl("key", "rotate", path)[0] == 0
    assert path.read_bytes() != first
    assert "length=64" in fedkl("key", "info", path)[1]
    monkeypatch.setenv("FEDKL_PASSPHRASE", "wrong")
    code, text = fedkl("key", "info", path)
    assert code == 2
    assert "wrong passphrase" in text


def test_an_unencrypted_key_is_explicit(fedkl, tmp_path):
    path = tmp_path / "plain.key"
    assert fedkl("key", "new", path, "--unencrypted", "--length", 8)[0] == 0
    assert fedkl("key", "info", path)[0] == 2
    assert fedkl("key", "info", path, "--unencrypted")[0] == 0


def test_data_list(fedkl):
    assert "mnist-sample" in fedkl("data", "list")[1]


@pytest.mark.parametrize(
    ("title", "note"),
    [
        ("attack-dlg", "evaluation 1200 of 2000"),
        ("attack-dlg", "evaluation 1980, 100 running"),
        ("[/b]", "[/b]"),
    ],
)
def test_the_progress_bar_shows_its_note_whole(capsys, monkeypatch, title, note):
    monkeypatch.setenv("COLUMNS", "80")
    with progress_bar(title) as step:
        step(100, 140, note)
    shown = capsys.readouterr().err
    for part in (title, "100/140", note):
        assert part in shown


@pytest.mark.parametrize(("done", "left"), [(None, False), (0, False), (3, True)])
def test_an_error_before_the_first_step_leaves_no_empty_bar(capsys, monkeypatch, done, left):
    monkeypatch.setenv("COLUMNS", "80")

    def work():
        with progress_bar("audit") as step:
            if done is not None:
                step(done, 10, "planning")
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        work()
    assert ("audit" in capsys.readouterr().err) == left


def test_the_demo_says_what_it_shows_and_no_verdicts_on_four_images(fedkl, tmp_path, monkeypatch):
    def attack(kind, *arms):
        return AttackConfig(attack=kind, defense=PUBLISHED_LOCK, arms=arms, trials=1)

    tiny = {
        "train-plain": TrainConfig(data=DataConfig(train_images=200), training=FederatedTraining(rounds=2)),
        "attack-dlg": attack(DLG(evaluations=2), "no-norm", "lock", "masked"),
        "attack-knowing-the-lock": attack(ClosedForm(), "no-norm", "lock"),
    }
    monkeypatch.setattr(demo, "EXPERIMENTS", tiny)
    code, text = fedkl("demo", "--out", tmp_path)
    assert code == 0, text
    report = (tmp_path / "report.md").read_text()
    accuracy = json.loads((tmp_path / "train-plain" / "summary.json").read_text())["accuracy"]
    sentences = re.findall(r"^\* \*\*(No protection|Lock|Masks):\*\* (.*)$", report, flags=re.MULTILINE)
    assert len(sentences) == 3
    assert all(f"{sent}: {found}" in text for sent, found in sentences), "the report's own"
    assert f"Accuracy after 2 rounds, on 500 test images: no protection {100 * accuracy:.1f} %." in text
    assert "they do not prove it" in text
    assert not any(each in text for each in ("undecided", "control:", "Paper")), text
    assert f"Report: {tmp_path / 'report.html'}" in text


def test_the_table_of_defenses_tells_its_plan_first(fedkl, tmp_path):
    words = ("--defenses", "none", "--minutes", 2, "--seeds", 3, "--data-root", tmp_path / "nowhere")
    code, text = fedkl("reproduce", "defenses", "--out", tmp_path / "table", *words)
    assert code == 2, text
    assert text.startswith("Plan: 3 trainings of 20 rounds, then 1 audit of up to about 2 minutes each"), text


def test_help_names_every_command(fedkl):
    code, text = fedkl("--help")
    assert code == 0
    for command in ("train", "attack", "demo", "report", "reproduce", "data", "key"):
        assert command in text
