"""Run directories: trainings and attacks, finished and interrupted, alone and several together."""

from __future__ import annotations

import tempfile
import zlib
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import torch

from fedkl import experiments, report
from fedkl.attacking.results import arm_summary
from fedkl.attacking.views import chosen_arms
from fedkl.config import AttackConfig, TrainConfig
from fedkl.data import Dataset, DataSpec, Shards
from fedkl.defenses import KeyLock, NoDefense
from fedkl.errors import FedKLError
from fedkl.export import export
from fedkl.federated import FederatedTraining
from fedkl.report import figures
from fedkl.runs import RunDirectory
from tests.fuzzing.archive import packed, unpacked
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import ArchiveSurface

_DRAWN = 16  # one input in so many has its figures drawn: they take longer than all the rest
_FIGURES = ("picture_grid", "accuracy_curves", "partition_map")


class RunDirectories(ArchiveSurface):
    """`report.build`, `export`, and everything that `RunDirectory` reads, of one run or of several."""

    name = "run_directories"
    precious = ("notes.txt",)
    confined = True
    quick = 110
    target = "fedkl.report.build"

    def __init__(self) -> None:
        self._draw = False

    def seeds(self) -> list[bytes]:
        """Runs written by the package's own writers from invented records."""
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            runs = [
                _attack(root / "attack"),
                _attack(root / "short", finished=False),
                _train(root / "train"),
                _train(root / "locked", defense=KeyLock()),
                _train(root / "stopped", finished=False),
            ]
            together = {
                f"{name}/{file}": c for name in ("train", "locked") for file, c in _files(root / name).items()
            }
            return [packed(_files(run)) for run in runs] + [packed(together)]

    def setting(self) -> AbstractContextManager[object]:
        """Small figures, or none."""
        stack = ExitStack()
        stack.enter_context(mock.patch.object(figures, "_DPI", 20))
        for name in () if self._draw else _FIGURES:
            stack.enter_context(mock.patch.object(figures, name, return_value=b"figure"))
        return stack

    def run(self, data: bytes, folder: Path) -> str:
        """See `Surface.run`; which inputs have their figures drawn depends on nothing else."""
        self._draw = zlib.crc32(data) % _DRAWN == 0
        return super().run(data, folder)

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Reads a run in every way, then goes on with it."""
        sandbox.write(unpacked(data))
        place = sandbox.place
        self.attempt(lambda: self._read(place))
        self.attempt(lambda: report.build(place))
        self.attempt(lambda: export(place, out=place / "exported.safetensors"))
        self.attempt(lambda: self._continue(place))
        RunDirectory.open(place)

    def _read(self, place: Path) -> None:
        run = RunDirectory.open(place)
        for step in (lambda: run.summary, lambda: list(run.results()), lambda: run.load_tensors("global")):
            self.attempt(step)

    def _continue(self, place: Path) -> None:
        """Goes on with the run, up to where its work would begin, then as another experiment."""
        config = RunDirectory.open(place).config
        with ExitStack() as stack:
            for module, stubs in _STUBS.items():
                stack.enter_context(mock.patch.multiple(module, **stubs))
            self.attempt(lambda: experiments.run(config, out=place))
        list(RunDirectory.create(place, config=config, version="0").results())
        RunDirectory.create(place, config=TrainConfig(seed=99), version="0")


class _StoppedError(FedKLError):
    """Here the work would begin."""


def _stop(*arguments: object, **options: object) -> NoReturn:
    raise _StoppedError("the work would begin")


class _Federation:
    """Stands for the federation of a training; nothing is trained."""

    class_counts = torch.ones(2, 2, dtype=torch.int64)

    def __init__(self, *arguments: object, **options: object) -> None:
        self.run = _stop


class _Checkpoints:
    """Stands for a training's checkpoints: one round is done."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self.save = _stop

    def restore(self, federation: object) -> int:
        return 1


def _dataset(*arguments: object, **options: object) -> Dataset:
    spec = DataSpec(name="toy", shape=(3, 4, 4), classes=10, mean=(0.5,) * 3, std=(0.3,) * 3)
    images, labels = torch.full((150, 3, 4, 4), 0.5), torch.arange(150) % 10
    return Dataset(spec, train_images=images, train_labels=labels, test_images=images, test_labels=labels)


