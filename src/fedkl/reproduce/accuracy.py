"""Table 1: test accuracy with and without the lock, cell by cell, beside the print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from fedkl import experiments
from fedkl.config import DataConfig, ModelConfig, TrainConfig
from fedkl.data import IID, AnyPartition
from fedkl.defenses import PUBLISHED_LOCK, Defense, KeyLock, NoDefense, PrivateNorm, PublicNorm
from fedkl.errors import ConfigError
from fedkl.federated import Execution, FederatedTraining, LocalTraining, NormStatistics
from fedkl.markdown import table_lines
from fedkl.paper.published import Budget, published
from fedkl.runs import RunDirectory
from fedkl.study import OpenProgress, check_names, holds_other, run_cells, write_table

Pairs = Literal["matched", "published"]

ARMS: dict[str, tuple[Defense, bool]] = {
    "centralized": (NoDefense(), True),
    "centralized-lock": (KeyLock(), True),
    "centralized-published": (PUBLISHED_LOCK, True),
    "fedavg": (NoDefense(), False),
    "public-norm": (PublicNorm(), False),
    "fedbn": (PrivateNorm(), False),
    "fedkl": (KeyLock(), False),
    "fedkl-published": (PUBLISHED_LOCK, False),
}
"""Defense, and whether there is one client with all the data."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of Table 1.

    Attributes:
        name: As ``lenet/mnist``: the network as the paper calls it, and the dataset.
        model: The network of both arms where pairs are matched.
        size: Height and width of the images; None: the dataset's own.
        augmentation: Of training images.
        initialization: Of the weights.
        rounds: Of the quick budget; None: images of 224×224 take a CPU hours a round, so there is none.
        expected: The paper's accuracies in percent, by arm.
        pair: The two networks that the paper compared, where they differ.
    """

    name: str
    model: str
    expected: Mapping[str, float]
    rounds: int | None = None
    size: int | None = None
    augmentation: str = "none"
    initialization: Literal["default", "uniform"] = "default"
    pair: Mapping[str, str] | None = None

    def network(self, arm: str, pairs: Pairs) -> str:
        """The network of an arm."""
        if pairs == "matched" or self.pair is None:
            return self.model
        return self.pair["plain" if isinstance(ARMS[arm][0], NoDefense) else "locked"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a table.

    Attributes:
        row: Its row.
        arm: Its arm.
        place: Its run directory, below the table's folder.
        experiment: What is run.
    """

    row: Row
    arm: str
    place: Path
    experiment: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Table1:
    """Which cells of Table 1, and how.

    Attributes:
        rows: Names of rows.
        arms: Names of arms.
        seeds: How many seeds, from `first_seed`.
        first_seed: See `seeds`.
        budget: ``"quick"`` (the row's own few rounds) or ``"paper"`` (200).
        rounds: Instead of the budget's.
        pairs: ``"matched"``: all arms of a row use one network. ``"published"``: the paper's two.
        clients: Of the federated arms; the paper has 3.
        partition: Of the training images among them; the paper's is IID.
        norm_statistics: What clients do with private ones, as in `FederatedTraining`.
        device: ``"cpu"`` or ``"cuda"``.
        data_root: Folder of the datasets.

    Raises:
        ConfigError: A name is unknown, or a number is below 1.
    """

    rows: tuple[str, ...] = ("lenet/mnist",)
    arms: tuple[str, ...] = ("centralized", "centralized-lock", "fedavg", "fedbn", "fedkl", "fedkl-published")
    seeds: int = 3
    first_seed: int = 0
    budget: Budget = "quick"
    rounds: int | None = None
    pairs: Pairs = "matched"
    clients: int = 3
    partition: AnyPartition = field(default_factory=IID)
    norm_statistics: NormStatistics = "recalibrated"
    device: Literal["cpu", "cuda"] = "cpu"
    data_root: str | None = None

    def __post_init__(self) -> None:
        check_names(self.rows, table1_rows(), place="table1, rows")
        check_names(self.arms, ARMS, place="table1, arms")
        counts = {"seeds": self.seeds, "rounds": self.rounds, "clients": self.clients}
        wrong = [f"{name}={value}" for name, value in counts.items() if value is not None and value < 1]
        if wrong:
            raise ConfigError(f"reproduce table1: expected numbers of at least 1, got {', '.join(wrong)}.")

    def rounds_of(self, row: Row) -> int:
        """Rounds of a row's cells.

        Raises:
            ConfigError: The row has no quick budget.
        """
        rounds = self.rounds or (row.rounds if self.budget == "quick" else FederatedTraining().rounds)
        if rounds is None:
            raise ConfigError(
                f"reproduce table1: {row.name} has no quick budget, because a round takes a CPU hours. Use "
                "--budget paper or --rounds, best with --device cuda, or leave the row out."
            )
        return rounds

    @property
    def as_published(self) -> bool:
        """Whether the federated arms have the paper's clients and partition."""
        return self.clients == 3 and isinstance(self.partition, IID)

    def cells(self) -> Iterator[Cell]:
        """Every run, seed by seed: what is done first says most."""
        rows = table1_rows()
        for seed in range(self.first_seed, self.first_seed + self.seeds):
            for name in self.rows:
                for arm in self.arms:
                    yield Cell(
                        row=rows[name],
                        arm=arm,
                        place=Path(name.replace("/", "-"), self.pairs, arm, f"seed-{seed}"),
                        experiment=self._experiment(rows[name], arm, seed),
                    )

    def _experiment(self, row: Row, arm: str, seed: int) -> TrainConfig:
        defense, centralized = ARMS[arm]
        rounds = self.rounds_of(row)
        return TrainConfig(
            seed=seed,
            data=DataConfig(name=row.name.split("/")[1], root=self.data_root, size=row.size),
            model=ModelConfig(
                name=row.network(arm, self.pairs), initialization=row.initialization, standardize=True
            ),
            defense=defense,
            training=FederatedTraining(
                clients=1 if centralized else self.clients,
                partition=IID() if centralized else self.partition,
                rounds=rounds,
                eval_every=max(1, min(rounds // 4, 10)),
                norm_statistics=self.norm_statistics,
                local=LocalTraining(augmentation=row.augmentation),
            ),
            execution=Execution(device=self.device, channels_last=row.model != "lenet"),
        )


def table1_rows() -> dict[str, Row]:
    """The rows of Table 1 by name."""
    return {name: Row(name=name, **fields) for name, fields in published("table1").items()}


def table1(table: Table1, *, out: Path, progress: OpenProgress) -> list[dict[str, Any]]:
    """Runs the cells that are not there yet, each in a run directory of its own, and sums them up.

    Args:
        table: Which cells.
        out: The table's folder; table.json and table.md are written after every cell.
        progress: Opens a progress display for a cell's name.

    Returns:
        One record per row and arm; see `summarized`.

    Raises:
        ConfigError: The folder is another table's, or one below it holds a run with other settings.
    """
    records: list[dict[str, Any]] = []
    cells = list(table.cells())
    for _ in run_cells(cells, experiments.run, table="table1", out=out, progress=progress):
        records = summarized(table, out=out)
        write_table(out, records, markdown(records))
    return records


def summarized(table: Table1, *, out: Path) -> list[dict[str, Any]]:
    """What the table's finished cells give, one record per row and arm; other runs do not count."""
    found: dict[tuple[str, str], list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in table.cells():
        summary = RunDirectory(out / cell.place).summary
        if summary is not None and not holds_other(out / cell.place, cell.experiment):
            found.setdefault((cell.row.name, cell.arm), []).append((cell, summary))
    return [_record(table, cells) for cells in found.values()]


def _record(table: Table1, cells: Sequence[tuple[Cell, Mapping[str, Any]]]) -> dict[str, Any]:
    row, arm = cells[0][0].row, cells[0][0].arm
    found = [summary for _, summary in cells]
    accuracies = [100 * summary["accuracy"] for summary in found]
    local = [100 * s["local_accuracy"] for s in found if s["local_accuracy"] is not None]
    printed = {"fedkl-published": "fedkl", "centralized-published": "centralized-lock"}.get(arm, arm)
    comparable = table.as_published or ARMS[arm][1]
    return {
        "row": row.name,
        "arm": arm,
        "network": row.network(arm, table.pairs),
        "statistics_shared": found[0]["statistics_shared"],
        "rounds": table.rounds_of(row),
        "seeds": len(found),
        "accuracy": fmean(accuracies),
        "spread": stdev(accuracies) if len(accuracies) > 1 else None,
        "accuracies": accuracies,
        "local_accuracy": fmean(local) if local else None,
        "local_spread": stdev(local) if len(local) > 1 else None,
        "paper": row.expected.get(printed) if comparable else None,
        "paper_rounds": FederatedTraining().rounds,
        "seconds": sum(summary["seconds"] for summary in found),
    }


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown: percent, mean ± standard deviation over seeds.

    "On own classes" is the accuracy on a test set with each client's own class frequencies.
    """
    header = ("row", "arm", "network", "norm statistics", "rounds", "seeds", "accuracy (%)")
    columns = (*header, "on own classes (%)", "paper (%), 200 rounds")
    return "\n".join(table_lines(columns, map(_cells, records), tight=True)) + "\n"


def _cells(record: Mapping[str, Any]) -> list[str]:
    return [
        record["row"],
        record["arm"],
        record["network"],
        {True: "shared", False: "private", None: "none"}[record["statistics_shared"]],
        f"{record['rounds']} of {record['paper_rounds']}",
        str(record["seeds"]),
        _mean(record, "accuracy", "spread"),
        _mean(record, "local_accuracy", "local_spread"),
        "–" if record["paper"] is None else f"{record['paper']:.2f}",
    ]


def _mean(record: Mapping[str, Any], name: str, spread: str) -> str:
    if record[name] is None:
        return "–"
    text = f"{record[name]:.2f}"
    return text if record[spread] is None else f"{text} ± {record[spread]:.2f}"
