"""Several attacks on the same images side by side: what a report opens with, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from textwrap import fill
from typing import NamedTuple

from fedkl import wording
from fedkl.attacking.verdict import SAFE_FROM
from fedkl.config import AttackConfig
from fedkl.report import attack_tables, pictures
from fedkl.report.collect import AttackRun
from fedkl.report.names import plain_names

MAX_COLUMNS = 9
_HEADING = 11  # characters of a heading's line: large type stays readable on a phone


class Answer(NamedTuple):
    """What was sent, and how many of its images which attacker identifies."""

    sent: str
    found: str


class SideBySide(NamedTuple):
    """The pictures, what must be known of them, and the same in words for those who do not see them.

    Attributes:
        grid: The pictures.
        answers: What they say, a line for each way to send an update.
        limits: What they do not say.
        caption: Of the pictures.
        alt: The pictures in words.
    """

    grid: pictures.Grid
    answers: list[Answer]
    limits: str
    caption: str
    alt: str


class _Column(NamedTuple):
    run: AttackRun
    arm: str
    sent: str
    suffix: str = ""

    @property
    def attack(self) -> str:
        return self.run.config.attack.title or self.run.config.attack.type

    @property
    def knows(self) -> bool:
        return self.run.config.attack.knows_locks

    @property
    def heading(self) -> str:
        return fill(f"{self.sent}{self.suffix}", _HEADING, break_long_words=False, break_on_hyphens=False)

    @property
    def hits(self) -> str:
        return wording.count(self.run.arms[self.arm]["identified"])

    @property
    def identified(self) -> str:
        return f"{self.sent}{self.suffix} ({self.attack}) {self.hits}"


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
    places = [(grids[column.run.name], 1 + list(column.run.arms).index(column.arm)) for column in columns]
    first = places[0][0]
    rows = [
        pictures.Row(row.label, [row.cells[0], *(_said(grid.rows[i].cells[place]) for grid, place in places)])
        for i, row in enumerate(first.rows)
    ]
    problems = list(dict.fromkeys(text for grid, _ in places for text in grid.problems))
    headings = ["original", *(column.heading for column in columns)]
    shown = "; ".join(" ".join(heading.split()) for heading in headings)
    alt = f"{len(rows)} images; columns: {shown}"
    grid = pictures.Grid(headings, rows, first.total, problems)
    return SideBySide(grid, _answers(columns), _limits(columns[0], grid), _caption(columns, grid), alt)


def _setting(config: AttackConfig) -> str:
    """All but the attack, its arms, what it has besides, and how it is run."""
    return repr(config.model_copy(update=dict.fromkeys(("attack", "arms", "auxiliary", "workers", "chunk"))))


def _columns(runs: list[AttackRun]) -> list[_Column]:
    """By arm, then by attack; of what hides nothing only the first."""
    names = plain_names({name: arm for run in runs for name, arm in run.chosen.items()})
    every = [_Column(run, arm, names[arm]) for run in runs for arm in run.arms]
    nothing_hidden = [column for column in every if column.run.chosen[column.arm].open]
    hidden = [column for column in every if not column.run.chosen[column.arm].open]
    order = list(dict.fromkeys(column.arm for column in hidden))
    groups = [[column for column in hidden if column.arm == arm] for arm in order]
    return nothing_hidden[:1] + [column for group in groups for column in _told_apart(group)]


def _told_apart(group: list[_Column]) -> list[_Column]:
    """The attacks on one arm, with what tells them apart."""
    if len(group) == 1:
        return group
    if _one_knows(group):
        return [column._replace(suffix=", informed" if column.knows else "") for column in group]
    return [column._replace(suffix=f", {column.attack}") for column in group]


def _one_knows(group: Sequence[_Column]) -> bool:
    """Whether there are two attackers, one of whom knows how locks work."""
    return sorted(column.knows for column in group) == [False, True]


def _said(picture: pictures.Picture) -> pictures.Picture:
    """Whether it is identified, instead of decibels, which say nothing to most who see it."""
    if picture.caption == "failed":
        return picture
    if picture.image is None and not picture.identified:
        return picture._replace(caption="no picture")
    return picture._replace(caption="identified" if picture.identified else "")


def _answers(columns: Sequence[_Column]) -> list[Answer]:
    answers: list[Answer] = []
    before: list[str] = []
    for sent, grouped in groupby(columns, key=lambda column: column.sent):
        group = sorted(grouped, key=lambda column: column.knows)
        attacks = [column.attack for column in group]
        counts = [column.hits for column in group]
        if len(group) == 1:
            found = f"{counts[0]} images identified"
        elif attacks == before:
            found = f"{_listed(counts)} identified by the same attackers"
        elif _one_knows(group):
            found = f"{counts[0]} images identified by an attacker who does not know how locks work, "
            found += f"{counts[1]} by one who does"
        else:
            found = ", ".join(f"{column.hits} by {column.attack}" for column in group)
        answers.append(Answer(sent[0].upper() + sent[1:], f"{found}."))
        before = attacks
    return answers


def _listed(counts: list[str]) -> str:
    return f"{', '.join(counts[:-1])} and {counts[-1]}"


def _limits(column: _Column, grid: pictures.Grid) -> str:
    run, arm = column.run, column.run.arms[column.arm]
    text = f"By chance a picture is identified in {attack_tables.chance(arm, run)} cases"
    if run.config.batch_size == 1:
        once = 1 - (1 - 1 / arm["candidates"]) ** grid.total
        text += f", and at least one of {grid.total} pictures in {wording.percent(once)} of runs"
    proof = f" {grid.total} images show what happens; they do not prove it." if grid.total < SAFE_FROM else ""
    return f"{text}.{proof}"


def _caption(columns: list[_Column], grid: pictures.Grid) -> str:
    run = columns[0].run
    config, floor, arm = run.config, run.summary.get("floor"), run.arms[columns[0].arm]
    identified = "; ".join(column.identified for column in columns)
    guess = f"; the guess from the labels alone {wording.count(floor['identified'])}" if floor else ""
    start = "trained" if config.model.weights is not None else "untrained"
    informed = "Informed: the attacker knows how locks work, and has no key. "
    return (
        f"Identified: among {arm['candidates']} images the true one is most like the picture; by chance "
        f"{attack_tables.chance(arm, run)}. {identified}{guess}. "
        f"{informed if any(column.suffix == ', informed' for column in columns) else ''}{_lost(grid)}"
        f"The first {len(grid.rows)} of n = {grid.total} images of {config.data.name}, {config.batch_size} "
        f"an update, {start} {config.model.name}, seed {config.seed}; keys and masks are new in each run. "
        "Of its own results an attack takes the one that its own loss prefers; it never sees the true image."
    )


def _lost(grid: pictures.Grid) -> str:
    """What stands for a picture that nobody could see, if there is one."""
    found = [cell for row in grid.rows for cell in row.cells[1:] if cell.image is None]
    faint = any(cell.faint for cell in found)
    compared = (
        " Contrast too faint to be seen may hold the image, so it is compared all the same." if faint else ""
    )
    return f"×: no picture that can be seen.{compared} " if found else ""
