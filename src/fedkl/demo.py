"""The main job end to end on the real images inside the package, in minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from fedkl import experiments, study
from fedkl.attacks import DLG
from fedkl.config import AttackConfig, ModelConfig, TrainConfig
from fedkl.defenses import Defense, KeyLock, NoDefense
from fedkl.federated import FederatedTraining, LocalTraining

TRAINING = FederatedTraining(rounds=15, local=LocalTraining(batch_size=16))


def _train(defense: Defense) -> TrainConfig:
    return TrainConfig(defense=defense, training=TRAINING)


EXPERIMENTS: dict[str, TrainConfig | AttackConfig] = {
    "train-fedavg": _train(NoDefense()),
    "train-fedkl": _train(KeyLock()),
    "attack-dlg": AttackConfig(
        model=ModelConfig(initialization="default"),
        attack=DLG(evaluations=1600, weighting="sqrt", box=1e-3),
        arms=("no-norm", "public-norm", "private-norm", "lock", "lock-known-both"),
        trials=4,
    ),
}


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
