"""What is shown: progress, tables, errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from fedkl.study import Progress

console = Console(emoji=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Shows how far an experiment is, on the error stream; an error before the first step takes it away."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("{task.fields[note]}", markup=False),
    )
    with progress.Progress(*columns, console=Console(stderr=True, emoji=False)) as bar:
        task = bar.add_task(title, total=None, note="")

        def step(done: int | float, total: int, note: str, /) -> None:
            bar.update(task, completed=done, total=total, note=note)

        try:
            yield step
        except BaseException:
            bar.live.transient = not bar.tasks[task].completed  # an empty bar says nothing beside an error
            raise


def finish(path: Path, *, answers: Sequence[str] = ()) -> None:
    """Builds the report, prints the answers, or else its tables, and where it is."""
    from rich.markup import escape
    from rich.table import Table

    from fedkl import report

    built = report.build(path)
    for answer in answers:
        console.print(answer, markup=False, highlight=False, soft_wrap=True)
    for title, header, rows in built.tables if not answers else ():
        table = Table(title=escape(title), title_justify="left")
        for name in header:
            table.add_column(escape(name))
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    if built.pictures:
        console.print(f"Pictures: {built.pictures}", soft_wrap=True)
    console.print(f"Report: {built.html}", soft_wrap=True)


def print_table(out: Path, *, pictures: bool = False) -> None:
    """Prints the table in a folder of `fedkl reproduce`, and where it is."""
    text = (out / "table.md").read_text(encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Table: {out / 'table.md'}", soft_wrap=True, highlight=False)
    if pictures:
        console.print(f"Pictures: {out / 'pictures.html'}", soft_wrap=True, highlight=False)


def names(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    """The numbers in a comma-separated list.

    Raises:
        typer.BadParameter: One is no whole number up to a million.
    """
    try:
        found = tuple(int(name) for name in names(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text:.100}: expected whole numbers, e.g. 1,4,16.") from error
    if max(found) > 10**6:
        raise typer.BadParameter(f"{text:.100}: expected numbers up to a million.")
    return found


def say(text: str, *, style: str | None = None) -> None:
    """Writes a line on the error stream."""
    Console(stderr=True, emoji=False).print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def fail(text: str, *, code: int = 2) -> NoReturn:
    """Says what is wrong, and ends with an exit code."""
    say(f"Error: {text}", style="red")
    sys.exit(code)
