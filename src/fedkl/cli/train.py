"""`fedkl train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkl.cli.commands import Continued
from fedkl.cli.options import (
    ConfigOption,
    DataOption,
    InitOption,
    LayersOption,
    LockOption,
    ModelOption,
    OutOption,
    RootOption,
    SeedOption,
    SetOption,
)
from fedkl.cli.terminal import finish, progress_bar
from fedkl.errors import ConfigError

if TYPE_CHECKING:
    from fedkl.config import AttackConfig, TrainConfig


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("train", cls=Continued)(train)


def train(
    out: OutOption,
    config: ConfigOption = None,
    defense: Annotated[
        str | None,
        typer.Option(
            help="none, keylock, private-layers, or the norm-matched controls public-norm and private-norm."
        ),
    ] = None,
    lock: LockOption = None,
    layers: LayersOption = None,
    data_name: DataOption = None,
    data_root: RootOption = None,
    model: ModelOption = None,
    initialization: InitOption = None,
    standardize: Annotated[
        bool | None,
        typer.Option("--standardize/--raw", help="Let the model standardize its input by channel."),
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Number of clients.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients sampled each round; all if not given.")] = None,
    centralized: Annotated[bool, typer.Option("--centralized", help="One client with all the data.")] = False,
    partition: Annotated[
        str | None, typer.Option(help="iid, shards:<per client> or dirichlet:<alpha>.")
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="fedavg (weights) or fedsgd (gradients).")] = None,
    rounds: Annotated[int | None, typer.Option(help="Communication rounds.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Local epochs of a round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, before its schedule.")] = None,
    augmentation: Annotated[
        str | None, typer.Option(help="none, flip, crop-flip or resized-crop-flip.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Rounds between evaluations.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    workers: Annotated[int | None, typer.Option(help="Clients that train at once; 0: automatic.")] = None,
    settings: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, as its config.toml says.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard events too (fedkl[tensorboard]).")
    ] = False,
    seed: SeedOption = None,
) -> None:
    """Federated training in one process, then the server's own model under every fill-in.

    The same command goes on with a run that was interrupted; --resume does so without the other flags.
    """
    from fedkl import config as configs
    from fedkl import experiments

    if centralized and clients not in (None, 1):
        raise ConfigError(f"--centralized is one client; got --clients {clients}. Give one of the two.")
    fields = {
        "seed": seed,
        "data.name": data_name,
        "data.root": data_root,
        "model.name": model,
        "model.initialization": initialization,
        "model.standardize": standardize,
        "training.clients": 1 if centralized else clients,
        "training.cohort": cohort,
        "training.partition": None if partition is None else configs.partition_fields(partition),
        "training.rounds": rounds,
        "training.eval_every": eval_every,
        "training.local.algorithm": algorithm,
        "training.local.epochs": epochs,
        "training.local.batch_size": batch_size,
        "training.local.lr": lr,
        "training.local.augmentation": augmentation,
        "execution.device": device,
        "execution.workers": workers,
    }
    experiment: TrainConfig | AttackConfig
    if resume:
        experiment = _resumed(
            out,
            fields | {"config": config, "defense": defense, "lock": lock, "layers": layers, "set": settings},
        )
    else:
        experiment = configs.from_flags(
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


def _resumed(out: Path, flags: dict[str, object]) -> TrainConfig:
    from fedkl.config import TrainConfig
    from fedkl.runs import RunDirectory

    given = [name for name, value in flags.items() if value is not None]
    if given:
        raise ConfigError(f"--resume takes the experiment from {out}; leave out {', '.join(given)}.")
    experiment = RunDirectory.open(out).config
    if not isinstance(experiment, TrainConfig):
        raise ConfigError(f"{out}: not a training. Repeat the command that started it to go on with it.")
    return experiment
