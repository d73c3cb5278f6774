"""The table of defenses as Markdown and as points of a figure, from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedkl import wording
from fedkl.attacking.records import Record
from fedkl.attacking.verdict import SHOWN
from fedkl.errors import problems_of
from fedkl.markdown import escaped, table_lines
from fedkl.report.figures import Tradeoff

Exposed = dict[str, Any]

ROUND, ONE = "your-client", "gradient-of-1"
"""Exposures that the table leads with: what clients really send, and one step on one image."""

_QUESTIONS = {"presence": "recognized", "identified": "identified"}

_NOTES = (
    "Recognized: of a client's images, at a threshold that 1 % of other images reach. Identified: by the "
    "attacker that did best, among 100 candidates. [95 % interval]. *at the floor*: no more than without the "
    "update. *undecided*: the attackers fail where nothing is hidden, too, or found more, but not surely.",
    "Attackers know the defense and no secret. Accuracy: of the clients, ± standard deviation over seeds. "
    "ε: of the whole training, for the client that spent most, at the ledger's δ.",
)


def markdown(records: Sequence[Record], *, row: str) -> str:
    """The table.

    Args:
        records: See `fedkl.reproduce.defenses`.
        row: Whose network.
    """
    names = list(dict.fromkeys(name for each in records for name in each["exposed"]))
    titles = {name: _title(records, name) for name in names}
    main = ("defense", "accuracy (%)", "ε", f"recognized, {titles.get(ROUND, ROUND)}", "identified, the same")
    first = table_lines(main, [_main(each) for each in records])
    upper = [name for name in names if name != ROUND]
    columns = ("defense", *(titles[name] for name in upper))
    reasons = [
        f"* {escaped(each['title'])}: {escaped(_brief(why))}" for each in records for why in each["reasons"]
    ]
    parts = [f"## {escaped(row)}", "\n".join(first)]
    for question, what in _QUESTIONS.items():
        lines = table_lines(columns, [_upper(each, upper, question) for each in records])
        parts += [f"Upper bounds, easier for attackers: {what}", "\n".join(lines)]
    return "\n\n".join([*parts, *_NOTES, *(["Not run:\n\n" + "\n".join(reasons)] if reasons else [])]) + "\n"


def _brief(reason: str) -> str:
    """In one line; of several problems the first and how many more."""
    lines, problems = reason.splitlines(), problems_of(reason)
    if not problems:
        return reason
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    before, after = lines[0], " ".join(lines[1 + len(problems) :])
    return f"{before.rstrip('.:')}: {problems[0].rstrip('.')}{more}. {after}".strip()


def _title(records: Sequence[Record], name: str) -> str:
    return next(str(each["exposed"][name]["title"]) for each in records if name in each["exposed"])


def _main(record: Record) -> list[str]:
    accuracy, spread, epsilon = record["accuracy"], record["spread"], record["epsilon"]
    here = record["exposed"].get(ROUND, {})
    return [
        escaped(record["title"]),
        wording.NONE
        if accuracy is None
        else f"{100 * accuracy:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}"),
        wording.NONE if epsilon is None else f"{epsilon:.3g}",
        _cell(here.get("presence")),
        _cell(here.get("identified"), by=True),
    ]


def _upper(record: Record, names: Sequence[str], question: str) -> list[str]:
    exposed = [record["exposed"].get(name, {}) for name in names]
    by = question == "identified"
    return [escaped(record["title"]), *(_cell(each.get(question), by=by) for each in exposed)]


def _cell(share: Mapping[str, Any] | None, *, by: bool = False) -> str:
    if share is None:
        return wording.NONE
    if share["outcome"] == "says nothing":
        return SHOWN["says nothing"]
    if share["outcome"] == "at the floor":
        others = share.get("undecided")
        return "at the floor" + (f" ({', '.join(others)}: {SHOWN['says nothing']})" if others else "")
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['rate']:.0f} % [{low:.0f}–{high:.0f}]" + (f" {share['attacker']}" if by else "")


def points(records: Sequence[Record], *, row: str) -> list[Tradeoff]:
    """The figure's points: accuracy lost in percentage points, and what leaks, in percent.

    Without defenses of which nothing is decided, which would look good, and without those that were not
    trained.
    """
    plain = next((each["accuracy"] for each in records if each["name"] == "none"), None)
    panels = ((ROUND, "presence", "recognized, a round"), (ONE, "identified", "identified, one image"))
    found = []
    for exposure, question, what in panels:
        for record in records:
            share = record["exposed"].get(exposure, {}).get(question)
            if plain is None or record["accuracy"] is None or share is None:
                continue
            if share["outcome"] == "says nothing":
                continue
            found.append(
                Tradeoff(
                    group=f"{row}: {what}",
                    name=record["title"],
                    cost=100 * (plain - record["accuracy"]),
                    spread=100 * (record["spread"] or 0.0),
                    share=100 * share["rate"],
                    low=100 * share["low"],
                    high=100 * share["high"],
                )
            )
    return found
