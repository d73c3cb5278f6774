"""The frontier: what every arrangement costs in accuracy, beside what its worst rung reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedkl import experiments, wording
from fedkl.attacking.arrangements import ARRANGEMENTS, CONTROL
from fedkl.attacking.matrix import ROWS, Matrix, adaptive, start_of
from fedkl.attacking.matrix_table import Judgment, judgments, name_of
from fedkl.attacking.records import Record
from fedkl.attacking.verdict import SHOWN
from fedkl.config import DataConfig, ModelConfig, TrainConfig
from fedkl.defenses import NoDefense
from fedkl.errors import ConfigError
from fedkl.federated import FederatedTraining, LocalTraining
from fedkl.files import write_atomically
from fedkl.markdown import table_lines
from fedkl.report import figures
from fedkl.report.figures import Tradeoff
from fedkl.report.verdict import best_fill_in
from fedkl.runs import RunDirectory
from fedkl.study import OpenProgress, run_cells, write_table

FIGURE = "frontier.png"

_NOTES = (
    "Accuracy: of the clients, mean ± standard deviation over seeds, at a budget far from convergence. Cost: "
    "against the plain network. Server: the best of its own completions of the global model, with up to 100 "
    "labeled images; – where clients keep nothing.",
    "Worst rung: the attack that identified most images at this batch size and these local steps, on "
    "untrained weights. The floor, and what a verdict means: table.md.",
)


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The trainings beside a matrix, per arrangement and seed.

    Attributes:
        matrix: What is attacked. Of its batches, local steps and cohorts the frontier shows the first.
        rounds: Of a training.
        images: Training images of all clients together.
        test_images: On which accuracy is measured, of both sides; None: all.
        seeds: How many, from the matrix' own.
        clients: Share the images, IID.

    Raises:
        ConfigError: A number is below 1.
    """

    matrix: Matrix
    rounds: int = 20
    images: int = 6000
    test_images: int | None = None
    seeds: int = 3
    clients: int = 3

    def __post_init__(self) -> None:
        counts = {"rounds": self.rounds, "images": self.images, "seeds": self.seeds, "clients": self.clients}
        counts |= {} if self.test_images is None else {"test_images": self.test_images}
        wrong = [f"{name} ≥ 1, got {value}" for name, value in counts.items() if value < 1]
        if wrong:
            raise ConfigError(f"reproduce adaptive, frontier: expected {', '.join(wrong)}.")

    def cells(self) -> list[FrontierCell]:
        """Every training: the plain network first, then the arrangements, seed by seed."""
        matrix = self.matrix
        return [
            FrontierCell(
                row=row,
                arrangement=name,
                place=Path(row.replace("/", "-"), "accuracy", f"{name}-seed-{seed}"),
                experiment=self._experiment(row, name, seed),
            )
            for seed in range(matrix.seed, matrix.seed + self.seeds)
            for row in matrix.rows
            for name in (CONTROL, *matrix.arrangements)
        ]

    def _experiment(self, row: str, name: str, seed: int) -> TrainConfig:
        model, data = ROWS[row]
        return TrainConfig(
            seed=seed,
            data=DataConfig(
                name=data,
                root=self.matrix.data_root,
                train_images=self.images,
                test_images=self.test_images,
            ),
            model=ModelConfig(name=model, initialization=start_of(model), standardize=True),
            defense=NoDefense() if name == CONTROL else ARRANGEMENTS[name],
            training=FederatedTraining(
                clients=self.clients,
                rounds=self.rounds,
                eval_every=self.rounds,
                local=LocalTraining(optimizer="adam", lr=0.003),
            ),
        )


@dataclass(frozen=True, kw_only=True)
class FrontierCell:
    """One training.

    Attributes:
        row: Network and data.
        arrangement: What is private; the control's name for nothing.
        place: Its run directory, below the table's folder.
        experiment: What is run.
    """

    row: str
    arrangement: str
    place: Path
    experiment: TrainConfig


