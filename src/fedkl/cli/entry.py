"""The app, and its entry point."""

from __future__ import annotations

import io
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

import fedkl
from fedkl.cli import (
    adaptive,
    attack,
    audit,
    cohort,
    data,
    defenses,
    demo,
    enrollment,
    export,
    generator,
    key,
    member,
    plugins,
    report,
    reproduce,
    store,
    train,
)
from fedkl.cli.commands import Commands
from fedkl.cli.terminal import fail
from fedkl.coredumps import forbid_core_dumps
from fedkl.errors import FedKLError

app = typer.Typer(
    name="fedkl",
    cls=Commands,
    help="What does my federated learning leak, and what stops it?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for module in (train, attack, audit, demo, report, export, enrollment):
    module.add_to(app)
GROUPS = {
    "data": data,
    "key": key,
    "member": member,
    "cohort": cohort,
    "store": store,
    "generator": generator,
    "reproduce": reproduce,
}
for name, group in GROUPS.items():
    app.add_typer(group.app, name=name)
adaptive.add_to(reproduce.app)
defenses.add_to(reproduce.app)


UNFORESEEN = 70
"""Exit code of an error that nobody foresaw: EX_SOFTWARE of BSD's sysexits."""

# The library does not know how a command line registers one.
_PLUGIN = "\nOn the command line: fedkl --plugin FILE COMMAND, with the file that registers it."


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"fedkl {fedkl.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin", help="Python file that registers defenses, attacks or datasets of yours; it is run."
        ),
    ] = None,
) -> None:
    for path in plugin or []:
        plugins.load(path)


def main() -> None:
    """Entry point.

    Exit codes: 0 ok, 1 an audit's limit was crossed, 2 wrong usage, configuration or data, or files that
    cannot be used, 3 an audit's evidence is incomplete, 70 an error that nobody foresaw, 130 Ctrl-C, 141
    nobody takes what is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    forbid_core_dumps()  # keys that a command opens must not lie in a core file
    try:
        app(prog_name="fedkl")
    except FedKLError as error:
        fail(f"{error}{_PLUGIN if 'or register yours' in str(error) else ''}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        kept = "What was finished is kept; once this is mended, the same command goes on."
        fail(f"{place}{error.strerror or error}. {kept}")
    except Exception as error:  # Python itself would end with 1, which says that a limit is crossed
        traceback.print_exc()
        remedy = "The lines above end where it was raised: correct your code there, or else report them."
        fail(f"{type(error).__name__}, which nobody foresaw. {remedy}", code=UNFORESEEN)
