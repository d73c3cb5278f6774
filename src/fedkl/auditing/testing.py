"""Audits in test suites."""

from __future__ import annotations

from fedkl.auditing.gate import Gate, judge
from fedkl.auditing.results import Audit


def assert_no_leak(audit: Audit, *, fail_above: str, baseline: Audit | None = None) -> None:
    """Fails where a limit is crossed, and where the evidence does not suffice to say.

    Args:
        audit: What `fedkl.auditing.audit` returned, or `Audit.read` read.
        fail_above: The limits, as on the command line: ``"presence_tpr=0.2"``.
        baseline: An earlier audit of the same; nothing may be surely worse.

    Raises:
        AssertionError: It does not pass; the message has every reason.
        ConfigError: The limits are not usable, or the baseline is of something else.
    """
    result = judge(audit, Gate.parse(fail_above), baseline=baseline)
    if result.exit_code:
        summary = "A limit is crossed." if result.exit_code == 1 else "The evidence is incomplete."
        raise AssertionError("\n".join([summary, *(f"  - {reason}" for reason in result.reasons)]))
