"""What a report consists of; HTML and Markdown are two renderings of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from fedkl.report.pictures import Grid
from fedkl.report.side_by_side import SideBySide

TITLE = "What does it leak, and what stops it?"

NOTE = (
    "That these attacks find nothing is no proof of safety: others may. See “What do lock and masks protect "
    "against, and what not?” (docs/security.md)."
)

RUNS_SUMMARY = "The same in the words of the runs, with what it costs"

REPEAT_NOTE = (
    "Seeds fix weights, partition, batch orders and the starts of attacks. Keys and lock layers come from "
    "the operating system's random numbers and cannot be seeded: arms with a lock vary from run to run."
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        title: Its caption.
        header: Column names.
        rows: Cells, as text.
        notes: Lines below it.
        narrow: Columns for a terminal; all if empty.
        tones: For each row what its last cell says: "good", "bad" or "open"; empty without.
        turned: Whether pages show the rows as columns; a terminal never does.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    narrow: tuple[int, ...] = ()
    tones: list[str] = field(default_factory=list)
    turned: bool = False

    def lines(self) -> list[list[str]]:
        """Header and rows as a page shows them."""
        lines = [self.header, *self.rows]
        return [list(column) for column in zip(*lines, strict=True)] if self.turned else lines

    def essential(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, header and rows in the columns that a terminal has room for."""
        columns = self.narrow or tuple(range(len(self.header)))
        return self.title, [self.header[i] for i in columns], [[row[i] for i in columns] for row in self.rows]


class Figure(NamedTuple):
    """A figure: its file in figures/, its caption, and the same in words for those who do not see it."""

    name: str
    caption: str
    alt: str


class Repeat(NamedTuple):
    """How to repeat one run."""

    name: str
    command: str
    config: str
    machine: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class AttackSection:
    """One attack run: pictures, figures, and the paper's figures where they apply."""

    name: str
    grid: Grid
    figure: str
    table: Table
    paper: str | None


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole report, in its order."""

    opening: SideBySide | None
    verdict: str
    note: str
    verdict_table: Table
    unfinished: list[str]
    training: Table | None
    partitions: list[Figure]
    claim_b: Table | None
    attacks: list[AttackSection]
    repeat: list[Repeat]
    figures: dict[str, bytes]
    curves_alt: str

    def tables(self) -> list[Table]:
        """All tables that have rows, in order."""
        found = [self.verdict_table, self.training, self.claim_b, *(s.table for s in self.attacks)]
        return [table for table in found if table is not None and table.rows]
