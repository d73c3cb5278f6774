"""Several attacks on the same images side by side: what a report opens with."""

from __future__ import annotations

from textwrap import fill
from typing import NamedTuple

from fedkl import wording
from fedkl.config import AttackConfig
from fedkl.report import pictures
from fedkl.report.collect import AttackRun

MAX_COLUMNS = 9
_HEADING = 18  # characters of a heading's line


class SideBySide(NamedTuple):
    """The pictures, what must be known of them, and the same in words for those who do not see them."""

    grid: pictures.Grid
    caption: str
    alt: str


class _Column(NamedTuple):
    run: AttackRun
    arm: str

    @property
    def attack(self) -> str:
        return self.run.config.attack.title or self.run.config.attack.type

    @property
    def heading(self) -> str:
        behind = fill(self.run.arms[self.arm]["description"], _HEADING)
        return f"{behind}:\n{fill(self.attack, _HEADING)}"

    @property
    def identified(self) -> str:
        return f"{self.attack} on {self.arm} {wording.count(self.run.arms[self.arm]['identified'])}"


def side_by_side(runs: list[AttackRun]) -> SideBySide | None:
    """The true images, what the first attack finds where nothing is hidden, and what each finds elsewhere.

    None where there are fewer than two attacks, where they differ in more than the attack and its arms, or
    where there would be too many columns.
    """
    if len(runs) < 2 or len({_setting(run.config) for run in runs}) > 1:
        return None
    columns = _columns(runs)
    if not 2 <= len(columns) < MAX_COLUMNS:
        return None
    grids = {run.name: pictures.grid(run) for run in runs}
    places = [(grids[run.name], grids[run.name].columns.index(arm)) for run, arm in columns]
    first = places[0][0]
    rows = [
        pictures.Row(row.label, [row.cells[0], *(grid.rows[i].cells[place] for grid, place in places)])
        for i, row in enumerate(first.rows)
    ]
    problems = list(dict.fromkeys(text for grid, _ in places for text in grid.problems))
    headings = ["true image", *(column.heading for column in columns)]
    shown = "; ".join(" ".join(heading.split()) for heading in headings)
    alt = f"{len(rows)} images; columns: {shown}"
    return SideBySide(pictures.Grid(headings, rows, first.total, problems), _caption(columns, first), alt)


def _setting(config: AttackConfig) -> str:
    """All but the attack, its arms, what it has besides, and how it is run."""
    return repr(config.model_copy(update=dict.fromkeys(("attack", "arms", "auxiliary", "workers", "chunk"))))


def _columns(runs: list[AttackRun]) -> list[_Column]:
    """By arm, then by attack; of what hides nothing only the first."""
    every = [_Column(run, arm) for run in runs for arm in run.arms]
    nothing_hidden = [column for column in every if column.run.chosen[column.arm].open]
    hidden = [column for column in every if not column.run.chosen[column.arm].open]
    order = list(dict.fromkeys(column.arm for column in hidden))
    return nothing_hidden[:1] + sorted(hidden, key=lambda column: order.index(column.arm))


def _caption(columns: list[_Column], grid: pictures.Grid) -> str:
    run = columns[0].run
    config, floor = run.config, run.summary.get("floor")
    candidates = run.arms[columns[0].arm]["candidates"]
    identified = "; ".join(column.identified for column in columns)
    guess = f"; the guess from the labels alone {wording.count(floor['identified'])}" if floor else ""
    start = "trained" if config.model.weights is not None else "untrained"
    return (
        f"The first {len(grid.rows)} of n = {grid.total} images of {config.data.name}, {config.batch_size} "
        f"an update, {start} {config.model.name}, seed {config.seed}; keys and masks are new in each run. "
        f"PSNR below each. Identified among {candidates} images: {identified}{guess}. Of its own results an "
        "attack takes the one that its own loss prefers; it never sees the true image."
    )
