"""The worst-rung matrix: the attacks of the ladder against every arrangement of the lock, with controls."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedkl import config as configs
from fedkl import experiments
from fedkl.config import PUBLISHED_LOCK, AttackConfig
from fedkl.defenses import KeyLock
from fedkl.errors import AttackError, ConfigError
from fedkl.reproduce.cells import OpenProgress, check_names, refuse_others, write_table
from fedkl.reproduce.ladder import LOCK_CONTROL, RUNGS, Rung
from fedkl.reproduce.records import Record, records_of
from fedkl.reproduce.verdicts import markdown

UNLOCKED = "unlocked"
"""In place of locked layers: the arms that have no lock."""

ROWS: Mapping[str, tuple[str, str]] = {
    "lenet/mnist": ("lenet", "mnist"),
    "lenet/cifar10": ("lenet", "cifar10"),
    "resnet20/cifar10": ("resnet20", "cifar10"),
}
"""Networks and data by a row's name."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Which cells are attacked, and how.

    Attributes:
        rows: Names of `ROWS`.
        layers: Which layers are locked; a network without a lock is in every matrix, as the control.
        batches: Images behind an update.
        steps: Local steps behind an update.
        rungs: Names of `RUNGS`.
        images: Images attacked in a cell; None: as many as each rung has by default.
        auxiliary: Labeled images that the server owns.
        lock: ``"published"`` or ``"default"``.
        norm_mode: Of the clients' norms.
        seed: Of weights and attacks; keys come from the operating system.
        workers: Threads that share the trials; 0: all cores.
        data_root: Folder of the datasets.
        settings: Fields of the experiments as ``PLACE=VALUE``, in every cell.

    Raises:
        ConfigError: A name is unknown, or a number is too small.
    """

    rows: tuple[str, ...]
    layers: tuple[str, ...] = ("first", "all")
    batches: tuple[int, ...] = (1, 4, 16)
    steps: tuple[int, ...] = (1, 5)
    rungs: tuple[str, ...] = ("floor", "learned")
    images: int | None = None
    auxiliary: int = 2000
    lock: str = "published"
    norm_mode: str = "train"
    seed: int = 0
    workers: int = 0
    data_root: str | None = None
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_names(self.rows, ROWS, place="rows")
        check_names(self.layers, ("first", "all"), place="layers")
        check_names(self.rungs, RUNGS, place="rungs")
        check_names((self.lock,), ("published", "default"), place="lock")
        numbers = {
            "batches": self.batches,
            "steps": self.steps,
            "images": (1 if self.images is None else self.images,),
        }
        wrong = [
            f"{name} ≥ 1, got {value}" for name, values in numbers.items() for value in values if value < 1
        ]
        if wrong or not (self.batches and self.steps):
            raise ConfigError(f"reproduce adaptive: expected {'; '.join(wrong) or 'batches and steps'}.")

    def cells(self) -> list[MatrixCell]:
        """Every run of the matrix: the cheap rungs first."""
        return [
            self._cell(RUNGS[rung], row, layers, batch, steps)
            for rung, row, batch, steps, layers in itertools.product(
                self.rungs, self.rows, self.batches, self.steps, (UNLOCKED, *self.layers)
            )
        ]

    def _cell(self, rung: Rung, row: str, layers: str, batch: int, steps: int) -> MatrixCell:
        model, data = ROWS[row]
        lock: KeyLock = PUBLISHED_LOCK if self.lock == "published" else KeyLock()
        images = rung.images if self.images is None else self.images
        fields: dict[str, Any] = {
            "seed": self.seed,
            "data.name": data,
            "data.root": self.data_root,
            "model.name": model,
            "model.initialization": "default",
            "attack": dict(rung.attack),
            "lock": asdict(lock if layers == UNLOCKED else replace(lock, layers=layers)),  # type: ignore[arg-type]
            "arms": rung.unlocked if layers == UNLOCKED else rung.locked,
            "labels_known": True,
            "auxiliary": self.auxiliary,
            "networks": rung.networks,
            "trials": -(-images // batch),
            "batch_size": batch,
            "local.steps": steps,
            "norm_mode": self.norm_mode,
            "workers": self.workers,
        }
        experiment = configs.from_flags("attack", file=None, fields=fields, settings=self.settings)
        assert isinstance(experiment, AttackConfig)  # noqa: S101 - that is its kind
        place = Path(row.replace("/", "-"), f"batch-{batch}-steps-{steps}", f"{rung.name}-{layers}")
        given = {"row": row, "batch": batch, "steps": steps, "rung": rung.name, "layers": layers}
        return MatrixCell(given=given, place=place, experiment=experiment)


@dataclass(frozen=True, kw_only=True)
class MatrixCell:
    """One run: a rung against one arrangement.

    Attributes:
        given: Row, batch size, local steps, rung and locked layers.
        place: Its run directory, below the table's folder.
        experiment: What is run.
    """

    given: Mapping[str, Any]
    place: Path
    experiment: AttackConfig


def adaptive(matrix: Matrix, *, out: Path, progress: OpenProgress) -> list[Record]:
    """Attacks the cells that are not done yet, each in a run directory of its own, and sums them up.

    A rung that cannot work in a cell (the closed form on a batch) is listed below the table with the reason.

    Args:
        matrix: Which cells.
        out: The table's folder; table.json and table.md are written after every run.
        progress: Opens a progress display for a run's name.

    Returns:
        One record per cell and arm; see `records_of`.

    Raises:
        ConfigError: A folder holds a run with other settings.
        DataError: The data are not there.
    """
    cells = matrix.cells()
    refuse_others({out / cell.place: cell.experiment for cell in cells})
    records: list[Record] = []
    refused: list[tuple[Mapping[str, Any], str]] = []
    for cell in cells:
        try:
            with progress(str(cell.place)) as step:
                run = experiments.run(cell.experiment, out=out / cell.place, progress=step)
        except AttackError as error:
            refused.append((cell.given, str(error)))
            continue
        for record in records_of(run, given=cell.given, printed=None, distances={}):
            records.append(record | {"arrangement": _arrangement(record)})
        write_table(out, records, markdown(records, refused=refused))
    if not records:
        raise ConfigError(f"reproduce adaptive: no cell can be run. {refused[0][1]}")
    write_table(out, records, markdown(records, refused=refused))
    return records


def _arrangement(record: Record) -> str:
    """What is private; the arm itself where there is no lock."""
    if record["layers"] == UNLOCKED:
        return str(record["arm"])
    return f"{LOCK_CONTROL if record['arm'] == LOCK_CONTROL else 'lock'}, {record['layers']}"
