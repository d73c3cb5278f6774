"""Experiments end to end on the packaged sample: resumed, complete, and honest about failures."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import sys

import pytest
import torch

from fedkl import data, demo, experiments
from fedkl import training as trainings
from fedkl.attacking.results import arm_summary
from fedkl.attacks import DLG
from fedkl.config import AttackConfig, CheckpointConfig, DataConfig, ModelConfig, TrainConfig
from fedkl.defenses import KeyLock, PrivateNorm, arms_of
from fedkl.errors import ConfigError, DataError
from fedkl.federated import FederatedTraining
from fedkl.runs import RunDirectory

pytestmark = pytest.mark.usefixtures("short_refits")

TINY = AttackConfig(attack=DLG(evaluations=2), arms=("no-norm", "lock"), trials=2)


def test_an_interrupted_attack_equals_an_uninterrupted_one(tmp_path):
    """The unlocked arm is deterministic, so continuing after one trial must give the same figures."""
    config = TINY.model_copy(update={"arms": ("no-norm",)})
    whole = experiments.run(config, out=tmp_path / "whole")
    cut = experiments.run(config, out=tmp_path / "cut")
    lines = (cut.path / "results.jsonl").read_text().splitlines(keepends=True)
    (cut.path / "results.jsonl").write_text(lines[0])
    (cut.path / "summary.json").unlink()
    again = experiments.run(config, out=tmp_path / "cut")

    def figures(run):
        return [{k: v for k, v in record.items() if k != "elapsed"} for record in run.results()]

    assert figures(again) == figures(whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_attack_of_fewer_trials_than_a_chunk_keeps_those_that_are_finished(tmp_path, workers):
    """Interrupted in the middle of its work; the rest has the company that it would have had."""
    config = TINY.model_copy(update={"arms": ("no-norm",), "trials": 7, "workers": workers})
    whole = experiments.run(config, out=tmp_path / "whole")

    def interrupted(done, total, note):
        if "running" in note and done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiments.run(config, out=tmp_path / "cut", progress=interrupted)
    kept = trials_in(RunDirectory(tmp_path / "cut"))
    assert [record["trial"] for record in kept] == [0, 1, 2, 3]
    again = experiments.run(config, out=tmp_path / "cut")
    assert trials_in(again)[:4] == kept

    def figures(run):
        return [{k: v for k, v in record.items() if k != "elapsed"} for record in run.results()]

    assert figures(again) == figures(whole)


def test_progress_moves_while_the_first_trials_are_attacked(tmp_path):
    """It never goes back, and ends where all is done."""
    config = TINY.model_copy(update={"attack": DLG(evaluations=6), "workers": 1})
    shown = []
    run = experiments.run(config, out=tmp_path, progress=lambda *step: shown.append(step[:2]))
    done = [each for each, _ in shown]
    assert any(0 < each < 1 for each in done)
    assert done == sorted(done)
    assert shown[-1] == (4, 4)
    assert len(trials_in(run)) == 4


def trials_in(run):
    return [record for record in run.results() if record["event"] == "trial"]


def test_a_trial_that_lacks_an_arm_is_repeated_in_all_arms(tmp_path):
    """Its arms must attack one and the same victim, whose secrets died with the process."""
    run = experiments.run(TINY, out=tmp_path / "run")
    records = trials_in(run)
    kept = [r for r in records if (r["arm"], r["trial"]) != ("lock", 1)]
    run.restart_from(kept)
    (run.path / "summary.json").unlink()
    again = trials_in(experiments.run(TINY, out=tmp_path / "run"))
    assert sorted((r["arm"], r["trial"]) for r in again) == sorted((r["arm"], r["trial"]) for r in records)
    assert again[:2] == [r for r in records if r["trial"] == 0]


def test_a_client_that_lacks_an_update_is_attacked_again(tmp_path):
    config = TINY.model_copy(update={"trials": 4, "updates_per_client": 2, "networks": "one"})
    run = experiments.run(config, out=tmp_path / "run")
    records = trials_in(run)
    run.restart_from([r for r in records if (r["arm"], r["trial"]) != ("lock", 3)])
    (run.path / "summary.json").unlink()
    again = trials_in(experiments.run(config, out=tmp_path / "run"))
    assert again[:4] == [r for r in records if r["trial"] < 2]
    assert len(again) == len(records) == 8


def test_a_part_of_the_training_images(tmp_path):
    config = TINY.model_copy(update={"data": DataConfig(train_images=50), "auxiliary": 51})
    with pytest.raises(DataError, match="at most 50, the training images of mnist-sample, got 51"):
        experiments.run(config, out=tmp_path / "run")
    config = TINY.model_copy(update={"data": DataConfig(train_images=2001)})
    with pytest.raises(DataError, match=r"data\.train_images: expected at most 2000"):
        experiments.run(config, out=tmp_path / "other")


def test_a_part_of_the_test_images(tmp_path):
    training = TrainConfig(data=DataConfig(test_images=50), auxiliary=50)
    with pytest.raises(ConfigError, match=r"auxiliary: expected fewer than 50, .* got 50"):
        experiments.run(training, out=tmp_path / "run")
    config = TINY.model_copy(update={"data": DataConfig(test_images=501)})
    with pytest.raises(DataError, match=r"data\.test_images: expected at most 500"):
        experiments.run(config, out=tmp_path / "other")


def test_a_training_that_was_interrupted_at_its_end_repeats_no_round(tmp_path, monkeypatch):
    config = TrainConfig(training=FederatedTraining(rounds=1))
    run = experiments.run(config, out=tmp_path / "run")
    expected, records = run.summary, list(run.results())
    (run.path / "summary.json").unlink()
    monkeypatch.setattr("fedkl.federated.Federation.run_round", None)
    again = experiments.run(config, out=tmp_path / "run")
    assert {**again.summary, "seconds": 0} == {**expected, "seconds": 0}
    assert list(again.results()) == records
    assert [record["event"] for record in records] == ["partition", "round"]


SMALL = DataConfig(train_images=60, test_images=40)
TRAINING = TrainConfig(
    data=SMALL,
    training=FederatedTraining(clients=2, rounds=3),
    checkpoints=CheckpointConfig(seconds=0.0),
    auxiliary=2,
)
ATTACK = TINY.model_copy(update={"data": SMALL, "arms": ("no-norm",)})


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A training that was killed when all its rounds were done, and an attack in the same state."""
    folder = tmp_path_factory.mktemp("ended")
    for name, config in (("train", TRAINING), ("attack", ATTACK)):
        run = experiments.run(config, out=folder / name)
        (run.path / "summary.json").unlink()
    return folder


