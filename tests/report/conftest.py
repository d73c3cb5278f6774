"""Tiny run directories, made by the package's own writers from synthetic records."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedkl.attacking.results import arm_summary
from fedkl.attacking.views import chosen_arms
from fedkl.config import AttackConfig, DataConfig, TrainConfig
from fedkl.defenses import Arm, NoDefense
from fedkl.federated import FederatedTraining
from fedkl.runs import RunDirectory


def score(psnr: float | None, *, identified: bool = False) -> dict:
    names = ("mse", "ssim", "correlation", "psnr_raw", "psnr_affine", "ssim_affine")
    values = dict.fromkeys(names, None if psnr is None else 0.5)
    return {
        **values,
        "psnr": psnr,
        "identified": identified,
        "rank": 1 if identified else 50,
        "candidates": 100,
        "label_correct": None,
        "failed": psnr is None,
    }


def record(arm: str, trial: int, scores: list[dict]) -> dict:
    failed = all(s["failed"] for s in scores)
    return {
        "event": "trial",
        "arm": arm,
        "trial": trial,
        "loss": None if failed else 1e-6,
        "evaluations": 50,
        "scaling": "clip" if arm == "no-norm" else "prior",
        "scores": scores,
        "elapsed": 1.0,
    }


@pytest.fixture
def attack_run(tmp_path):
    def make(
        psnr: dict[str, list[float | None]],
        *,
        identified: tuple[str, ...] = (),
        name: str = "attack",
        finished: bool = True,
        description: str | None = None,
        pictures: bool = True,
        floor: dict | None = None,
        not_run: list[dict] | None = None,
        **options,
    ) -> RunDirectory:
        """`options` are the configuration's."""
        trials = len(next(iter(psnr.values())))
        config = AttackConfig(arms=tuple(psnr), trials=trials, **options)
        run = RunDirectory.create(tmp_path / name, config=config, version="0")
        records = [
            record(arm, trial, [score(value, identified=arm in identified)])
            for arm, values in psnr.items()
            for trial, value in enumerate(values)
        ]
        for entry in records:
            run.append(entry)
            if pictures:
                _save_pictures(run, entry)
        if finished:
            arms = [_described(arm, description) for arm in chosen_arms(config)]
            summaries = [arm_summary(arm, [r for r in records if r["arm"] == arm.name]) for arm in arms]
            summary = {
                "type": "attack",
                "attack": config.attack.type,
                "initialization": "uniform",
                "arms": summaries,
                "floor": floor,
                "not_run": not_run or [],
            }
            run.finish({**summary, "trials": trials, "batch_size": 1, "seconds": 1.0})
        return run

    return make


def _described(arm: Arm, description: str | None) -> Arm:
    text = description or arm.description
    return replace(arm, description=text)


def _save_pictures(run: RunDirectory, entry: dict) -> None:
    truth = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(entry["trial"]))
    found = torch.full_like(truth, float("nan")) if entry["scores"][0]["failed"] else truth * 3 - 1
    tensors = {"reconstruction": found, "truth": truth}
    run.save_tensors(f"reconstructions/{entry['arm']}-{entry['trial']}", tensors)


@pytest.fixture
def train_run(tmp_path):
    def make(
        name: str,
        *,
        accuracy: float = 0.9,
        defense=None,
        fill_ins: dict[str, float] | None = None,
        statistics: str = "re-estimated",
        rounds: int = 3,
        done: int = 3,
        test_images: int = 500,
        class_counts: list[list[int]] | None = None,
        local_accuracies: dict[str, float] | None = None,
        summary: dict | None = None,
        lost: dict[int, str] | None = None,
        data: str = "mnist-sample",
        **training,
    ) -> RunDirectory:
        """`lost` are rounds, and why. Runs of older versions lack it, as other things that are None here."""
        federated = FederatedTraining(rounds=rounds, **training)
        config = TrainConfig(data=DataConfig(name=data), defense=defense or NoDefense(), training=federated)
        run = RunDirectory.create(tmp_path / name, config=config, version="0")
        each = {"client-0": accuracy - 0.01, "client-1": accuracy + 0.01}
        if class_counts is not None:
            run.append({"event": "partition", "class_counts": class_counts})
        local = {} if local_accuracies is None else {"local_accuracies": local_accuracies}
        for index in range(done):
            entry = {"event": "round", "round": index, "seconds": 0.1, "accuracy": accuracy}
            why = {"lost": lost[index]} if lost and index in lost else {}
            run.append({**entry, "accuracies": each, "update_bytes": 100, **local, **why})
        if done == rounds:
            completed = _fill_ins(fill_ins or {}, statistics)
            figures = _train_summary(config, accuracy, each, completed, test_images)
            run.finish(figures | (summary or {}))
        return run

    return make


def _fill_ins(accuracies: dict[str, float], statistics: str) -> list[dict]:
    shared = {"statistics": statistics, "auxiliary": 100 if statistics == "re-estimated" else 0}
    return [{"arm": arm, "accuracy": value, **shared} for arm, value in accuracies.items()]


def _train_summary(
    config: TrainConfig, accuracy: float, each: dict, fill_ins: list[dict], test_images: int
) -> dict:
    return {
        "type": "train",
        "defense": config.defense.type,
        "clients": config.training.clients,
        "rounds": config.training.rounds,
        "test_images": test_images,
        "classes": 10,
        "accuracy": accuracy,
        "best_accuracy": accuracy,
        "accuracies": each,
        "fill_ins": fill_ins,
        "public_parameters": 1000,
        "private_parameters": 10,
        "update_bytes": 4000,
        "seconds": 2.0,
    }
