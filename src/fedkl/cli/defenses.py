"""`fedkl reproduce defenses`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedkl.cli.commands import Continued
from fedkl.cli.options import FirstSeedOption, RootOption, TableOption
from fedkl.cli.terminal import console, names, print_table, progress_bar

WantedOption = Annotated[str, typer.Option("--defenses", help="Comma-separated, see --list; all: every one.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Of a training.")]
ClientsOption = Annotated[int, typer.Option(min=1, help="Share the training images.")]
ImagesOption = Annotated[
    int, typer.Option(min=0, help="Training images of all clients together; 0: all there are.")
]
SeedsOption = Annotated[int, typer.Option(min=1, help="Trainings of each defense.")]
AuditedOption = Annotated[int, typer.Option(min=1, help="Behind an audited epoch.")]
MinutesOption = Annotated[float, typer.Option(min=0.01, help="Of each audit.")]


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("defenses", cls=Continued)(defenses)


def _list(wanted: bool) -> bool:
    if not wanted:
        return wanted
    from fedkl.reproduce import ROWS, compared

    console.print(f"--row: {', '.join(ROWS)}", highlight=False, markup=False, soft_wrap=True)
    for name, each in compared().items():
        console.print(f"{name}: {each.title}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit


def defenses(
    out: TableOption,
    row: Annotated[str, typer.Option(help="Network and data, see --list.")] = "lenet/mnist",
    target: Annotated[
        str | None,
        typer.Option(help="As for `fedkl audit`: a subject of your own, audited and not trained."),
    ] = None,
    wanted: WantedOption = "all",
    rounds: RoundsOption = 20,
    clients: ClientsOption = 3,
    images: ImagesOption = 12_000,
    seeds: SeedsOption = 1,
    images_per_client: AuditedOption = 100,
    minutes: MinutesOption = 4.0,
    seed: FirstSeedOption = 0,
    data_root: RootOption = None,
    listed: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Print what can be named, and stop.")
    ] = False,
) -> None:
    """What stops it: every defense, its cost in accuracy, and what attackers who know it still read."""
    from fedkl import reproduce
    from fedkl.auditing.target import load

    table = reproduce.DefensesTable(
        row=row,
        subject=None if target is None else load(target).subject,
        defenses=() if wanted == "all" else names(wanted),
        rounds=rounds,
        clients=clients,
        images=images or None,
        seeds=seeds,
        images_per_client=images_per_client,
        minutes=minutes,
        seed=seed,
        data_root=data_root,
    )
    console.print(table.plan, highlight=False, markup=False, soft_wrap=True)
    reproduce.defenses(table, out=out, progress=progress_bar)
    print_table(out)
