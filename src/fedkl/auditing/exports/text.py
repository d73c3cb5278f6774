"""A few lines of plain text, as a terminal shows them: the worst first."""

from __future__ import annotations

from fedkl.auditing import words
from fedkl.auditing.gate import GateResult
from fedkl.auditing.results import Audit

_FINDINGS, _REASONS = 5, 4  # lines


def text(audit: Audit, result: GateResult) -> list[str]:
    """The verdict, what clients really leak, what did not pass, and what that does not say; 13 lines at most.

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
    lines += [f"Limit: {reason}" for reason in result.reasons[:_REASONS]]
    lines += _more(len(result.reasons) - _REASONS, "reasons")
    return [*lines, words.caution(audit)]


def _more(count: int, what: str) -> list[str]:
    return [f"  and {count} more {what}"] if count > 0 else []
