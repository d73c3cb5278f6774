"""What leaks, what reads the published lock, and what masks leave of it, on real images, in minutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from fedkl import experiments, study, wording
from fedkl.aggregation import MaskedAggregation
from fedkl.attacks import DLG, Attack, ClosedForm
from fedkl.config import AttackConfig, ModelConfig, TrainConfig
from fedkl.defenses import PUBLISHED_LOCK
from fedkl.federated import FederatedTraining, LocalTraining
from fedkl.report.collect import TrainRun, collect
from fedkl.report.names import plain_trainings
from fedkl.report.side_by_side import side_by_side

TRAINING = FederatedTraining(rounds=15, local=LocalTraining(batch_size=16))
MASKED = replace(TRAINING, aggregation=MaskedAggregation())


def _attack(attack: Attack, *arms: str) -> AttackConfig:
    """The same four images in every attack, each sent alone: the report shows them side by side."""
    return AttackConfig(
        model=ModelConfig(initialization="default"),
        attack=attack,
        defense=PUBLISHED_LOCK,
        arms=arms,
        trials=4,
    )


EXPERIMENTS: dict[str, TrainConfig | AttackConfig] = {
    "train-plain": TrainConfig(training=TRAINING),
    "train-locked": TrainConfig(training=TRAINING, defense=PUBLISHED_LOCK),
    "train-masked": TrainConfig(training=MASKED),
    "attack-dlg": _attack(
        DLG(evaluations=500, weighting="sqrt", box=1e-3), "no-norm", "public-norm", "lock", "masked"
    ),
    "attack-knowing-the-lock": _attack(ClosedForm(), "no-norm", "lock", "masked"),
}
"""Small trainings of all three, then an attacker who does not know the lock, and one who does."""


def run(out: Path, *, progress: Callable[[str], AbstractContextManager[study.Progress]]) -> None:
    """Runs all experiments of the demo into sub-folders of `out`; finished ones are not repeated.

    Args:
        out: The demo's folder.
        progress: Opens a progress display for an experiment's name.

    Raises:
        FedKLError: The folder is not usable.
    """
    threads = torch.get_num_threads()
    for name, config in EXPERIMENTS.items():
        if isinstance(config, AttackConfig):
            torch.set_num_threads(1)  # an attack's batch of networks this small is slower on several
        try:
            with progress(name) as step:
                experiments.run(config, out=out / name, progress=step)
        finally:
            torch.set_num_threads(threads)


def answers(out: Path) -> list[str]:
    """What the finished demo shows, a sentence each: what leaks, who reads the lock, what masks leave.

    Args:
        out: The demo's folder.

    Raises:
        ConfigError: A run in it is damaged.
    """
    collected = collect(out)
    opening = side_by_side(collected.attacks)
    lines = [] if opening is None else [f"{sent}: {found}" for sent, found in opening.answers]
    trained, names = {run.name: run for run in collected.trains}, plain_trainings(collected.trains)
    return [
        *lines,
        *_accuracies({names[name]: trained[name] for name in EXPERIMENTS if name in trained}),
        *([] if opening is None else [opening.limits]),
    ]


def _accuracies(runs: Mapping[str, TrainRun]) -> list[str]:
    """One sentence, or none where nothing was trained."""
    if not runs:
        return []
    each = ", ".join(f"{name} {wording.percent(run.summary['accuracy'])}" for name, run in runs.items())
    first = next(iter(runs.values())).summary
    about = f"after {first['rounds']} rounds, on {first['test_images']} test images"
    return [f"Accuracy {about}: {each}."]
