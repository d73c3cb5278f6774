"""Summaries over trials: every one says how many trials, how many failures and how wide the spread is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import NamedTuple

import numpy as np

from fedkl.errors import ConfigError


class Rate(NamedTuple):
    """A success rate with its Wilson interval and the number of trials behind it."""

    rate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A metric over trials. Failures count in `n`; all other figures are over the trials with a value.

    Attributes:
        n: All trials, failures included.
        failures: Trials without a value.
        mean: Arithmetic mean; None without a value.
        std: Sample standard deviation (divisor values − 1); None below two values.
        median: Median; None without a value.
        low: Lower end of the interval of the mean (Student's t); None below two values.
        high: Upper end of it; None below two values.
        median_low: Lower end of the interval of the median (order statistics); None where too few values.
        median_high: Upper end of it; None where too few values.
        confidence: Confidence of both intervals.
    """

    n: int
    failures: int
    mean: float | None
    std: float | None
    median: float | None
    low: float | None
    high: float | None
    median_low: float | None
    median_high: float | None
    confidence: float

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name; valid JSON, without NaN or infinity."""
        return asdict(self)


def summarize(values: Sequence[float | None], *, confidence: float = 0.95) -> Summary:
    """Summarizes a metric over trials.

    A mean over survivors flatters whichever side fails more; read it together with `failures`.

    Args:
        values: One per trial; None for a failed trial.
        confidence: Confidence of the intervals, in (0, 1).

    Returns:
        The summary; figures that so few values cannot give are None, never NaN.

    Raises:
        ConfigError: A value is NaN or infinite, or the confidence is not in (0, 1).

    >>> summary = summarize([10.0, 12.0, None])
    >>> summary.n, summary.failures, summary.mean
    (3, 1, 11.0)
    """
    found = [float(value) for value in values if value is not None]
    mean_ends = mean_interval(found, confidence=confidence)
    median_ends = median_interval(found, confidence=confidence)
    return Summary(
        n=len(values),
        failures=len(values) - len(found),
        mean=fmean(found) if found else None,
        std=stdev(found) if len(found) > 1 else None,
        median=median(found) if found else None,
        low=mean_ends[0] if mean_ends else None,
        high=mean_ends[1] if mean_ends else None,
        median_low=median_ends[0] if median_ends else None,
        median_high=median_ends[1] if median_ends else None,
        confidence=confidence,
    )


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float] | None:
    """Student-t interval of the mean, mean ± t · s / √n.

    Args:
        values: Finite values, one per successful trial.
        confidence: In (0, 1).

    Returns:
        (low, high), in the unit of the values; None below two values, where the spread is unknown.

    Raises:
        ConfigError: A value is not finite, or the confidence is not in (0, 1).

    >>> low, high = mean_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    from scipy.special import stdtrit  # what scipy.stats calls; all of that takes a second to import

    _check(values, confidence)
    n = len(values)
    if n < 2:
        return None
    center = fmean(values)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * stdev(values) / math.sqrt(n)
    return center - half, center + half


