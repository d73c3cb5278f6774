"""Runs an experiment of any kind into a run directory."""

from __future__ import annotations

from pathlib import Path

from fedkl.attacking.run import attack
from fedkl.config import AttackConfig, TrainConfig
from fedkl.runs import RunDirectory
from fedkl.study import Progress, silent
from fedkl.training import train


def run(
    config: TrainConfig | AttackConfig,
    *,
    out: Path,
    progress: Progress = silent,
    tensorboard: bool = False,
) -> RunDirectory:
    """Runs an experiment; a finished one is left as it is, an interrupted one is continued.

    Args:
        config: The experiment.
        out: The run directory.
        progress: Called after each step.
        tensorboard: Whether a training's curves are written as TensorBoard events too.

    Raises:
        FedKLError: The configuration, the data or the folder is not usable.
    """
    if isinstance(config, TrainConfig):
        return train(config, out=out, progress=progress, tensorboard=tensorboard)
    return attack(config, out=out, progress=progress)
