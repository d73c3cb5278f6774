"""`fedkl data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkl.cli.commands import Command
from fedkl.cli.options import DATASETS, one_of
from fedkl.cli.terminal import console, progress_bar

app = typer.Typer(help="Datasets: list and fetch.", no_args_is_help=True)


@app.command("list", cls=Command)
def data_list() -> None:
    """Known datasets."""
    from fedkl import data

    for name, line in data.DATASETS.items():
        console.print(f"{name}: {line}", highlight=False)


@app.command("fetch", cls=Command)
def data_fetch(
    name: Annotated[str, typer.Argument(help="Dataset name.", autocompletion=one_of(DATASETS))],
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of the datasets.", show_default="$FEDKL_DATA, or ~/.cache/fedkl/data"),
    ] = None,
) -> None:
    """Fetches a dataset, checked against known digests; what is there already is kept."""
    from fedkl import data

    with progress_bar(f"fetch {name}") as progress:

        def step(what: str, done: int, total: int | None) -> None:
            progress(done, total or max(done, 1), what)

        where = data.fetch(name, root=root, progress=step)
    console.print(f"{name}: {where}", soft_wrap=True, highlight=False)
