"""The worst-rung matrix: the attacks of the ladder against every arrangement of the lock, with controls."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedkl import experiment_flags
from fedkl.attacking.arrangements import ARRANGEMENTS, CONTROL, LOCK_CONTROL, control_of, is_lock
from fedkl.attacking.attackers import RUNGS, Rung
from fedkl.attacking.matrix_table import markdown
from fedkl.attacking.records import Record, records_of
from fedkl.attacking.run import attack
from fedkl.config import AttackConfig
from fedkl.defenses import KeyLock
from fedkl.errors import AttackError, ConfigError
from fedkl.models import ModelInitialization
from fedkl.runs import RunDirectory
from fedkl.study import OpenProgress, check_names, run_cells, write_table

UNLOCKED = "unlocked"
"""The run of a rung that has the arms without a lock: the control, and the arrangements of private layers."""

ROWS: Mapping[str, tuple[str, str]] = {
    "lenet/mnist": ("lenet", "mnist"),
    "lenet/cifar10": ("lenet", "cifar10"),
    "resnet20/cifar10": ("resnet20", "cifar10"),
    "resnet20-groupnorm/cifar10": ("resnet20-groupnorm", "cifar10"),
    "resnet18/cifar10": ("resnet18", "cifar10"),
}
"""Networks and data by a row's name."""


def start_of(network: str) -> ModelInitialization:
    """The initial weights that a row's network is trained from.

    From PyTorch's own the sigmoid LeNet hardly trains at all within few rounds.
    """
    return "uniform" if network == "lenet" else "default"


_CLASSES = 10  # of the data of every row
_TEST_IMAGES = 10_000  # likewise
_CLIENTS = 20  # at least, where each sends several updates: its images share its secrets
_SPARE = 1.15  # so that hardly any cell has fewer images than asked for


