"""`fedkl attack`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import typer

from fedkl.cli.commands import Continued
from fedkl.cli.listing import print_attacks
from fedkl.cli.options import (
    ATTACKS,
    DEFENSES,
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
from fedkl.cli.terminal import finish, names, progress_bar
from fedkl.errors import AttackError

FIELDS = {
    "--arms": "arms",
    "--data": "data.name",
    "--model": "model.name",
    "--trials": "trials",
    "--batch-size": "batch_size",
    "--auxiliary": "auxiliary",
    "--seed": "seed",
}
"""The field of config.toml that a flag sets."""

_GENERATOR = "On the command line: --set attack.generator=NAME, e.g. attack.generator=mnist, or a file."


class AttackCommand(Continued):
    """The command, and what its former flags are now."""

    removed: ClassVar[Mapping[str, str]] = {
        "--data-root": "--set data.root=FOLDER",
        "--initialization": "--set model.initialization=NAME",
        "--labels-known": "--set labels_known=true",
        "--labels-unknown": "--set labels_known=false",
        "--networks": "--set networks=NAME",
        "--updates-per-client": "--set updates_per_client=NUMBER",
        "--cohort": "--set cohort=NUMBER",
        "--norm-mode": "--set norm_mode=NAME",
        "--local-steps": "--set local.steps=NUMBER",
        "--device": "--set device=NAME",
        "--workers": "--set workers=NUMBER",
        "--evaluations": "--set attack.evaluations=NUMBER",
        "--restarts": "--set attack.restarts=NUMBER",
        "--weighting": "--set attack.weighting=NAME",
        "--history": "--set attack.history=NUMBER",
        "--box": "--set attack.box=NUMBER",
    }


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("attack", cls=AttackCommand)(attack)


def _list(wanted: bool) -> bool:
    if wanted:
        print_attacks()
        raise typer.Exit
    return wanted


def attack(
    out: OutOption,
    config: ConfigOption = None,
    kind: Annotated[
        str | None,
        typer.Option("--attack", help="One of --list.", show_default="dlg", autocompletion=one_of(ATTACKS)),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Comma-separated, of --list.", show_default="the defense and its controls"),
    ] = None,
    defense: Annotated[
        str | None,
        typer.Option(help="One of --list.", show_default="keylock", autocompletion=one_of(DEFENSES)),
    ] = None,
    lock: LockOption = None,
    layers: LayersOption = None,
    data: DataOption = None,
    model: ModelOption = None,
    trials: Annotated[
        int | None, typer.Option(help="Test images, or batches of them, attacked.", show_default="20")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images behind one gradient.", show_default="1")
    ] = None,
    auxiliary: Annotated[
        int | None, typer.Option(help="Labeled images that the server owns.", show_default="0")
    ] = None,
    seed: SeedOption = None,
    settings: SetOption = None,
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
    """Rebuilds images from updates, behind a defense and without. An interrupted attack goes on.

    --set sets what has no flag. An option of the attack: --set attack.restarts=4 (--list shows them). Any
    other field: --set local.steps=5. The places are those of a run's config.toml.
    """
    from fedkl import experiment_flags, experiments

    flags = {
        "--arms": None if arms is None else names(arms),
        "--data": data,
        "--model": model,
        "--trials": trials,
        "--batch-size": batch_size,
        "--auxiliary": auxiliary,
        "--seed": seed,
    }
    experiment = experiment_flags.from_flags(
        "attack",
        file=config,
        fields={FIELDS[flag]: value for flag, value in flags.items()},
        attack=kind,
        defense=defense,
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
