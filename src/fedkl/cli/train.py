"""`fedkl train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from fedkl.cli.commands import Continued
from fedkl.cli.options import (
    DEFENSES,
    MASKINGS,
    ConfigOption,
    DataOption,
    LayersOption,
    LockOption,
    ModelOption,
    OutOption,
    SeedOption,
    SetOption,
    one_of,
)
from fedkl.cli.terminal import finish, progress_bar
from fedkl.errors import ConfigError

if TYPE_CHECKING:
    from fedkl.config import AttackConfig, TrainConfig

FIELDS = {
    "--data": "data.name",
    "--model": "model.name",
    "--clients": "training.clients",
    "--rounds": "training.rounds",
    "--partition": "training.partition",
    "--masking": "training.aggregation",
    "--seed": "seed",
}
"""The field of config.toml that a flag sets."""


class TrainCommand(Continued):
    """The command, and what its former flags are now."""

    removed: ClassVar[Mapping[str, str]] = {
        "--data-root": "--set data.root=FOLDER",
        "--initialization": "--set model.initialization=NAME",
        "--standardize": "--set model.standardize=true",
        "--raw": "--set model.standardize=false",
        "--cohort": "--set training.cohort=NUMBER",
        "--centralized": "--clients 1",
        "--algorithm": "--set training.local.algorithm=NAME",
        "--epochs": "--set training.local.epochs=NUMBER",
        "--batch-size": "--set training.local.batch_size=NUMBER",
        "--lr": "--set training.local.lr=NUMBER",
        "--augmentation": "--set training.local.augmentation=NAME",
        "--eval-every": "--set training.eval_every=NUMBER",
        "--device": "--set execution.device=NAME",
        "--workers": "--set execution.workers=NUMBER",
    }


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("train", cls=TrainCommand)(train)


def train(
    out: OutOption,
    config: ConfigOption = None,
    data: DataOption = None,
    model: ModelOption = None,
    defense: Annotated[
        str | None,
        typer.Option(
            help="none, keylock, dp-sgd, pruning …: see `fedkl attack --list`.",
            show_default="none",
            autocompletion=one_of(DEFENSES),
        ),
    ] = None,
    lock: LockOption = None,
    layers: LayersOption = None,
    clients: Annotated[
        int | None, typer.Option(help="Number of clients; 1: centralized.", show_default="3")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Communication rounds.", show_default="200")] = None,
    partition: Annotated[
        str | None, typer.Option(help="iid, shards:<per client> or dirichlet:<alpha>.", show_default="iid")
    ] = None,
    masking: Annotated[
        str | None,
        typer.Option(
            help="blind: the server reads nothing. pairwise: it reads only the sum. both: it reads nothing, "
            "and members cannot read one another. none: it reads every update.",
            show_default="none",
            autocompletion=one_of(MASKINGS),
        ),
    ] = None,
    seed: SeedOption = None,
    settings: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, as its config.toml says.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard events too (fedkl[tensorboard]).")
    ] = False,
) -> None:
    """Trains a federation in one process, and tests what the server could make of its own model.

    The same command goes on with a run that was interrupted; --resume does so without the other flags.
    --set sets what has no flag: --set training.local.lr=0.1. Its places are those of a run's config.toml.
    """
    from fedkl import experiment_flags, experiments

    flags = {
        "--data": data,
        "--model": model,
        "--clients": clients,
        "--rounds": rounds,
        "--partition": partition,
        "--masking": masking,
        "--seed": seed,
    }
    experiment: TrainConfig | AttackConfig
    if resume:
        more = {
            "--config": config,
            "--defense": defense,
            "--lock": lock,
            "--layers": layers,
            "--set": settings,
        }
        experiment = _resumed(out, flags | more)
    else:
        fields: dict[str, Any] = {FIELDS[flag]: value for flag, value in flags.items()}
        if partition is not None:
            fields["training.partition"] = experiment_flags.partition_fields(partition)
        if masking is not None:
            fields["training.aggregation"] = experiment_flags.aggregation_fields(masking)
        experiment = experiment_flags.from_flags(
            "train",
            file=config,
            fields=fields,
            defense=defense,
            lock=lock,
            layers=layers,
            settings=settings or (),
        )
    with progress_bar("train") as progress:
        experiments.run(experiment, out=out, progress=progress, tensorboard=tensorboard)
    finish(out)


def _resumed(out: Path, flags: dict[str, Any]) -> TrainConfig:
    from fedkl.config import TrainConfig
    from fedkl.runs import RunDirectory

    given = [flag for flag, value in flags.items() if value is not None]
    if given:
        raise ConfigError(f"--resume takes the experiment from {out}; leave out {', '.join(given)}.")
    experiment = RunDirectory.open(out).config
    if not isinstance(experiment, TrainConfig):
        raise ConfigError(f"{out}: not a training. Repeat the command that started it to go on with it.")
    return experiment