_FIXED = (
    *("seed", "data.name", "model.name", "defense", "arms", "auxiliary", "networks", "trials"),
    *("updates_per_client", "batch_size", "cohort", "local.steps", "norm_mode"),
)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Which cells are attacked, and how.

    Attributes:
        rows: Names of `ROWS`.
        arrangements: Names of `ARRANGEMENTS`; a network with nothing private is in every matrix, as the
            control.
        batches: Images behind a client's update.
        steps: Local steps behind it.
        cohorts: Clients over whose updates the server sees the mean.
        rungs: Names of `RUNGS`.
        images: Images counted in a cell, about; None: as many as each rung has by default. Of batches only
            those count whose label no other image has, so that more are attacked.
        auxiliary: Labeled images that the server owns.
        norm_mode: Of the clients' norms.
        seed: Of weights and attacks; keys come from the operating system.
        workers: Threads that share the trials; 0: all cores.
        data_root: Folder of the datasets.
        settings: Fields of the attacks as ``PLACE=VALUE``, in every cell; none that the matrix sets itself.

    Raises:
        ConfigError: A name is unknown, a number is too small, or something is given twice.
    """

    rows: tuple[str, ...]
    arrangements: tuple[str, ...] = ("first", "all", "private-head", "private-stem")
    batches: tuple[int, ...] = (1, 4, 16)
    steps: tuple[int, ...] = (1, 5)
    cohorts: tuple[int, ...] = (1,)
    rungs: tuple[str, ...] = ("floor", "learned")
    images: int | None = None
    auxiliary: int = 8000
    norm_mode: str = "train"
    seed: int = 0
    workers: int = 0
    data_root: str | None = None
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_names(self.rows, ROWS, place="rows")
        check_names(self.arrangements, ARRANGEMENTS, place="arrangements")
        check_names(self.rungs, RUNGS, place="rungs")
        numbers = {
            "batches": self.batches,
            "steps": self.steps,
            "cohorts": self.cohorts,
            "images": (1 if self.images is None else self.images,),
        }
        wrong = [
            f"{name} ≥ 1, got {value}" for name, values in numbers.items() for value in values if value < 1
        ]
        wrong += [
            f"{name} without repeats, got {', '.join(map(str, values))}"
            for name, values in numbers.items()
            if len(set(values)) < len(values)
        ]
        if wrong or not (self.batches and self.steps and self.cohorts):
            raise ConfigError(
                f"reproduce adaptive: expected {'; '.join(wrong) or 'batches, steps and cohorts'}."
            )

    def cells(self) -> list[MatrixCell]:
        """Every run of the matrix: the cheap rungs first."""
        return [
            self._cell(RUNGS[rung], row, victim, batch, steps, cohort)
            for rung, row, batch, steps, cohort, victim in itertools.product(
                self.rungs,
                self.rows,
                self.batches,
                self.steps,
                self.cohorts,
                (UNLOCKED, *filter(is_lock, self.arrangements)),
            )
            if self._arms(RUNGS[rung], victim)
        ]

    def _arms(self, rung: Rung, victim: str) -> tuple[str, ...]:
        if victim != UNLOCKED:
            return rung.locked if rung.against is None or victim in rung.against else ()
        return tuple(arm for arm in rung.unlocked if arm == CONTROL or arm in self.arrangements)

    def _cell(self, rung: Rung, row: str, victim: str, batch: int, steps: int, cohort: int) -> MatrixCell:
        model, data = ROWS[row]
        lock = KeyLock() if victim == UNLOCKED else ARRANGEMENTS[victim]
        together = rung.updates_per_client
        images = rung.images if self.images is None else self.images
        fields: dict[str, Any] = {
            "seed": self.seed,
            "data.name": data,
            "data.root": self.data_root,
            "model.name": model,
            "model.initialization": "default",
            "attack": dict(rung.attack),
            "defense": asdict(lock),
            "arms": self._arms(rung, victim),
            "labels_known": True,
            "auxiliary": self.auxiliary,
            "networks": rung.networks,
            "trials": _updates(images, size=batch * cohort, together=together),
            "updates_per_client": together,
            "batch_size": batch * cohort,
            "cohort": cohort,
            "local.steps": steps,
            "norm_mode": self.norm_mode,
            "workers": self.workers,
        }
        own, experiment = _experiment(fields), _experiment(fields, settings=self.settings)
        _refuse_changed(own, experiment)
        kind = f"batch-{batch}-steps-{steps}" + (f"-cohort-{cohort}" if cohort > 1 else "")
        place = Path(row.replace("/", "-"), kind, f"{rung.name}-{victim}")
        given = {"row": row, "batch": batch, "steps": steps, "cohort": cohort}
        given |= {"rung": rung.name, "victim": victim}
        return MatrixCell(given=given, place=place, experiment=experiment)


@dataclass(frozen=True, kw_only=True)
class MatrixCell:
    """One run: a rung against one arrangement.

    Attributes:
        given: Row, batch size, local steps, cohort, rung, and the arrangement if it is a lock.
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
        ConfigError: The folder is another table's, or one below it holds a run with other settings.
        DataError: The data are not there.
    """
    cells = matrix.cells()
    if not cells:
        raise ConfigError(
            f"reproduce adaptive: {', '.join(matrix.rungs)} cannot be tried on any of "
            f"{', '.join(matrix.arrangements)}; some rungs are made for some arrangements only (RUNGS). Name "
            "others, or all."
        )
    attacked = run_cells(
        cells, attack, table="adaptive", out=out, progress=progress, passed_over=(AttackError,)
    )
    records: list[Record] = []
    refused: list[tuple[Mapping[str, Any], str]] = []
    for cell, run in attacked:
        if not isinstance(run, RunDirectory):
            refused.append((cell.given, str(run)))
            continue
        alone = cell.experiment.batch_size > 1
        for record in records_of(run, given=cell.given, printed=None, distances={}, alone=alone):
            records.append(record | _arrangement(record))
        write_table(out, records, markdown(records, refused=refused))
    if not records:
        raise ConfigError(f"reproduce adaptive: no cell can be run. {refused[0][1]}")
    write_table(out, records, markdown(records, refused=refused))
    return records


def _updates(images: int, *, size: int, together: int) -> int:
    """How many updates of a size have about so many images whose label no other has; whole clients.

    Of large ones there may be fewer, as the test images do not suffice.
    """
    alone = (1 - 1 / _CLASSES) ** (size - 1)
    spare = 1.0 if size == 1 else _SPARE
    clients = max(math.ceil(images * spare / (alone * size * together)), _CLIENTS if together > 1 else 1)
    return max(1, min(clients, _TEST_IMAGES // (size * together))) * together


def _experiment(fields: Mapping[str, Any], *, settings: tuple[str, ...] = ()) -> AttackConfig:
    experiment = experiment_flags.from_flags("attack", file=None, fields=dict(fields), settings=settings)
    assert isinstance(experiment, AttackConfig)  # noqa: S101 - that is its kind
    return experiment


def _refuse_changed(own: AttackConfig, changed: AttackConfig) -> None:
    """Raises ConfigError where a setting says something else than the cell."""
    places = [name for name in _FIXED if operator.attrgetter(name)(own) != operator.attrgetter(name)(changed)]
    if places:
        raise ConfigError(
            f"reproduce adaptive: --set {', '.join(places)}: the matrix sets that itself, and its tables say "
            "so. Use its own options, or fedkl attack for a single run."
        )


def _arrangement(record: Record) -> Record:
    """What is private in an arm, and the name of its control; None for a control."""
    arm, victim = str(record["arm"]), str(record["victim"])
    if victim == UNLOCKED:
        return {"arrangement": arm, "control": None if arm == CONTROL else CONTROL}
    if arm == LOCK_CONTROL:
        return {"arrangement": control_of(victim), "control": None}
    return {"arrangement": victim, "control": control_of(victim)}
