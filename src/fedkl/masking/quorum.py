"""How many members of a cohort it takes to open a sum with pair masks."""

from __future__ import annotations

from collections.abc import Sequence


def least_listed(cohort: Sequence[str], *, minimum: int) -> int:
    """Uploads that a list must have, and shares that open one member's own mask: t.

    A server may show every member another list. With these t it still learns no sum of fewer than `minimum`
    of the n members. Of a set S whose sum it learns, each member x is listed by t who give shares of its
    mask. One outside S who lists x keeps its pair mask with x, so that x must have left it out; x leaves out
    n − t at most. So t ≤ |S| + n − t, and |S| ≥ 2t − n, which is at least the minimum and at least a third of
    n. Members who work with the server answer whatever it wants: with c of them, |S| ≥ 2t − n − c.

    Args:
        cohort: Who is asked, n names.
        minimum: The roster's.
    """
    count = len(cohort)
    return max(2 * count // 3 + 1, -(-(count + min(minimum, count)) // 2))
