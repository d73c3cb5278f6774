"""Who shares pair masks and shares with whom."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from fedkl.masking.schedule import Label, derive

ALL_UP_TO = 64
"""Cohorts of so many members: each has a pair mask with each."""

DEGREE = 50
"""Neighbors in larger cohorts: the next ones on both sides of a ring."""


def neighbors(name: str, cohort: Sequence[str], *, secret: bytes, context: bytes) -> tuple[str, ...]:
    """The neighbors of a member in a cohort, sorted; whose neighbor one is is one's neighbor.

    Args:
        name: The member.
        cohort: Names.
        secret: The cohort's key: the server cannot choose who sits beside whom.
        context: Digest of the context.

    Source:
        Bell et al. 2020 (ePrint 2020/704).
    """
    if len(cohort) <= ALL_UP_TO:
        return tuple(sorted(set(cohort) - {name}))
    key = derive(secret, Label.GRAPH, context)
    ring = sorted(cohort, key=lambda each: hmac.digest(key, each.encode(), "sha256"))
    place, half = ring.index(name), DEGREE // 2
    steps = [step for step in range(-half, half + 1) if step]
    return tuple(sorted(ring[(place + step) % len(ring)] for step in steps))


def holders(members: int) -> int:
    """How many hold a share of a member's seed in a cohort of so many: it itself and its neighbors."""
    return members if members <= ALL_UP_TO else DEGREE + 1


def least_listed(cohort: Sequence[str], *, minimum: int) -> int:
    """Uploads that a sum with pair masks needs: the roster's minimum, and enough to open a mask."""
    return max(minimum, threshold(len(cohort)))


def threshold(count: int) -> int:
    """How many of so many holders of shares open a mask: more than two thirds.

    Two lists of one round then cannot both find enough honest ones.
    """
    return 2 * count // 3 + 1
