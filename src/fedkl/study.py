"""Experiments as run directories: begun, found again, told apart; and tables of several of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import fedkl
from fedkl import config as configs
from fedkl.config import AttackConfig, TrainConfig
from fedkl.errors import ConfigError, FedKLError, FolderError, printable
from fedkl.files import exclusive, make_folder, read_file, write_atomically
from fedkl.formats import check_version
from fedkl.parsing import parse_json_object
from fedkl.runs import RunDirectory, is_run, same_experiment

_MARK = "reproduce.json"
"""Says whose a table's folder is."""

_VERSION = 1


@runtime_checkable
class Progress(Protocol):
    """Where an experiment reports its progress."""

    def __call__(self, done: int | float, total: int, note: str, /) -> None:
        """`done` of `total` steps, the present one in parts, and a short note on the last one."""


def silent(done: int | float, total: int, note: str, /) -> None:
    """Reports nothing."""


OpenProgress = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress display for a cell's name."""


@contextmanager
def begun(config: TrainConfig | AttackConfig, *, out: Path) -> Iterator[RunDirectory]:
    """The run directory of an experiment, for this process alone; a finished one has its summary.

    Args:
        config: The experiment.
        out: The run directory.

    Raises:
        ConfigError: The folder is not usable, or holds another experiment.
    """
    with exclusive(out):
        yield RunDirectory.create(out, config=config, version=fedkl.__version__)


def check_names(given: Sequence[str], known: Collection[str], *, place: str) -> None:
    """Raises ConfigError where a name is not known or comes twice, or there is none."""
    twice = [one for one, count in Counter(given).items() if count > 1]
    if twice:
        raise ConfigError(f"reproduce {place}: {', '.join(twice)} given more than once. Name each once.")
    unknown = [repr(one) for one in given if one not in known]
    if unknown or not given:
        raise ConfigError(
            f"reproduce {place}: got {', '.join(unknown) or 'none'}. Choose from {', '.join(known)}."
        )


def holds_other(folder: Path, experiment: TrainConfig | AttackConfig) -> bool:
    """Whether a folder holds a run with other settings; one that never began is in nobody's way."""
    path = folder / "config.toml"
    begun = any((folder / name).exists() for name in ("results.jsonl", "checkpoints", "summary.json"))
    if not begun or not path.is_file():
        return False
    RunDirectory.open(folder)  # names one of a newer version
    return not same_experiment(path.read_bytes(), configs.dump(experiment).encode())


def claim(out: Path, *, table: str, places: Iterable[Path]) -> None:
    """Marks a folder as a table's own, before anything is written into it.

    Args:
        out: The table's folder; made if it is not there.
        table: The table's name.
        places: Run directories of its cells, below the folder: a table of an older version has no mark.

    Raises:
        ConfigError: It holds a run, another table or files of no table, or cannot be written.
        NewerFormatError: A newer fedkl wrote it.
    """
    try:
        found = _table_in(out)
        present = {path.name for path in out.iterdir()} - {_MARK} if out.exists() else set()
        ours = found == table or (found is None and present & {"table.json", *(p.parts[0] for p in places)})
        if is_run(out) or (present and not ours):
            held = (
                "a run" if is_run(out) else "files of no table" if found is None else f"the table '{found}'"
            )
            raise ConfigError(
                f"{out}: reproduce {table} expects an empty folder or this table's own, and it holds {held}. "
                "Choose another --out, or remove the folder."
            )
        make_folder(out)
        write_atomically(out / _MARK, (json.dumps({"version": _VERSION, "table": table}) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}). Choose another --out.") from error


def _table_in(out: Path) -> str | None:
    """The name of the table that a folder is marked with; None if there is no mark."""
    try:
        found = parse_json_object(read_file(out / _MARK))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{out / _MARK}: damaged ({error}), expected the name of a table. Remove it, or choose another "
            "--out."
        ) from error
    check_version(found.get("version"), source=out / _MARK, reads=_VERSION)
    return printable(str(found.get("table")))


def refuse_others(cells: Mapping[Path, TrainConfig | AttackConfig]) -> None:
    """Raises ConfigError where a cell's folder holds a run with other settings than the cell's."""
    for folder, experiment in cells.items():
        if holds_other(folder, experiment):
            raise ConfigError(
                f"{folder}: holds a run with other settings than the table's. Choose another --out, or "
                "remove the folder."
            )


@runtime_checkable
class Cell(Protocol):
    """One run of a table."""

    @property
    def place(self) -> Path:
        """Its run directory, below the table's folder."""

    @property
    def experiment(self) -> TrainConfig | AttackConfig:
        """What is run."""


AnyCell = TypeVar("AnyCell", bound=Cell)


def run_cells(
    cells: Sequence[AnyCell],
    run: Callable[..., RunDirectory],
    *,
    table: str,
    out: Path,
    progress: OpenProgress,
    passed_over: tuple[type[FedKLError], ...] = (),
) -> Iterator[tuple[AnyCell, RunDirectory | FedKLError]]:
    """Runs the cells of a table that are not done yet, each in a run directory of its own.

    Args:
        cells: All.
        run: Called with an experiment, `out` and `progress`.
        table: The table's name; see `claim`.
        out: The table's folder.
        progress: Opens a progress display for a cell's name.
        passed_over: What ends a cell, but not the table.

    Returns:
        Each cell with its run, or with what ended it. Folders are checked at once; cells run one by one, as
        they are asked for.

    Raises:
        ConfigError: The folder is another table's, or one below it holds a run with other settings.
        FolderError: Another process works in one below it; raised as that cell is asked for.
    """
    claim(out, table=table, places=[cell.place for cell in cells])
    refuse_others({out / cell.place: cell.experiment for cell in cells})

    def found() -> Iterator[tuple[AnyCell, RunDirectory | FedKLError]]:
        for cell in cells:
            try:
                with progress(str(cell.place)) as step:
                    result = run(cell.experiment, out=out / cell.place, progress=step)
            except FolderError:
                raise  # says nothing of the cell
            except passed_over as error:
                yield cell, error
            else:
                yield cell, result

    return found()


def write_table(out: Path, records: Sequence[Mapping[str, Any]], markdown: str) -> None:
    """Writes table.json and table.md."""
    write_atomically(out / "table.json", (json.dumps(records, indent=2) + "\n").encode())
    write_atomically(out / "table.md", markdown.encode())
