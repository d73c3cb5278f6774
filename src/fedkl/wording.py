"""Numbers as a reader sees them. What does not exist is a dash, never a zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "–"


def percent(share: float, *, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage.

    >>> percent(0.9745)
    '97.5 %'
    """
    return f"{100 * share:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign.

    >>> points(-0.019)
    '−1.9 points'
    """
    return signed(f"{100 * difference:+.1f} points")


def signed(text: str) -> str:
    """A true minus sign instead of the hyphen."""
    return text.replace("-", "−")


def number(value: float | None, *, digits: int = 1) -> str:
    """A number with fixed digits."""
    return NONE if value is None else signed(f"{value:.{digits}f}")


def small(value: float | None) -> str:
    """A number of any size, to two significant digits."""
    return NONE if value is None else signed(f"{value:.2g}")


def median_interval(figures: Mapping[str, Any], *, digits: int = 1) -> str:
    """Median [interval]; few values give no interval."""
    if figures["median_low"] is None:
        return f"{number(figures['median'], digits=digits)} [{NONE}]"
    low, high = (number(figures[name], digits=digits) for name in ("median_low", "median_high"))
    return f"{number(figures['median'], digits=digits)} [{low}, {high}]"


def mean_spread(figures: Mapping[str, Any], *, digits: int = 1) -> str:
    """Mean ± standard deviation."""
    return f"{number(figures['mean'], digits=digits)} ± {number(figures['std'], digits=digits)}"


def hits(rate: Mapping[str, Any]) -> int:
    """The number of successes behind a rate."""
    return round(float(rate["rate"]) * int(rate["n"]))


def count(rate: Mapping[str, Any]) -> str:
    """`k of n`."""
    return f"{hits(rate)} of {rate['n']}"


def count_interval(rate: Mapping[str, Any]) -> str:
    """`k of n` with the interval of the share."""
    return f"{count(rate)} [{100 * rate['low']:.0f}–{100 * rate['high']:.0f} %]"
