"""`fedkl demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkl.cli.commands import Continued
from fedkl.cli.terminal import finish, progress_bar


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("demo", cls=Continued)(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the runs and the report go.")] = Path("runs/demo"),
) -> None:
    """Shows what leaks and what stops it: the same attacks on no defense, the published lock and masks."""
    from fedkl import demo as demonstration

    demonstration.run(out, progress=progress_bar)
    finish(out, answers=demonstration.answers(out))
