"""`fedkl report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkl.cli.commands import Command
from fedkl.cli.terminal import finish


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("report", cls=Command)(report)


def report(
    run: Annotated[
        Path, typer.Argument(help="A run directory, a folder of them, or the folder of an audit.")
    ],
) -> None:
    """(Re)builds the report of a run or an audit: report.html, report.md and figures."""
    finish(run)
