from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from fedkl import metrics
from fedkl.errors import ConfigError

VALUES = [17.2, 9.1, 23.4, 11.0, 8.7, 30.2, 15.5, 12.1, 19.9]


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (7, 20), (20, 20), (499, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_agrees_with_scipy(successes, n, confidence):
    oracle = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    interval = metrics.wilson_interval(successes, n, confidence=confidence)
    assert interval == pytest.approx((oracle.low, oracle.high), abs=1e-12)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_mirrors(case):
    successes, n = case
    low, high = metrics.wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    assert metrics.wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ConfigError, match=f"got {successes} of {n}"):
        metrics.wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_mean_interval_agrees_with_scipy(confidence):
    oracle = scipy.stats.ttest_1samp(VALUES, 0).confidence_interval(confidence)
    ours = metrics.mean_interval(VALUES, confidence=confidence)
    assert ours == pytest.approx((oracle.low, oracle.high))


def test_mean_interval_of_equal_values_is_a_point():
    assert metrics.mean_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)


@pytest.mark.parametrize("n", [6, 7, 9, 10, 20, 31, 100])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_median_interval_is_the_narrowest_that_keeps_its_coverage(n, confidence):
    low, high = metrics.median_interval([float(rank) for rank in range(n, 0, -1)], confidence=confidence)
    rank = int(low)
    assert high == n + 1 - rank
    covered = [sum(math.comb(n, j) for j in range(k, n - k + 1)) / 2**n for k in (rank, rank + 1)]
    assert covered[0] >= confidence > covered[1]


@pytest.mark.skipif(not hasattr(scipy.stats, "quantile_test"), reason="this SciPy is too old to ask")
def test_median_interval_agrees_with_scipys_quantile_test():
    # Asymmetric by one rank at most: scipy's interval is that of a test per side.
    values = np.sort(np.random.default_rng(1).normal(size=50))
    oracle = scipy.stats.quantile_test(values, q=0, p=0.5).confidence_interval(0.95)
    low, high = metrics.median_interval(values.tolist())
    assert (low, high) == (oracle.low, oracle.high)


@pytest.mark.parametrize("n", range(6))
def test_too_few_values_have_no_median_interval(n):
    assert metrics.median_interval(VALUES[:n]) is None


def test_summary_counts_failures_and_ignores_their_values():
    summary = metrics.summarize([*VALUES[:4], None, *VALUES[4:], None])
    assert (summary.n, summary.failures) == (11, 2)
    assert summary.mean == pytest.approx(np.mean(VALUES))
    assert summary.std == pytest.approx(np.std(VALUES, ddof=1))
    assert summary.median == np.median(VALUES)
    assert (summary.low, summary.high) == metrics.mean_interval(VALUES)
    assert (summary.median_low, summary.median_high) == metrics.median_interval(VALUES)
    assert summary.confidence == 0.95


@pytest.mark.parametrize("values", [[], [None], [None, None, None]])
def test_nothing_is_summarized_as_none(values):
    summary = metrics.summarize(values)
    assert (summary.n, summary.failures) == (len(values), len(values))
    others = {name: value for name, value in summary.to_dict().items() if value is not None}
    assert set(others) == {"n", "failures", "confidence"}


def test_one_value_has_no_interval():
    summary = metrics.summarize([4.5])
    assert (summary.mean, summary.median, summary.n) == (4.5, 4.5, 1)
    assert summary.std is summary.low is summary.high is summary.median_low is summary.median_high is None
    assert metrics.mean_interval([4.5]) is None


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=30))
def test_summaries_are_valid_json_and_ordered(values):
    summary = metrics.summarize(values)
    assert json.loads(json.dumps(summary.to_dict(), allow_nan=False)) == summary.to_dict()
    if summary.low is not None:
        assert summary.low <= summary.mean <= summary.high
    if summary.median_low is not None:
        assert summary.median_low <= summary.median <= summary.median_high


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "summary",
    [
        metrics.summarize,
        metrics.mean_interval,
        metrics.median_interval,
        lambda values: metrics.success_rate(values, threshold=1.0),
    ],
)
def test_non_finite_values_are_refused(summary, value):
    with pytest.raises(ConfigError, match="number 1 "):
        summary([1.0, value])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_confidence_is_a_share(confidence):
    with pytest.raises(ConfigError, match="confidence"):
        metrics.summarize(VALUES, confidence=confidence)
    with pytest.raises(ConfigError, match="confidence"):
        metrics.wilson_interval(1, 2, confidence=confidence)