@pytest.fixture
def cut(ended, tmp_path):
    def copy(name):
        shutil.copytree(ended / name, tmp_path / name)
        return tmp_path / name

    return copy


def lines_of(run):
    return (run / "results.jsonl").read_bytes().splitlines(keepends=True)


OTHER_LINES = {
    "a round is missing": lambda lines: [*lines[:2], *lines[3:]],
    "all are": lambda lines: lines[:1],
    "one is there twice": lambda lines: [*lines[:3], lines[2], *lines[3:]],
    "one stands for another": lambda lines: [*lines[:2], lines[1], *lines[3:]],
    "they are in another order": lambda lines: [lines[0], lines[2], lines[1], lines[3]],
}


@pytest.mark.parametrize("change", OTHER_LINES.values(), ids=OTHER_LINES)
def test_a_training_goes_on_with_all_its_rounds_or_not_at_all(cut, change):
    run = cut("train")
    before = change(lines_of(run))
    (run / "results.jsonl").write_bytes(b"".join(before))
    with pytest.raises(ConfigError, match=r"results\.jsonl: expected the 3 rounds .* each once and in order"):
        experiments.run(TRAINING, out=run)
    assert lines_of(run) == before
    assert not (run / "summary.json").exists()


def test_records_after_the_checkpoint_are_repeated(cut):
    run = cut("train")
    whole = lines_of(run)
    for kind in ("round-000003.json", "public-000003.safetensors"):
        (run / "checkpoints" / kind).unlink()
    experiments.run(TRAINING, out=run)
    assert len(lines_of(run)) == len(whole)
    assert lines_of(run)[:3] == whole[:3]


