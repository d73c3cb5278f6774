"""Tables 4, 5 and 6 and the threat grid: gradient inversion with and without the lock, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedkl import experiment_flags, experiments
from fedkl.attacking.records import Record, markdown, perceptual_distances, records_of
from fedkl.config import AttackConfig
from fedkl.defenses import PUBLISHED_LOCK, arms_of
from fedkl.errors import AttackError, ConfigError, DataError, gathered
from fedkl.locking import Activation
from fedkl.metrics.perceptual import LPIPS
from fedkl.paper.published import Budget, published
from fedkl.runs import RunDirectory
from fedkl.study import OpenProgress, check_names, run_cells, write_table

DEFAULT_ARMS = ("no-norm", "public-norm", "lock", "lock-known-both")
"""The paper's two arms, and the controls: the same norms in public, and an attacker who lacks nothing."""

_CALIBRATED_ON = 100  # images of the server's own, where an arm needs any


@dataclass(frozen=True, kw_only=True)
class LeakageRow:
    """One row of Table 6, or one that the paper does not have.

    Attributes:
        name: Attack, network as the paper calls it, and data: ``dlg/lenet/mnist``.
        model: The network of all arms.
        activation: Of the published lock in this row.
        paper: The attack's settings as published.
        quick: The same for minutes; None: the row takes a CPU hours, so there are none.
        printed: The paper's [without, with] figures as printed; None: not in the paper.
        initialization: Of the weights.
        data: The dataset's name, if it is not the last part of the row's.
        size: Height and width of the images; None: the dataset's own.
        labels_known: Whether the server is granted the labels; otherwise the attack finds them.
        norm_mode: Of the client's norms.
        needs: What must be there first, and is in no package.
    """

    name: str
    model: str
    activation: Activation
    paper: Mapping[str, Any]
    quick: Mapping[str, Any] | None = None
    printed: Mapping[str, list[float]] | None = None
    initialization: Literal["default", "uniform"] = "default"
    data: str | None = None
    size: int | None = None
    labels_known: bool = True
    norm_mode: Literal["train", "eval"] = "train"
    needs: str | None = None

    @property
    def attack(self) -> str:
        """The attack's type."""
        return self.name.split("/")[0]

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return self.data or self.name.split("/")[2]


@dataclass(frozen=True, kw_only=True)
class LeakageCell:
    """One run: a row with one seed.

    Attributes:
        row: Its row.
        place: Its run directory, below the table's folder.
        experiment: What is run.
    """

    row: LeakageRow
    place: Path
    experiment: AttackConfig


@dataclass(frozen=True, kw_only=True)
class LeakageTable:
    """Which rows are attacked, and how.

    Attributes:
        rows: Names of rows.
        arms: Names of arms.
        trials: Test images attacked, one network each; the paper has 20.
        budget: ``"quick"`` (minutes) or ``"paper"``.
        seed: Of weights and attacks; keys come from the operating system.
        repeats: Seeds from `seed` on, one run each.
        device: ``"cpu"`` or ``"cuda"``.
        workers: Threads that share the trials; 0: all cores.
        data_root: Folder of the datasets.
        settings: Fields of the experiments as ``PLACE=VALUE``, in every row.

    Raises:
        ConfigError: A name is unknown, or a number is too small.
    """

    rows: tuple[str, ...]
    arms: tuple[str, ...] = DEFAULT_ARMS
    trials: int = 20
    budget: Budget = "quick"
    seed: int = 0
    repeats: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    workers: int = 0
    data_root: str | None = None
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_names(self.rows, leakage_rows(), place="rows")
        check_names(self.arms, all_arms(), place="arms")
        least = {"trials": 1, "repeats": 1, "workers": 0}
        wrong = [f"{n} ≥ {low}, got {getattr(self, n)}" for n, low in least.items() if getattr(self, n) < low]
        if wrong:
            raise ConfigError(f"reproduce: expected {', '.join(wrong)}.")

    def cells(self, row: LeakageRow) -> list[LeakageCell]:
        """The runs of a row.

        Raises:
            ConfigError: The row has no such budget, or the settings do not fit its attack.
        """
        folder = row.name.replace("/", "-")
        return [
            LeakageCell(row=row, place=Path(folder, f"seed-{seed}"), experiment=self._experiment(row, seed))
            for seed in range(self.seed, self.seed + self.repeats)
        ]

    def _experiment(self, row: LeakageRow, seed: int) -> AttackConfig:
        settings = row.quick if self.budget == "quick" else row.paper
        if settings is None:
            raise ConfigError(
                f"{row.name} has no quick budget, because it takes a CPU hours. Use --budget paper, best "
                "with --device cuda, or leave the row out."
            )
        lock = replace(PUBLISHED_LOCK, activation=row.activation)
        fields: dict[str, Any] = {
            "seed": seed,
            "data.name": row.dataset,
            "data.root": self.data_root,
            "data.size": row.size,
            "model.name": row.model,
            "model.initialization": row.initialization,
            "attack": {"type": row.attack} | dict(settings),
            "defense": asdict(lock),
            "arms": self.arms,
            "labels_known": row.labels_known,
            "auxiliary": _CALIBRATED_ON if "lock-calibrated" in self.arms else 0,
            "trials": self.trials,
            "norm_mode": row.norm_mode,
            "device": self.device,
            "workers": self.workers,
        }
        try:
            experiment = experiment_flags.from_flags(
                "attack", file=None, fields=fields, settings=self.settings
            )
        except ConfigError as error:
            raise ConfigError(f"{row.name}: {error}") from error
        if not isinstance(experiment, AttackConfig):
            raise ConfigError(f"{row.name}: --set must leave the experiment an attack.")
        return experiment


