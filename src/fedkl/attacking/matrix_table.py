"""What the worst-rung matrix says: per arrangement the rung that reads most, its control and the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkl import wording
from fedkl.attacking.attackers import CEILING, FLOOR, RUNGS
from fedkl.attacking.records import Record
from fedkl.attacking.verdict import CONTROL_SHARE, SAFE_FROM, SHOWN, Kind, judge
from fedkl.markdown import table_lines

_CELL = ("row", "batch", "steps", "cohort")
_HEADER = ("network/data", "batch", "steps", "cohort", "private")
_NOTES = (
    "Worst rung: the attack that identified most images among the candidates. Of equal ones, the one with "
    "the higher median SSIM. Attacks are not combined.",
    "n counts images. In batches and cohorts it counts only those whose label no other image of the update "
    "has. Several of one class come out as a mixture, with a defense and without.",
    "Intervals: 95 %, after Wilson, over images. Where all images share one network, they are for that "
    "network. Where clients send several updates, they are widened by how much clients differ.",
    "Control: the same attack on the same network with public γ and β (for a lock) or without a private "
    "layer.",
    "Leaks: the interval of some attack lies above the floor's, or an image was recovered. At the floor: no "
    f"attack's does, and one of them found at least {CONTROL_SHARE:.0%} of its control's images, with at "
    f"least {SAFE_FROM} images each. That is a claim about these attacks, not of safety. Undecided: "
    "neither.",
    "The floor looks at the label only: the mean of the auxiliary images of its class, or in a batch noise, "
    "if that finds more. In a batch the matching with the truth lifts identification, there too.",
    "Not a rung: matching with γ and β known, the ceiling of the matching rungs.",
)


def markdown(records: Sequence[Record], *, refused: Sequence[tuple[Mapping[str, Any], str]]) -> str:
    """The matrix, all rungs behind it, and those that could not work.

    Args:
        records: One per cell and arm, with row, batch, steps, rung, arm, arrangement (what is private) and
            the name of its control.
        refused: Cells that an attack cannot do, and why.
    """
    judged = [_row(cell) for cell in judgments(records)]
    header = (*_HEADER, "worst rung", "n", "identified [95 %]", "SSIM", "its control", "floor", "verdict")
    lines = "\n".join(table_lines(header, judged))
    left_out = [name for name in RUNGS if name not in {r["rung"] for r in records}]
    missing = [f"Rungs not run: {', '.join(left_out)}."] if left_out else []
    reasons = dict.fromkeys(f"Not run: {given['rung']}, {_where(given)}. {why}" for given, why in refused)
    return "\n\n".join([lines, *missing, *_NOTES, "All rungs:", _all_rungs(records), *reasons]) + "\n"


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """One arrangement in one cell.

    Attributes:
        row: Network and data.
        batch: Images behind an update.
        steps: Local steps behind an update.
        cohort: Clients over whose updates the server sees the mean.
        arrangement: What is private.
        worst: The record of the rung that read most.
        compared: The same attack on the control; None if it was not run.
        floor: The floor's figures, the highest that were noted; None if there are none.
        verdict: See the notes below the table.
    """

    row: str
    batch: int
    steps: int
    cohort: int
    arrangement: str
    worst: Record
    compared: Record | None
    floor: Record | None
    verdict: Kind


def judgments(records: Sequence[Record]) -> list[Judgment]:
    """Every arrangement of every cell by its worst rung; controls are no arrangements.

    Args:
        records: See `markdown`.
    """
    kept = [r for r in records if r["control"] is not None]
    places = dict.fromkeys((*(r[name] for name in _CELL), r["arrangement"]) for r in kept)
    found = [_judged(place, records) for place in places]
    return [each for each in found if each is not None]


def _judged(place: tuple[Any, ...], records: Sequence[Record]) -> Judgment | None:
    *cell, arrangement = place
    here = [r for r in records if [r[name] for name in _CELL] == cell]
    own = [r for r in here if r["arrangement"] == arrangement]
    rungs = [r for r in own if r["rung"] != FLOOR and r["arm"] != CEILING]
    if not rungs:
        return None
    controls = {r["rung"]: r for r in here if r["arrangement"] == own[0]["control"]}
    worst = max(rungs, key=lambda r: (_rate(r), _middle(r["ssim"])))
    floor = next((r for r in own if r["rung"] == FLOOR), None)
    return Judgment(
        **dict(zip(_CELL, cell, strict=True)),
        arrangement=arrangement,
        worst=worst,
        compared=controls.get(worst["rung"]),
        floor=max([floor, *(rung.get("floor") for rung in rungs)], key=_rate),
        verdict=verdict(rungs, controls=controls, floor=floor),
    )


def _row(cell: Judgment) -> list[str]:
    return [
        *(str(part) for part in (cell.row, cell.batch, cell.steps, cell.cohort, cell.arrangement)),
        name_of(cell.worst),
        str(cell.worst["n"]),
        wording.count_interval(cell.worst["identified"]),
        _ssim(cell.worst),
        wording.NONE if cell.compared is None else wording.count(cell.compared["identified"]),
        wording.NONE if cell.floor is None else wording.count(cell.floor["identified"]),
        SHOWN[cell.verdict],
    ]


def verdict(rungs: Sequence[Record], *, controls: Mapping[str, Record], floor: Record | None) -> Kind:
    """What a cell says: a leak if any rung leaks; at the floor if any of them says so.

    Args:
        rungs: All that were run against the arrangement.
        controls: The same attacks' records on their control, by rung.
        floor: The floor's record, if it was run. What a rung's run noted itself counts where it is higher:
            of batches that has a guess more.
    """
    found = {
        judge(
            rung,
            floor=max(floor, rung.get("floor"), key=_rate),
            control=controls.get(rung["rung"]),
        ).kind
        for rung in rungs
    }
    order: tuple[Kind, ...] = ("leaks", "at the floor")
    return next((kind for kind in order if kind in found), "says nothing")


def _all_rungs(records: Sequence[Record]) -> str:
    header = (*_HEADER, "rung", "n", "identified", "SSIM", "PSNR (dB)")
    rows = [
        [
            *(str(r[name]) for name in _CELL),
            r["arrangement"],
            name_of(r),
            str(r["n"]),
            wording.count(r["identified"]),
            _ssim(r),
            wording.NONE if r["psnr"] is None else wording.number(r["psnr"]["median"], digits=1),
        ]
        for r in records
    ]
    return "\n".join(table_lines(header, rows))


def _where(given: Mapping[str, Any]) -> str:
    cohort = f", cohort of {given['cohort']}" if given["cohort"] > 1 else ""
    return f"{given['row']}, batch {given['batch']}, {given['steps']} local steps{cohort}"


def name_of(record: Record) -> str:
    """A rung and, where it has several, its guess of γ and β."""
    plain = not record["arm"].startswith("lock-")
    return record["rung"] if plain else f"{record['rung']}, {record['arm'].removeprefix('lock-')}"


def _rate(record: Record | None) -> float:
    return -1.0 if record is None else float(record["identified"]["rate"])


def _middle(figure: Mapping[str, float] | None) -> float:
    return -1.0 if figure is None else figure["median"]


def _ssim(record: Record) -> str:
    return wording.NONE if record["ssim"] is None else wording.number(record["ssim"]["median"], digits=2)