# What takes long when an experiment is run; the run's folder is read and written as ever.
_STUBS: dict[str, dict[str, Any]] = {
    "fedkl.attacking.run": {"attack_arms": _stop},
    "fedkl.training": {
        "Federation": _Federation,
        "Checkpoints": _Checkpoints,
        "default_passphrase": lambda: "horse",
    },
    "fedkl.configured": {
        "data": SimpleNamespace(load=_dataset),
        "models": SimpleNamespace(build_model=lambda *arguments, **options: torch.nn.Identity()),
    },
}


def _files(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def _attack(path: Path, *, finished: bool = True) -> Path:
    config = AttackConfig(arms=("public-norm", "lock"), trials=1)
    run = RunDirectory.create(path, config=config, version="0")
    records = [_trial(run, arm, psnr) for arm, psnr in (("public-norm", 35.0), ("lock", None))]
    if finished:
        arms = [arm_summary(a, [r for r in records if r["arm"] == a.name]) for a in chosen_arms(config)]
        summary = {"type": "attack", "attack": "dlg", "initialization": "uniform", "arms": arms}
        run.finish({**summary, "trials": 1, "batch_size": 1, "seconds": 1.0})
    return path


def _trial(run: RunDirectory, arm: str, psnr: float | None) -> dict[str, Any]:
    truth = torch.linspace(0, 1, 48).reshape(1, 3, 4, 4)
    found = torch.full_like(truth, float("nan")) if psnr is None else truth * 3 - 1
    run.save_tensors(f"reconstructions/{arm}-0", {"reconstruction": found, "truth": truth})
    names = ("mse", "ssim", "correlation", "psnr_raw", "psnr_affine", "ssim_affine")
    score: dict[str, Any] = dict.fromkeys(names, None if psnr is None else 0.5)
    score |= {"psnr": psnr, "identified": False, "rank": 50, "candidates": 100, "failed": psnr is None}
    record = {"event": "trial", "arm": arm, "trial": 0, "loss": None if psnr is None else 1e-6}
    record |= {"evaluations": 50, "scaling": "prior", "elapsed": 1.0}
    record["scores"] = [{**score, "label_correct": None}]
    run.append(record)
    return record


def _train(path: Path, *, defense: Any = None, finished: bool = True) -> Path:
    training = FederatedTraining(rounds=2, clients=2, partition=Shards(per_client=2))
    config = TrainConfig(defense=defense or NoDefense(), training=training)
    run = RunDirectory.create(path, config=config, version="0")
    run.append({"event": "partition", "class_counts": [[3, 4], [5, 6]]})
    each = {"client-0": 0.8, "client-1": 0.9}
    for number in range(1 + finished):
        record = {"event": "round", "round": number, "seconds": 0.1, "lr": 0.1, "loss": 1.5, "updates": 2}
        record |= {"dropped": [], "failed": {}, "aggregated": True, "accuracies": each, "accuracy": 0.85}
        run.append({**record, "local_accuracies": each, "update_bytes": 100, "elapsed": 1.0})
    run.save_tensors("global", {"fc.weight": torch.ones(2, 2)})
    if finished:
        run.finish(_train_summary(config, each))
    return path


def _train_summary(config: TrainConfig, each: dict[str, float]) -> dict[str, Any]:
    fill_in = {"arm": "neutral", "accuracy": 0.1, "statistics": "re-estimated", "auxiliary": 100}
    return {
        "type": "train", "defense": config.defense.type, "clients": 2, "rounds": 2, "test_images": 500,
        "classes": 10, "accuracy": 0.85, "best_accuracy": 0.9, "accuracies": each, "local_accuracy": 0.8,
        "fill_ins": [fill_in] if config.defense.type == "keylock" else [], "public_parameters": 1000,
        "private_parameters": 10, "update_bytes": 4000, "seconds": 2.0, "statistics_shared": True,
        "dropped": 1, "failed": 0, "skipped_rounds": 0,
    }  # fmt: skip