def frontier(wanted: Frontier, *, out: Path, progress: OpenProgress) -> list[Record]:
    """Runs the matrix and the trainings that are not done yet, and sets one beside the other.

    Args:
        wanted: Which.
        out: The table's folder; beside the matrix' files, frontier/table.json, frontier/table.md and
            frontier/frontier.png are written.
        progress: Opens a progress display for a run's name.

    Returns:
        One record per row and arrangement.

    Raises:
        ConfigError: The folder is another table's, or one below it holds a run with other settings.
        DataError: The data are not there.
    """
    trained = run_cells(wanted.cells(), experiments.run, table="adaptive", out=out, progress=progress)
    judged = judgments(adaptive(wanted.matrix, out=out, progress=progress))
    summaries: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell, run in trained:
        assert isinstance(run, RunDirectory)  # noqa: S101 - no error is passed over
        assert run.summary is not None  # noqa: S101 - the run is finished
        summaries.setdefault((cell.row, cell.arrangement), []).append(run.summary)
    batch, steps, cohort = (
        each[0] for each in (wanted.matrix.batches, wanted.matrix.steps, wanted.matrix.cohorts)
    )
    shown = (batch, steps, cohort)
    here = {(j.row, j.arrangement): j for j in judged if (j.batch, j.steps, j.cohort) == shown}
    records = [
        _record(place, found, summaries[place[0], CONTROL], here.get(place))
        for place, found in summaries.items()
    ]
    folder = out / "frontier"
    write_table(folder, records, markdown(records, batch=batch, steps=steps, cohort=cohort))
    write_atomically(folder / FIGURE, figures.frontier(points(records)))
    return records


def _record(
    place: tuple[str, str],
    found: Sequence[Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]],
    judged: Judgment | None,
) -> Record:
    accuracies = [float(each["accuracy"]) for each in found]
    completed = [best_fill_in(each["fill_ins"])["accuracy"] for each in found if each["fill_ins"]]
    return {
        "row": place[0],
        "arrangement": place[1],
        "rounds": found[0]["rounds"],
        "seeds": len(found),
        "accuracy": fmean(accuracies),
        "spread": stdev(accuracies) if len(accuracies) > 1 else None,
        "cost": fmean(each["accuracy"] for each in plain) - fmean(accuracies),
        "server": fmean(completed) if completed else None,
        "worst": None if judged is None else name_of(judged.worst),
        "identified": None if judged is None else judged.worst["identified"],
        "ssim": None if judged is None else judged.worst["ssim"],
        "floor": None if judged is None or judged.floor is None else judged.floor["identified"],
        "verdict": None if judged is None else judged.verdict,
    }


def markdown(records: Sequence[Record], *, batch: int, steps: int, cohort: int) -> str:
    """The frontier as a table.

    Args:
        records: See `frontier`.
        batch: Images behind an attacked update.
        steps: Local steps behind it.
        cohort: Clients that it is the mean over.
    """
    header = ("network/data", "private", "rounds", "seeds", "accuracy (%)", "cost (points)", "server (%)")
    columns = (*header, "worst rung", "identified [95 %]", "SSIM", "floor", "verdict")
    table = "\n".join(table_lines(columns, map(_row, records)))
    attacked = (
        f"Attacked: updates of {batch} images after {steps} local steps, the mean over {cohort} clients."
    )
    return "\n\n".join([table, attacked, *_NOTES]) + "\n"


def _row(record: Record) -> list[str]:
    spread = "" if record["spread"] is None else f" ± {100 * record['spread']:.1f}"
    ssim, identified, floor = record["ssim"], record["identified"], record["floor"]
    return [
        record["row"],
        record["arrangement"],
        str(record["rounds"]),
        str(record["seeds"]),
        f"{100 * record['accuracy']:.1f}{spread}",
        wording.number(100 * record["cost"]),
        wording.NONE if record["server"] is None else f"{100 * record['server']:.1f}",
        record["worst"] or wording.NONE,
        wording.NONE if identified is None else wording.count_interval(identified),
        wording.NONE if ssim is None else wording.number(ssim["median"], digits=2),
        wording.NONE if floor is None else wording.count(floor),
        SHOWN[record["verdict"]] if record["verdict"] else wording.NONE,
    ]


def points(records: Sequence[Record]) -> list[Tradeoff]:
    """The figure's points: cost in percentage points, identified shares in percent.

    Without arrangements of which the attacks say nothing: they would look like a defense.
    """
    return [
        Tradeoff(
            group=record["row"],
            name=record["arrangement"],
            cost=100 * record["cost"],
            spread=100 * (record["spread"] or 0.0),
            share=100 * record["identified"]["rate"],
            low=100 * record["identified"]["low"],
            high=100 * record["identified"]["high"],
        )
        for record in records
        if record["identified"] is not None and record["verdict"] != "says nothing"
    ]
