from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from fedkl import metrics
from fedkl.errors import AttackError
from fedkl.metrics.assignment import pairwise_cost

WRONG_SHAPE = (AttackError, TypeCheckError)


@settings(max_examples=30)
@given(order=st.permutations(range(6)))
def test_assignment_recovers_any_permutation(order, photographs):
    shuffled = photographs[list(order)] * 0.9 + 0.02
    match = metrics.best_match(shuffled, photographs)
    assert match.dtype == torch.int64
    assert [order[row] for row in match.tolist()] == list(range(6))
    assert (metrics.psnr(shuffled[match], photographs) > 20).all()


def test_assignment_is_the_best_of_all_permutations(generator):
    truths = torch.rand(5, 1, 3, 3, generator=generator, dtype=torch.float64)
    found = torch.rand(5, 1, 3, 3, generator=generator, dtype=torch.float64)
    match = metrics.best_match(found, truths)
    total = metrics.mse(found[match], truths).sum().item()
    every = [metrics.mse(found[list(p)], truths).sum().item() for p in itertools.permutations(range(5))]
    assert sorted(match.tolist()) == list(range(5))
    assert total == pytest.approx(min(every))


def test_assignment_is_global_where_the_nearest_would_be_used_twice():
    truths = torch.tensor([0.5, 0.6]).view(2, 1, 1, 1)
    found = torch.tensor([0.55, 1.0]).view(2, 1, 1, 1)  # 0.55 is the nearest to both
    assert metrics.best_match(found, truths).tolist() == [0, 1]


def test_pairwise_costs_agree_with_numpy(photographs):
    found = photographs.flip(0) * 0.5
    a, b = found.flatten(1).numpy(), photographs.flatten(1).numpy()
    oracle = ((a[:, None] - b[None]) ** 2).mean(-1)
    np.testing.assert_allclose(pairwise_cost(found, photographs, by="mse").numpy(), oracle, rtol=1e-10)
    oracle = 1 - np.corrcoef(a, b)[:6, 6:]
    ours = pairwise_cost(found, photographs, by="correlation").numpy()
    np.testing.assert_allclose(ours, oracle, atol=1e-12)


def test_correlation_matches_where_the_scale_is_a_guess(photographs, generator):
    noise = torch.randn(photographs.shape, generator=generator, dtype=torch.float64)
    stretched = metrics.fix_by_prior(photographs + 0.05 * noise)
    assert metrics.best_match(stretched, photographs).tolist() != list(range(6))
    assert metrics.best_match(stretched, photographs, by="correlation").tolist() == list(range(6))


def test_assignment_refuses_what_it_cannot_match(photographs):
    with pytest.raises(WRONG_SHAPE):
        metrics.best_match(photographs[:3], photographs)
    with pytest.raises((AttackError, TypeCheckError)):
        metrics.best_match(photographs, photographs, by="ssim")
    broken = photographs.clone()
    broken[5, 0, 0, 0] = math.nan
    with pytest.raises(AttackError, match=r"index 5\."):
        metrics.best_match(broken, photographs)


def test_rank_agrees_with_sorting_numpy_correlations(photographs, generator):
    noise = torch.randn(photographs.shape, generator=generator, dtype=torch.float64)
    ranks = []
    for index in range(6):
        found = photographs[index] + 2 * noise[index]
        row = [np.corrcoef(found.flatten().numpy(), other.flatten().numpy())[0, 1] for other in photographs]
        oracle = int(np.argsort(np.argsort(-np.array(row)))[index]) + 1
        assert metrics.identification_rank(found, candidates=photographs, index=index) == oracle
        ranks.append(oracle)
    assert max(ranks) > 1  # the noise is strong enough for the test to see more than rank 1


@settings(max_examples=40)
@given(index=st.integers(0, 5), scale=st.floats(1e-6, 1e6), offset=st.floats(-1e3, 1e3))
def test_identification_ignores_scale_and_offset(index, scale, offset, photographs):
    found = scale * (photographs[index] + offset)
    assert metrics.identification_rank(found, candidates=photographs, index=index) == 1
    wrong = (index + 1) % 6
    assert metrics.identification_rank(found, candidates=photographs, index=wrong) > 1


def test_the_negative_is_the_farthest(photographs):
    rows = photographs.flatten(1).numpy()
    assert np.argmin(np.corrcoef(rows)[0]) != 0
    assert metrics.identification_rank(1 - photographs[0], candidates=photographs, index=0) == 6


def test_ties_count_against_the_attacker(photographs):
    alike = torch.cat([photographs, 0.8 * photographs[:1], 0.5 * photographs[:1] + 0.1])
    for index in (0, 6, 7):
        assert metrics.identification_rank(photographs[0], candidates=alike, index=index) == 3
    assert metrics.identification_rank(photographs[1], candidates=alike, index=1) == 1


def test_a_copy_of_the_true_image_is_no_other_candidate(photographs):
    """No reconstruction tells an image from itself: an exact one was not identified."""
    rounded = photographs[:1].half().double() - photographs[:1]
    copies = torch.cat([photographs, photographs[:1], photographs[:1].float().double()])
    for index in (0, 6, 7):
        assert metrics.identification_rank(photographs[0], candidates=copies, index=index) == 1
        assert metrics.identification_rank(photographs[1], candidates=copies, index=index) > 1
        assert metrics.identification_rank(1 - photographs[0], candidates=copies, index=index) == 6
    assert float(rounded.abs().max()) > 1e-4  # another image, however near
    near = torch.cat([photographs, photographs[:1] + rounded])
    assert metrics.identification_rank(photographs[0] + rounded[0], candidates=near, index=0) == 2


@pytest.mark.parametrize("level", [0.0, 0.1, 0.7])
def test_a_constant_reconstruction_gets_the_worst_rank(level, photographs):
    flat = torch.full_like(photographs[0], level)
    for index in range(6):
        assert metrics.identification_rank(flat, candidates=photographs, index=index) == 6


def test_noise_identifies_at_chance_level(generator):
    candidates = torch.rand(10, 1, 8, 8, generator=generator, dtype=torch.float64)
    noise = torch.rand(2000, 1, 8, 8, generator=generator, dtype=torch.float64)
    ranks = [metrics.identification_rank(x, candidates=candidates, index=i % 10) for i, x in enumerate(noise)]
    low, high = metrics.wilson_interval(ranks.count(1), 2000, confidence=0.9999)
    assert low < 0.1 < high
    assert np.mean(ranks) == pytest.approx(5.5, abs=0.3)


@pytest.mark.parametrize("index", [-1, 6])
def test_rank_refuses_an_index_outside(index, photographs):
    with pytest.raises(AttackError, match=r"expected 0 \.\. 5"):
        metrics.identification_rank(photographs[0], candidates=photographs, index=index)


def test_rank_refuses_candidates_that_do_not_fit(photographs):
    with pytest.raises(AttackError, match="at least 2"):
        metrics.identification_rank(photographs[0], candidates=photographs[:1], index=0)
    with pytest.raises(WRONG_SHAPE):
        metrics.identification_rank(photographs[0, :, :8], candidates=photographs, index=0)
    with pytest.raises(AttackError, match=r"reconstruction: .* index 0"):
        metrics.identification_rank(photographs[0] * math.nan, candidates=photographs, index=0)
