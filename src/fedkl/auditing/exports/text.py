"""A few lines of plain text, as a terminal shows them: the worst first."""

from __future__ import annotations

from fedkl.auditing import words
from fedkl.auditing.gate import GateResult, State
from fedkl.auditing.results import Audit

_FINDINGS, _REASONS = 5, 2  # lines

_LIMITS: dict[State, str] = {
    "crossed": "Limit crossed",
    "undecided": "Limit undecided",
    "missing": "Limit without evidence",
    "passed": "Limit kept",
}


def text(audit: Audit, result: GateResult) -> list[str]:
    """The verdict, what clients really leak, what came of the limits, and what that does not say.

    With every limit there is and an earlier audit 16 lines at most.

    Args:
        audit: What was found.
        result: What `judge` made of it.
    """
    found = audit.headlines()
    lines = [words.verdict(audit).text]
    lines += [
        f"  {words.OUTCOMES[each.outcome]}: {words.QUESTIONS[each.question]} {each.found.percent}, "
        f"{each.attacker}, {audit.exposure(each.exposure).title}{words.because(each)}"
        for each in found[:_FINDINGS]
    ]
    lines += _more(len(found) - _FINDINGS, "findings")
    lines += [f"{_LIMITS[check.state]}: {check.text}" for check in result.limits]
    limited = {check.text for check in result.checks if check.limit is not None}
    reasons = [reason for reason in result.reasons if reason not in limited]
    lines += [f"Not passed: {reason}" for reason in reasons[:_REASONS]]
    lines += _more(len(reasons) - _REASONS, "reasons")
    return [*lines, words.caution(audit)]


def _more(count: int, what: str) -> list[str]:
    return [f"  and {count} more {what}"] if count > 0 else []
