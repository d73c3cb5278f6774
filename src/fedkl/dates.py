"""The date that cards and rosters are good until is compared with."""

from __future__ import annotations

from datetime import date, datetime, timezone


def today() -> date:
    """The date in UTC: the same for all members."""
    return datetime.now(timezone.utc).date()