def median_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float] | None:
    """Distribution-free interval of the median: the k-th smallest and the k-th largest value.

    The number of values below the median is binomial (n, 1/2); k is the largest rank for which both tails
    together stay within 1 − confidence, so the true coverage is at least `confidence`.

    Args:
        values: Finite values, one per successful trial.
        confidence: In (0, 1).

    Returns:
        (low, high), in the unit of the values; None where even smallest and largest do not reach the
        confidence (below 6 values at 95 %).

    Raises:
        ConfigError: A value is not finite, or the confidence is not in (0, 1).

    >>> median_interval([3.0, 1.0, 4.0, 1.5, 9.0, 2.6])
    (1.0, 9.0)
    """
    from scipy.special import bdtr

    _check(values, confidence)
    n = len(values)
    tails = bdtr(np.arange(n), n, 0.5)
    rank = int(np.count_nonzero(tails <= (1 - confidence) / 2))
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[n - rank]


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion; unlike p ± z·s it is of use at 0 or n successes.

    Args:
        successes: 0 .. n.
        n: Number of trials, at least 1.
        confidence: In (0, 1).

    Returns:
        (low, high) in [0, 1].

    Raises:
        ConfigError: The counts do not fit together, or the confidence is not in (0, 1).

    Source:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927; without
        continuity correction.

    >>> low, high = wilson_interval(0, 20)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.161)
    """
    _check((), confidence)
    if n < 1 or not 0 <= successes <= n:
        raise ConfigError(f"successes: expected 0 .. n with n of at least 1, got {successes} of {n}.")
    return _wilson(successes / n, float(n), confidence=confidence)


def _wilson(share: float, n: float, *, confidence: float, groups: int | None = None) -> tuple[float, float]:
    """For a number of trials that need not be whole; of so many groups, if it is known from their scatter."""
    from scipy.special import ndtri, stdtrit

    upper = (1 + confidence) / 2
    z = float(ndtri(upper) if groups is None else stdtrit(groups - 1, upper))
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At the ends the formula gives exactly 0 or 1; rounding must not push the rate out of its interval.
    low = 0.0 if share == 0 else max(0.0, center - half)
    high = 1.0 if share == 1 else min(1.0, center + half)
    return low, high


def success_rate(
    values: Sequence[float | None],
    *,
    threshold: float,
    confidence: float = 0.95,
    groups: Sequence[Hashable] | None = None,
    alike: float = 1.0,
) -> Rate:
    """Share of all trials whose value reaches a threshold, with its Wilson interval.

    For metrics where more is nearer (PSNR, SSIM, correlation). A failed trial is no success, and it counts.

    Args:
        values: One per trial; None for a failed trial.
        threshold: A value of at least this is a success, in the unit of the values.
        confidence: Confidence of the interval, in (0, 1).
        groups: What each trial belongs to, where trials of one group are not independent (of one client):
            the interval is then that of so few trials as would scatter as the groups do, and where these
            scatter more than trials, with Student's t in place of the normal quantile.
        alike: Correlation within a group, in [0, 1], that is assumed where nothing or everything is a success
            and no scatter is seen: 1 counts a group as one trial, 0 each trial.

    Returns:
        (rate, low, high, n), n being the number of all trials.

    Raises:
        ConfigError: There is no trial, a value or the threshold is not finite, the confidence is not in
            (0, 1), there are not as many groups as values, or `alike` is not in [0, 1].

    Source:
        The effective number: Kish 1965, "Survey Sampling" (the design effect), with the ratio estimator's
        variance between groups; at least the number of groups, at most that of trials.

    >>> rate = success_rate([25.0, 18.0, None, 20.0], threshold=20.0)
    >>> rate.rate, rate.n
    (0.5, 4)
    """
    _check([value for value in values if value is not None], confidence)
    if not 0 <= alike <= 1:
        raise ConfigError(f"alike: expected a number from 0 to 1, got {alike}.")
    if not math.isfinite(threshold):
        raise ConfigError(f"threshold: expected a finite number, got {threshold}.")
    n = len(values)
    hits = [value is not None and value >= threshold for value in values]
    successes = sum(hits)
    low, high = wilson_interval(successes, n, confidence=confidence)
    if groups is not None:
        number, count = _effective_number(hits, groups, alike=alike), len(set(groups))
        scatter = count if count > 1 and 0 < successes < n and number < n else None
        low, high = _wilson(successes / n, number, confidence=confidence, groups=scatter)
    return Rate(successes / n, low, high, n)


def _effective_number(hits: Sequence[bool], groups: Sequence[Hashable], *, alike: float) -> float:
    """How many independent trials would scatter as the groups' shares do."""
    if len(groups) != len(hits):
        raise ConfigError(f"groups: expected one per value, {len(hits)}, got {len(groups)}.")
    n, share = len(hits), sum(hits) / len(hits)
    excess: dict[Hashable, float] = {}
    for hit, group in zip(hits, groups, strict=True):
        excess[group] = excess.get(group, 0.0) + hit - share
    count = len(excess)
    if share in (0, 1):  # nothing is known of the scatter between groups
        return n / (1 + (n / count - 1) * alike)
    if count < 2:
        return float(count)
    variance = count / (count - 1) * sum(each**2 for each in excess.values()) / n**2
    return float(min(max(share * (1 - share) / variance, count), n) if variance else n)


def _check(values: Sequence[float], confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: expected a number between 0 and 1, got {confidence}.")
    broken = [index for index, value in enumerate(values) if not math.isfinite(value)]
    if broken:
        raise ConfigError(
            f"values: expected finite numbers, got {values[broken[0]]} (number {broken[0]} of those given, "
            "None aside). Pass None for a failed trial."
        )
