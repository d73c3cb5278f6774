"""Experiments end to end on the packaged sample: resumed, complete, and honest about failures."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from fedkl import data, demo, experiments
from fedkl.attacks import DLG
from fedkl.auditing import standard_arms
from fedkl.config import AttackConfig, DataConfig, ModelConfig, TrainConfig
from fedkl.defenses import KeyLock, PrivateNorm
from fedkl.errors import ConfigError, DataError
from fedkl.federated import FederatedTraining

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


def test_a_trial_that_lacks_an_arm_is_repeated_in_all_arms(tmp_path):
    """Its arms must attack one and the same victim, whose secrets died with the process."""
    run = experiments.run(TINY, out=tmp_path / "run")
    records = list(run.results())
    kept = [r for r in records if (r["arm"], r["trial"]) != ("lock", 1)]
    run.restart_from(kept)
    (run.path / "summary.json").unlink()
    again = list(experiments.run(TINY, out=tmp_path / "run").results())
    assert sorted((r["arm"], r["trial"]) for r in again) == sorted((r["arm"], r["trial"]) for r in records)
    assert again[:2] == [r for r in records if r["trial"] == 0]


def test_a_client_that_lacks_an_update_is_attacked_again(tmp_path):
    config = TINY.model_copy(update={"trials": 4, "updates_per_client": 2, "networks": "one"})
    run = experiments.run(config, out=tmp_path / "run")
    records = list(run.results())
    run.restart_from([r for r in records if (r["arm"], r["trial"]) != ("lock", 3)])
    (run.path / "summary.json").unlink()
    again = list(experiments.run(config, out=tmp_path / "run").results())
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
    with pytest.raises(ConfigError, match="auxiliary: expected fewer than 50, got 50"):
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
    arms = tuple(arm.name for arm in standard_arms(lock) if arm.name != "lock-calibrated")
    config = TINY.model_copy(update={"lock": lock, "arms": arms, "trials": 1})
    run = experiments.run(config, out=tmp_path / "run")
    assert {record["arm"] for record in run.results()} == set(arms)


def test_failures_are_counted_not_dropped():
    (arm,) = (a for a in standard_arms() if a.name == "lock")
    good = {
        "mse": 0.1, "psnr": 35.0, "ssim": 0.6, "correlation": 0.9, "psnr_raw": 9.0, "psnr_affine": 11.0,
        "ssim_affine": 0.6, "identified": True, "rank": 1, "candidates": 100, "label_correct": True,
    }  # fmt: skip
    failed = dict.fromkeys(good) | {"identified": False, "rank": 100, "candidates": 100}
    records = [
        {"scores": [score], "scaling": "prior", "evaluations": 5, "loss": loss}
        for score, loss in ((good, 0.1), (failed, None))
    ]
    summary = experiments.arm_summary(arm, records)
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

    monkeypatch.setattr(experiments, "server_fill_ins", note)
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
