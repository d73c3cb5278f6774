"""`fedkl attack`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedkl.cli.commands import Continued
from fedkl.cli.listing import print_attacks
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
from fedkl.cli.terminal import finish, names, progress_bar
from fedkl.errors import AttackError


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("attack", cls=Continued)(attack)


def _list(wanted: bool) -> bool:
    if wanted:
        print_attacks()
        raise typer.Exit
    return wanted


def attack(
    out: OutOption,
    config: ConfigOption = None,
    kind: Annotated[str | None, typer.Option("--attack", help="One of --list.", show_default="dlg")] = None,
    arms: Annotated[
        str | None, typer.Option(help="Comma-separated, of --list.", show_default="the lock and its controls")
    ] = None,
    lock: LockOption = None,
    layers: LayersOption = None,
    labels: Annotated[
        bool | None, typer.Option("--labels-known/--labels-unknown", help="Grant the labels, in every arm.")
    ] = None,
    auxiliary: Annotated[int | None, typer.Option(help="Labeled images that the server owns.")] = None,
    trials: Annotated[int | None, typer.Option(help="Test images, or batches of them, attacked.")] = None,
    networks: Annotated[str | None, typer.Option(help="each: one per trial; one: the same for all.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images behind one gradient.")] = None,
    updates_per_client: Annotated[
        int | None, typer.Option(help="Trials in a row with one client's key; needs --networks one.")
    ] = None,
    cohort: Annotated[
        int | None, typer.Option(help="Clients that share a batch; their mean is seen.")
    ] = None,
    evaluations: Annotated[int | None, typer.Option(help="Budget of one start, in evaluations.")] = None,
    restarts: Annotated[int | None, typer.Option(help="Starts per image.")] = None,
    weighting: Annotated[str | None, typer.Option(help="Of layers: none, sqrt or full.")] = None,
    history: Annotated[int | None, typer.Option(help="Correction pairs of L-BFGS.")] = None,
    box: Annotated[float | None, typer.Option(help="Weight of the prior that pixels are in [0, 1].")] = None,
    norm_mode: Annotated[str | None, typer.Option(help="Of the client's norms: train or eval.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="SGD steps behind one update.")] = None,
    data_name: DataOption = None,
    data_root: RootOption = None,
    model: ModelOption = None,
    initialization: InitOption = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that share the trials; 0: all cores.")] = None,
    settings: SetOption = None,
    seed: SeedOption = None,
    listed: Annotated[
        bool,
        typer.Option(
            "--list",
            callback=_list,
            is_eager=True,
            help="Print the attacks with their options, and the arms, and stop.",
        ),
    ] = False,
) -> None:
    """Gradient inversion of the key-lock and its controls. An interrupted attack goes on.

    Attacks differ in their options; --set attack.NAME=VALUE sets any of them.
    """
    from fedkl import config as configs
    from fedkl import experiments

    fields = {
        "seed": seed,
        "data.name": data_name,
        "data.root": data_root,
        "model.name": model,
        "model.initialization": initialization,
        "arms": None if arms is None else names(arms),
        "labels_known": labels,
        "auxiliary": auxiliary,
        "trials": trials,
        "networks": networks,
        "batch_size": batch_size,
        "updates_per_client": updates_per_client,
        "cohort": cohort,
        "norm_mode": norm_mode,
        "local.steps": local_steps,
        "device": device,
        "workers": workers,
        "attack.evaluations": evaluations,
        "attack.restarts": restarts,
        "attack.weighting": weighting,
        "attack.history": history,
        "attack.box": box,
    }
    experiment = configs.from_flags(
        "attack",
        file=config,
        fields=fields,
        attack=kind,
        lock=lock,
        layers=layers,
        settings=settings or (),
    )
    try:
        with progress_bar("attack") as progress:
            experiments.run(experiment, out=out, progress=progress)
    except AttackError as error:
        if "generator" in str(error):  # the library does not know how a command line gives one
            raise AttackError(f"{error} {_GENERATOR}") from error
        raise
    finish(out)


_GENERATOR = "On the command line: --set attack.generator=NAME, e.g. attack.generator=mnist, or a file."