NO_RECORDS = {
    "a high byte": b'{"event": "round", "round": \xff}',
    "a number": b"3",
    "a list": b"[]",
    "no event": b'{"round": 0}',
    "a round that says too little": b'{"event": "round", "round": 0, "accuracy": 0.5}',
    "a trial that says too little": b'{"event": "trial", "arm": "no-norm", "trial": 0}',
}


@pytest.mark.parametrize("line", NO_RECORDS.values(), ids=NO_RECORDS)
@pytest.mark.parametrize("name", ["train", "attack"])
def test_going_on_refuses_a_line_that_is_no_record(cut, name, line):
    run = cut(name)
    before = [line + b"\n", *lines_of(run)]
    (run / "results.jsonl").write_bytes(b"".join(before))
    config = TRAINING if name == "train" else ATTACK
    with pytest.raises(ConfigError, match=r"results\.jsonl: line 1 is damaged"):
        experiments.run(config, out=run)
    assert lines_of(run) == before


@pytest.mark.parametrize(
    "changes",
    [{"arm": "lock"}, {"arm": "magic"}, {"trial": 2}, {"scores": 2}, {}],
    ids=["another arm", "no arm", "another trial", "another batch", "twice"],
)
def test_an_attack_goes_on_with_its_own_trials_only(cut, changes):
    run = cut("attack")
    first, *others = lines_of(run)
    record = json.loads(first)
    if "scores" in changes:  # in its own place, which is wrong by nothing else
        changes = {name: record[name] * changes["scores"] for name in ("scores", "labels")}
        first = b""
    before = [json.dumps(record | changes).encode() + b"\n", *filter(None, [first]), *others]
    (run / "results.jsonl").write_bytes(b"".join(before))
    with pytest.raises(ConfigError, match=r"results\.jsonl: expected each trial of this attack at most once"):
        experiments.run(ATTACK, out=run)
    assert lines_of(run) == before


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"3"])
def test_a_damaged_summary_is_no_finished_run(cut, content):
    run = cut("attack")
    (run / "summary.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"summary\.json: missing or damaged .* Remove it and run"):
        experiments.run(ATTACK, out=run)
    (run / "summary.json").unlink()
    assert experiments.run(ATTACK, out=run).summary["type"] == "attack"


def full_from(monkeypatch, at):
    """The disk is full from the `at`-th write on; how many there were."""
    count, fsync = [0], os.fsync

    def full(handle):
        count[0] += 1
        if count[0] >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    return count


@pytest.mark.parametrize("at", range(2, 40, 4))
def test_a_training_on_a_full_disk_goes_on_as_if_nothing_had_been(ended, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        count = full_from(patch, at)
        with pytest.raises(ConfigError, match=r"No space left on device.* make room.* same command goes on"):
            experiments.run(TRAINING, out=tmp_path / "run")
        assert count[0] >= at
    run = experiments.run(TRAINING, out=tmp_path / "run")
    assert (run.path / "global.safetensors").read_bytes() == (
        ended / "train" / "global.safetensors"
    ).read_bytes()
    assert [r["round"] for r in run.results() if r["event"] == "round"] == [0, 1, 2]


@pytest.mark.parametrize("at", range(2, 17, 3))
def test_so_does_an_attack(ended, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        full_from(patch, at)
        with pytest.raises(ConfigError, match=r"No space left on device.* make room.* same command goes on"):
            experiments.run(ATTACK, out=tmp_path / "run")
    run = experiments.run(ATTACK, out=tmp_path / "run")

    def figures(path):
        return [{**json.loads(line), "elapsed": 0} for line in lines_of(path)]

    assert figures(run.path) == figures(ended / "attack")
    assert len(list((run.path / "reconstructions").iterdir())) == 2


def test_curves_for_tensorboard(tmp_path):
    config = TrainConfig(training=FederatedTraining(rounds=1))
    run = experiments.run(config, out=tmp_path / "run", tensorboard=True)
    (events,) = (run.path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"accuracy", b"loss", b"lr"))


def test_curves_without_tensorboard_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = TrainConfig(training=FederatedTraining(rounds=1))
    with pytest.raises(ConfigError, match=r"fedkl\[tensorboard\]"):
        experiments.run(config, out=tmp_path / "run", tensorboard=True)


def test_a_locked_training_leaves_nothing_private_in_its_folder(tmp_path):
    run = experiments.run(
        TrainConfig(defense=KeyLock(), training=FederatedTraining(rounds=1)), out=tmp_path / "run"
    )
    assert set(run.load_tensors("global")) == {
        f"{layer}.{part}" for layer in ("conv1", "conv2", "conv3", "fc") for part in ("weight", "bias")
    }
    for path in run.path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"parametrizations" not in content
            assert b"running_mean" not in content


@pytest.mark.parametrize("defense", [KeyLock, PrivateNorm], ids=["lock", "control"])
def test_a_lock_per_element_takes_its_shape_from_the_data(tmp_path, defense):
    lock = KeyLock(granularity="element", activation="tanh", private=("head",), key_length=16)
    config = TrainConfig(
        defense=lock if defense is KeyLock else defense(like=lock), training=FederatedTraining(rounds=1)
    )
    run = experiments.run(config, out=tmp_path / "run")
    assert run.config == config  # repeated on other data, it takes the shape from there
    assert run.summary["private_parameters"] == 7690 + 2 * 12 * 16 * 16 * (17 if defense is KeyLock else 1)
    assert set(run.load_tensors("global")) == {
        f"conv{index}.{part}" for index in (1, 2, 3) for part in ("weight", "bias")
    }


def test_every_arm_of_a_lock_with_all_variants(tmp_path):
    lock = KeyLock(granularity="element", activation="tanh", private=("head",), key_length=16)
    arms = tuple(arm.name for arm in arms_of(lock).values() if arm.name != "lock-calibrated")
    config = TINY.model_copy(update={"defense": lock, "arms": arms, "trials": 1})
    run = experiments.run(config, out=tmp_path / "run")
    assert {record["arm"] for record in trials_in(run)} == set(arms)


def test_failures_are_counted_not_dropped():
    arm = arms_of(KeyLock())["lock"]
    good = {
        "mse": 0.1, "psnr": 35.0, "ssim": 0.6, "correlation": 0.9, "psnr_raw": 9.0, "psnr_affine": 11.0,
        "ssim_affine": 0.6, "identified": True, "rank": 1, "candidates": 100, "label_correct": True,
    }  # fmt: skip
    failed = dict.fromkeys(good) | {"identified": False, "rank": 100, "candidates": 100}
    records = [
        {"trial": number, "scores": [score], "scaling": "prior", "evaluations": 5, "loss": loss}
        for number, (score, loss) in enumerate(((good, 0.1), (failed, None)))
    ]
    summary = arm_summary(arm, records)
    assert summary["figures"]["psnr"]["n"] == 2
    assert summary["figures"]["psnr"]["failures"] == 1
    assert summary["success"]["rate"] == 0.5
    assert summary["ssim_success"]["rate"] == 0.5
    assert summary["identified"]["rate"] == 0.5
    json.dumps(summary, allow_nan=False)


def test_too_many_auxiliary_images(tmp_path):
    with pytest.raises(ConfigError, match="auxiliary"):
        experiments.run(TrainConfig(auxiliary=500), out=tmp_path / "run")


def test_the_demo_runs_every_experiment_once(tmp_path, monkeypatch):
    tiny = {"train": TrainConfig(training=FederatedTraining(rounds=1)), "attack": TINY}
    monkeypatch.setattr(demo, "EXPERIMENTS", tiny)
    seen = []

    class Shown:
        def __init__(self, title):
            seen.append(title)

        def __enter__(self):
            return lambda done, total, note: None

        def __exit__(self, *_):
            return None

    demo.run(tmp_path / "demo", progress=Shown)
    first = (tmp_path / "demo" / "attack" / "results.jsonl").read_text()
    demo.run(tmp_path / "demo", progress=Shown)
    assert seen == ["train", "attack"] * 2
    assert (tmp_path / "demo" / "attack" / "results.jsonl").read_text() == first


def test_the_demos_attacks_stand_side_by_side_and_its_trainings_differ_in_one_thing():
    """Of the demo as it is: the same four images, network and seed; accuracies that can be compared."""
    trains = [each for each in demo.EXPERIMENTS.values() if isinstance(each, TrainConfig)]
    attacks = [each for each in demo.EXPERIMENTS.values() if isinstance(each, AttackConfig)]
    same = {repr(each.model_copy(update={"attack": None, "arms": ()})) for each in attacks}
    assert len(same) == 1 < len(attacks)
    assert all({"no-norm", "lock", "masked"} <= set(each.arms) for each in attacks)
    plain, locked, masked = trains
    assert locked.model_copy(update={"defense": plain.defense}) == plain
    assert locked.defense == attacks[0].defense
    training = dataclasses.replace(masked.training, aggregation=plain.training.aggregation)
    assert masked.model_copy(update={"training": training}) == plain
    assert masked.training.aggregation.server_learns == "nothing"


def test_reconstructions_are_kept_with_their_truth(tmp_path):
    run = experiments.run(TINY, out=tmp_path / "run")
    kept = run.load_tensors("reconstructions/lock-1")
    assert kept["reconstruction"].shape == kept["truth"].shape == (1, 3, 32, 32)
    assert torch.isfinite(kept["reconstruction"]).all()


def test_the_servers_own_images_are_of_all_classes_where_test_images_are_sorted(tmp_path, monkeypatch):
    """Folders of images come class by class: the first hundred would be of one class."""
    whole = data.load("mnist-sample")
    order = whole.test_labels.argsort(stable=True)
    sorted_test = {"test_images": whole.test_images[order], "test_labels": whole.test_labels[order]}
    train = {"train_images": whole.train_images[:64], "train_labels": whole.train_labels[:64]}
    monkeypatch.setattr(data, "load", lambda *_, **__: data.Dataset(whole.spec, **train, **sorted_test))
    seen = {}

    def note(**given):
        seen.update(given)
        return []

    monkeypatch.setattr(trainings, "server_fill_ins", note)
    experiments.run(
        TrainConfig(defense=KeyLock(), training=FederatedTraining(rounds=1)), out=tmp_path / "run"
    )
    (auxiliary, labels), (test, test_labels) = seen["auxiliary"], seen["test"]
    assert len(auxiliary) == len(labels) == 100
    assert len(labels.unique()) == len(test_labels.unique()) == 10
    assert len(test) == len(test_labels) == 400
    together = torch.cat([auxiliary[:, 0], test[:][:, 0]]).flatten(1)
    assert len(together.unique(dim=0)) == len(whole.test_images[:, 0].flatten(1).unique(dim=0))


def test_a_refused_experiment_leaves_its_folder_free(tmp_path):
    wrong = TrainConfig(model=ModelConfig(name="nope"))
    with pytest.raises(ConfigError, match="nope"):
        experiments.run(wrong, out=tmp_path / "run")
    experiments.run(TrainConfig(training=FederatedTraining(rounds=1)), out=tmp_path / "run")
