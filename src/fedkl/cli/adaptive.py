"""`fedkl reproduce adaptive`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedkl.cli.commands import Continued
from fedkl.cli.options import FirstSeedOption, RootOption, RowsOption, SetOption, TableOption, WorkersOption
from fedkl.cli.terminal import console, names, numbers, print_table, progress_bar


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("adaptive", cls=Continued)(adaptive)


def _list(wanted: bool) -> bool:
    if not wanted:
        return wanted
    from fedkl import reproduce

    known = {"--rows": reproduce.ROWS, "--arrangements": reproduce.ARRANGEMENTS, "--rungs": reproduce.RUNGS}
    for flag, choices in known.items():
        console.print(f"{flag}: {', '.join(choices)}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit


def adaptive(
    out: TableOption,
    rows: RowsOption = "lenet/mnist",
    arrangements: Annotated[
        str, typer.Option(help="What clients keep, see --list; every: all of them.")
    ] = "first,all,private-head,private-stem",
    batches: Annotated[str, typer.Option(help="Images behind an update.")] = "1,4,16",
    steps: Annotated[str, typer.Option(help="Local steps behind an update.")] = "1,5",
    cohorts: Annotated[str, typer.Option(help="Clients over whose updates the server sees the mean.")] = "1",
    rungs: Annotated[str, typer.Option(help="Attackers, see --list; all: every rung.")] = "floor,learned",
    images: Annotated[
        int | None, typer.Option(min=1, help="Images counted in a cell, about; 20 or 100 if not given.")
    ] = None,
    auxiliary: Annotated[int, typer.Option(min=1, help="Labeled images that the server owns.")] = 8000,
    norm_mode: Annotated[str, typer.Option(help="Of the clients' norms: train or eval.")] = "train",
    accuracy: Annotated[
        bool, typer.Option("--frontier", help="Train too: what each arrangement costs, and a figure.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of --frontier's trainings; 20.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Of --frontier's trainings; 3.")] = None,
    test_images: Annotated[
        int | None, typer.Option(min=1, help="On which --frontier's trainings are tested; all.")
    ] = None,
    seed: FirstSeedOption = 0,
    workers: WorkersOption = 0,
    data_root: RootOption = None,
    settings: SetOption = None,
    listed: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Print what can be named, and stop.")
    ] = False,
) -> None:
    """Attackers who know the lock: what the best of them reads, by what clients keep."""
    from fedkl import reproduce

    matrix = reproduce.Matrix(
        rows=tuple(reproduce.ROWS) if rows == "all" else names(rows),
        arrangements=tuple(reproduce.ARRANGEMENTS) if arrangements == "every" else names(arrangements),
        batches=numbers(batches),
        steps=numbers(steps),
        cohorts=numbers(cohorts),
        rungs=tuple(reproduce.RUNGS) if rungs == "all" else names(rungs),
        images=images,
        auxiliary=auxiliary,
        norm_mode=norm_mode,
        seed=seed,
        workers=workers,
        data_root=data_root,
        settings=tuple(settings or ()),
    )
    given = {"rounds": rounds, "seeds": seeds, "test_images": test_images}
    trained = {name: number for name, number in given.items() if number is not None}
    if trained and not accuracy:
        named = ", ".join("--" + name.replace("_", "-") for name in trained)
        raise typer.BadParameter(f"{named}: only with --frontier, which trains.")
    if not accuracy:
        reproduce.adaptive(matrix, out=out, progress=progress_bar)
        print_table(out)
        return
    wanted = reproduce.Frontier(matrix=matrix, **trained)
    reproduce.frontier(wanted, out=out, progress=progress_bar)
    print_table(out)
    print_table(out / "frontier")