def test_failures_are_no_successes_but_trials():
    rate = metrics.success_rate([25.0, None, 20.0, 19.999, None], threshold=20.0)
    assert (rate.rate, rate.n) == (0.4, 5)
    assert (rate.low, rate.high) == metrics.wilson_interval(2, 5)
    assert metrics.success_rate([None], threshold=0.0).rate == 0
    assert metrics.success_rate([1.0] * 8, threshold=1.0, confidence=0.5).low > 0.9


def test_trials_of_a_group_count_for_less_the_more_groups_differ():
    """Four of eight, whatever the groups: independent, in four groups that agree, in two that do not."""
    hits = [1.0, 0.0] * 4
    pairs, halves = [0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4
    alone = metrics.success_rate(hits, threshold=1.0)
    assert metrics.success_rate(hits, threshold=1.0, groups=pairs) == alone
    apart = metrics.success_rate(hits, threshold=1.0, groups=halves)
    assert (apart.rate, apart.n) == (0.5, 8)
    low, high = metrics.wilson_interval(1, 2)
    assert apart.low < low < high < apart.high  # two groups tell little of their scatter
    # Shares of 1, 1, 0 and 0 scatter as those of four trials at most.
    scattered = metrics.success_rate([1.0] * 4 + [0.0] * 4, threshold=1.0, groups=pairs)
    low, high = metrics.wilson_interval(2, 4)
    assert apart.low < scattered.low < low < high < scattered.high < apart.high


@pytest.mark.parametrize("hit", [0.0, 1.0])
@pytest.mark.parametrize(("alike", "trials"), [(1.0, 6), (0.0, 240), (0.05, 240 / 2.95)])
def test_where_no_group_scatters_it_is_said_how_alike_one_is(hit, alike, trials):
    """Kish's design effect, 1 + 39 · alike for six groups of 40."""
    groups = [number // 40 for number in range(240)]
    found = metrics.success_rate([hit] * 240, threshold=1.0, groups=groups, alike=alike)
    z2 = 1.959964**2
    assert found.high - found.low == pytest.approx(z2 / (trials + z2))


def test_how_alike_is_a_share():
    with pytest.raises(ConfigError, match="alike"):
        metrics.success_rate([1.0], threshold=1.0, groups=[0], alike=1.5)


@pytest.mark.parametrize(("groups", "size"), [(3, 300), (6, 40), (6, 100), (15, 16)])
def test_intervals_of_few_groups_hold_the_truth(groups, size):
    """Shares that differ from group to group around .3; 95 % are asked for."""
    draws = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        shares = draws.beta(2.5, 5.8, groups)  # mean .3, standard deviation .15
        hits = (draws.random((groups, size)) < shares[:, None]).ravel().astype(float)
        found = metrics.success_rate(
            hits.tolist(), threshold=1.0, groups=np.repeat(np.arange(groups), size).tolist()
        )
        inside += found.low <= 2.5 / 8.3 <= found.high
    assert inside / 400 > 0.91  # .93 to .96; with the normal quantile .80 to .90


def test_without_a_difference_there_are_as_many_trials_as_groups():
    none = metrics.success_rate([0.0] * 6, threshold=1.0, groups=[0, 0, 0, 1, 1, 1])
    assert (none.low, none.high) == metrics.wilson_interval(0, 2)
    with pytest.raises(ConfigError, match="groups: expected one per value, 2, got 1"):
        metrics.success_rate([1.0, 0.0], threshold=1.0, groups=[0])


def test_a_rate_needs_a_trial_and_a_threshold():
    with pytest.raises(ConfigError, match="0 of 0"):
        metrics.success_rate([], threshold=1.0)
    with pytest.raises(ConfigError, match="threshold"):
        metrics.success_rate([1.0], threshold=math.nan)
