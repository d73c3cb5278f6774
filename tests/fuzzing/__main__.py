"""The command line of the harness; see the package's text."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.fuzzing import engine, guided, surfaces
from tests.fuzzing.worker import Limits

_CONSOLE = Console(soft_wrap=True, emoji=False, highlight=False)


def main(arguments: list[str]) -> int:
    """Runs the harness.

    Returns:
        0; 1 if there are findings.
    """
    options = _parser().parse_args(arguments)
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # workers are ended on the way
    if options.list:
        _CONSOLE.print("\n".join(surfaces.names()))
        return 0
    if options.replay:
        return _replay(options)
    return _fuzz(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--seconds", type=float, help="in all; 3600 unless --inputs is given")
    parser.add_argument("--inputs", type=int, help="on each surface; for counted, repeatable runs")
    parser.add_argument("--surface", action="append", choices=surfaces.names(), help="all if not given")
    parser.add_argument("--engine", choices=("auto", "atheris", "random"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path(".fuzz"), help="corpus, counts and findings")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds after which an input hangs")
    parser.add_argument("--quick", action="store_true", help="the inputs of the short run of the tests")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="stored inputs, one by one")
    parser.add_argument("--list", action="store_true", help="names of the surfaces")
    return parser


def _fuzz(options: argparse.Namespace) -> int:
    names = options.surface or surfaces.names()
    rows = []
    for group in [[name] for name in names] if options.quick else [names]:
        rows += engine.Engine(_plan(options, group)).run()
    table = Table("surface", "inputs so far", "findings", "inputs/s", "inputs/core-s")
    for row in rows:
        table.add_row(
            row.surface, f"{row.inputs:,}", str(row.findings), f"{row.rate:.0f}", f"{row.rate_of_work:.0f}"
        )
    _CONSOLE.print(table)
    found = [path for name in names for path in engine.Store(options.state, name).findings()]
    for path in found:
        what = (path / "report.txt").read_text(encoding="utf-8").splitlines()[0]
        _CONSOLE.print(escape(f"{path / 'input'}\n    {what}"))
    return 1 if found else 0


def _plan(options: argparse.Namespace, names: list[str]) -> engine.Plan:
    inputs = surfaces.surface(names[0]).quick if options.quick else options.inputs
    seconds = options.seconds or (None if inputs is not None else 3600.0)
    end = None if seconds is None else time.monotonic() + seconds
    kind = options.engine
    if kind == "auto":
        kind = "atheris" if guided.available() else "random"
    return engine.Plan(
        surfaces=names,
        state=options.state,
        limits=Limits(patience=options.patience, inputs=inputs, end=end),
        engine=kind,
        seed=options.seed,
        jobs=options.jobs,
        told=lambda line: _CONSOLE.print(escape(line)),
    )


def _replay(options: argparse.Namespace) -> int:
    """One line for each file, and the traceback of a finding."""
    found = 0
    for path in options.replay:
        name = _surface_of(path, options)
        finding = engine.replayed(path, name, limits=Limits(patience=options.patience))
        found += finding is not None
        _CONSOLE.print(escape(f"{path}: {'ok' if finding is None else f'FINDING {finding.what}'}"))
        if finding is not None:
            _CONSOLE.print(escape(finding.details), style="dim")
    return 1 if found else 0


def _surface_of(path: Path, options: argparse.Namespace) -> str:
    """The surface that an input is for, by its folder."""
    if options.surface:
        return str(options.surface[0])
    known = [part for part in path.resolve().parts if part in surfaces.names()]
    if not known:
        sys.exit(f"{path}: give --surface; no folder above it is named after one")
    return known[-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
