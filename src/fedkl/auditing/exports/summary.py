"""A short Markdown summary, e.g. for $GITHUB_STEP_SUMMARY."""

from __future__ import annotations

from collections.abc import Iterator

from fedkl.auditing import words
from fedkl.auditing.gate import GateResult
from fedkl.auditing.results import Audit
from fedkl.markdown import escaped, table_lines

_SHOWN = 10  # rows, or reasons


def summary(audit: Audit, result: GateResult) -> str:
    """The verdict, what clients really leak, and what came of the limits.

    Args:
        audit: What was found.
        result: What `judge` made of it.
    """
    return "\n".join(_lines(audit, result)) + "\n"


def _lines(audit: Audit, result: GateResult) -> Iterator[str]:
    yield from (f"## {escaped(words.title(audit))}", "")
    yield from (f"**{escaped(words.verdict(audit).text)}**", "")
    for reason in result.reasons[:_SHOWN]:
        yield f"* {escaped(reason)}"
    if len(result.reasons) > _SHOWN:
        yield f"* and {len(result.reasons) - _SHOWN} more"
    found = audit.headlines()
    if found:
        rows = [
            [
                words.QUESTIONS[each.question],
                each.found.percent,
                escaped(words.judged(each)),
                escaped(each.attacker),
                escaped(audit.exposure(each.exposure).title),
            ]
            for each in found[:_SHOWN]
        ]
        yield ""
        yield from table_lines(("of your client's images", "share", "verdict", "attacker", "setting"), rows)
    yield from ("", escaped(words.caution(audit)))