def leakage_rows() -> dict[str, LeakageRow]:
    """The rows of Table 6 and our own, by name."""
    return {name: LeakageRow(name=name, **fields) for name, fields in published("table6").items()}


def all_arms() -> tuple[str, ...]:
    """Every arm that can be named."""
    return tuple(arms_of(PUBLISHED_LOCK))


def grid_arms() -> tuple[str, ...]:
    """The arms of the paper's threat-model grid, and those that need no data of the server's own."""
    others = ("lock-calibrated", "lock-shared-statistics", "private-head", "private-stem")
    return tuple(name for name in all_arms() if name not in others)


def rows_of(*attacks: str) -> tuple[str, ...]:
    """Names of the rows with these attacks."""
    return tuple(name for name, row in leakage_rows().items() if row.attack in attacks)


def leakage(
    table: LeakageTable,
    *,
    out: Path,
    progress: OpenProgress,
    name: str = "table6",
    lpips: bool = False,
    described: bool = False,
) -> list[Record]:
    """Attacks the rows that are not done yet, each in a run directory of its own, and sums them up.

    A row that cannot be run (no data, no generator, no quick budget) is named below the table with the
    reason; the others go on.

    Args:
        table: Which rows.
        out: The table's folder; table.json and table.md are written after every row.
        progress: Opens a progress display for a run's name.
        name: Of the table, which marks the folder as its own.
        lpips: Whether to measure LPIPS on the saved reconstructions.
        described: Whether the table describes each arm.

    Returns:
        One record per row, seed and arm; see `records_of`.

    Raises:
        ConfigError: No row can be run, the folder is another table's, or one below it holds a run with other
            settings.
        DataError: LPIPS is asked for and its weights are not there.
    """
    measures = (LPIPS.load("vgg"), LPIPS.load("alex")) if lpips else ()
    cells, refused = _prepared(table)
    attacked = run_cells(
        cells,
        experiments.run,
        table=name,
        out=out,
        progress=progress,
        passed_over=(AttackError, DataError),
    )
    records: list[Record] = []
    for cell, run in attacked:
        if not isinstance(run, RunDirectory):
            refused[cell.row.name] = " ".join(filter(None, (str(run), cell.row.needs)))
            continue
        records += _records(table, cell, run, measures)
        write_table(out, records, markdown(records, refused=refused, described=described))
    if not records:
        raise ConfigError(
            gathered("No row can be run.", [f"{n}: {why}" for n, why in refused.items()], "See --help.")
        )
    write_table(out, records, markdown(records, refused=refused, described=described))
    return records


def _prepared(table: LeakageTable) -> tuple[list[LeakageCell], dict[str, str]]:
    rows = leakage_rows()
    cells: list[LeakageCell] = []
    refused: dict[str, str] = {}
    for name in table.rows:
        try:
            cells += table.cells(rows[name])
        except ConfigError as error:
            refused[name] = " ".join(filter(None, (str(error), rows[name].needs)))
    return cells, refused


def _records(
    table: LeakageTable, cell: LeakageCell, run: RunDirectory, measures: tuple[LPIPS, ...]
) -> list[Record]:
    distances = perceptual_distances(run, measures)
    given = {"row": cell.row.name, "budget": table.budget, "seed": cell.experiment.seed}
    printed = cell.row.printed if _as_printed(cell) else None
    return records_of(run, given=given, printed=printed, distances=distances)


def _as_printed(cell: LeakageCell) -> bool:
    """Whether the settings left the row's attack, network, data and batch size as they are in the paper."""
    row, config = cell.row, cell.experiment
    ours = (config.attack.type, config.model.name, config.data.name, config.batch_size)
    return ours == (row.attack, row.model, row.dataset, 1)
