from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from jaxtyping import TypeCheckError

from fedkl import metrics
from fedkl.errors import AttackError

WRONG_SHAPE = (AttackError, TypeCheckError)
MEASURED = ["mse", "psnr", "ssim", "correlation", "psnr_raw", "psnr_affine", "ssim_affine"]


@pytest.fixture
def noisy(photographs, generator):
    noise = torch.randn(photographs.shape, generator=generator, dtype=photographs.dtype)
    return photographs + 0.05 * noise


def scored(reconstruction, truth, **options):
    options = {"candidates": truth, "candidate_index": range(len(truth)), "scaling": "clip"} | options
    return metrics.score(reconstruction, truth, **options)


def test_scores_follow_the_order_of_the_truth(photographs, noisy):
    straight = scored(noisy, photographs)
    shuffled = scored(noisy[[3, 1, 5, 0, 2, 4]], photographs)
    assert straight == shuffled
    assert len({score.mse for score in straight}) == 6
    assert all(score.identified and score.rank == 1 and score.candidates == 6 for score in straight)


def test_fields_are_the_metrics_they_are_named_after(photographs, noisy):
    stretched = 0.6 * noisy + 0.1
    for scaling, rule in (("clip", metrics.clip), ("prior", metrics.fix_by_prior)):
        scores = scored(stretched, photographs, scaling=scaling)
        fixed, affine = rule(stretched), metrics.fix_affine(stretched, photographs)
        expected = {
            "mse": metrics.mse(fixed, photographs),
            "psnr": metrics.psnr(fixed, photographs),
            "ssim": metrics.ssim(fixed, photographs),
            "correlation": metrics.correlation(fixed, photographs),
            "psnr_raw": metrics.psnr(metrics.clip(stretched), photographs),
            "psnr_affine": metrics.psnr(affine, photographs),
            "ssim_affine": metrics.ssim(affine, photographs),
        }
        for name, values in expected.items():
            assert [getattr(score, name) for score in scores] == pytest.approx(values.tolist()), name


def test_the_prior_rule_does_not_credit_a_norm_to_the_defense(photographs):
    # What a train-mode norm leaves open: the image at half its scale.
    full = metrics.fix_by_prior(photographs)
    halved = 0.5 * full
    by_prior = scored(halved, full, scaling="prior")
    clipped = scored(halved, full, scaling="clip")
    assert all(score.psnr == 100 and score.psnr_raw < 20 for score in by_prior)
    assert all(score.psnr == score.psnr_raw < 20 and score.psnr_affine == 100 for score in clipped)


def test_the_affine_diagnostic_sees_the_image_before_clipping(photographs):
    scores = scored(-3 * photographs + 5, photographs, scaling="clip")
    assert all(score.psnr < 20 and score.psnr_affine == 100 for score in scores)
    assert all(score.ssim_affine == pytest.approx(1) for score in scores)


def test_the_second_nearest_is_not_identified(photographs):
    contrasts = photographs.std((1, 2, 3), keepdim=True)
    evened = (photographs - photographs.mean((1, 2, 3), keepdim=True)) / contrasts
    found = (0.6 * evened[1] + 0.4 * evened[0]) / 10 + 0.5
    score = scored(found[None], photographs[:1], candidates=photographs, candidate_index=[0])[0]
    assert (score.rank, score.identified) == (2, False)


def test_labels_travel_with_the_image_that_they_were_found_with(photographs, noisy):
    labels = torch.tensor([4, 7, 1, 0, 9, 3])
    order = [3, 1, 5, 0, 2, 4]
    found = labels[order].clone()
    found[0] = 8  # what was found with the image that is true image 3
    scores = scored(noisy[order], photographs, labels_true=labels, labels_found=found)
    assert [score.label_correct for score in scores] == [True, True, True, False, True, True]
    assert {score.label_correct for score in scored(noisy, photographs, labels_true=labels)} == {None}


@pytest.mark.parametrize("scaling", ["clip", "prior"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_reconstruction_is_a_failure_of_one_image(scaling, value, photographs, noisy):
    found = noisy[[3, 1, 5, 0, 2, 4]]
    found[2, 0, 9, 9] = value  # meant for true image 5
    whole, scores = scored(noisy, photographs, scaling=scaling), scored(found, photographs, scaling=scaling)
    assert [score.failed for score in scores] == [False] * 5 + [True]
    assert scores[:5] == whole[:5]
    assert all(getattr(scores[5], name) is None for name in MEASURED)
    assert (scores[5].identified, scores[5].rank) == (False, 6)


def test_a_whole_batch_can_fail(photographs):
    scores = scored(torch.full_like(photographs, math.nan), photographs)
    assert [score.failed for score in scores] == [True] * 6
    summary = metrics.summarize([score.psnr for score in scores])
    assert (summary.n, summary.failures, summary.mean) == (6, 6, None)


def test_scores_are_valid_json(photographs, noisy):
    found = noisy.clone()
    found[0], found[1] = math.nan, photographs[1]
    for score in scored(found, photographs):
        row = json.loads(json.dumps(score.to_dict(), allow_nan=False))
        assert metrics.Score(**row) == score
    assert scored(found, photographs)[1].psnr == 100


def test_scores_are_frozen_and_keyword_only(photographs):
    score = scored(photographs, photographs)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        score.psnr = 0.0
    with pytest.raises(TypeError):
        metrics.Score(*dataclasses.astuple(score))


def test_a_constant_reconstruction_identifies_nobody(photographs):
    for scaling in ("clip", "prior"):
        scores = scored(torch.full_like(photographs, 0.4), photographs, scaling=scaling)
        assert all(not score.identified and score.rank == 6 and not score.failed for score in scores)
        assert all(score.correlation == 0 for score in scores)


def test_candidates_may_hold_strangers_and_a_tensor_of_indexes(photographs, noisy):
    scores = scored(
        noisy[:2], photographs[:2], candidates=photographs.float(), candidate_index=torch.tensor([0, 1])
    )
    assert [(score.rank, score.candidates) for score in scores] == [(1, 6), (1, 6)]


def test_scoring_leaves_its_arguments_alone(photographs, noisy):
    found = noisy.clone().requires_grad_()
    before = found.detach().clone()
    scored(found, photographs)
    assert torch.equal(found.detach(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_index": [0, 1, 2, 3, 5, 4]}, r"candidate_index\[4\]: candidate 5 is not"),
        ({"candidate_index": [0, 1, 2]}, "expected one for each of 6"),
        ({"candidate_index": [0, 1, 2, 3, 4, 6]}, r"expected 0 \.\. 5, got 6"),
        ({"scaling": "affine"}, "scaling: expected 'clip' or 'prior'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message, photographs):
    with pytest.raises(
        (AttackError, TypeCheckError), match=message if change.get("scaling") is None else None
    ):
        scored(photographs, photographs, **change)


def test_images_that_are_not_in_range_are_refused(photographs):
    normalized = (photographs - 0.5) / 0.25
    with pytest.raises(AttackError, match=r"truth: expected images in \[0, 1\]"):
        scored(photographs, normalized)
    with pytest.raises(AttackError, match=r"candidates: expected images in \[0, 1\]"):
        scored(photographs, photographs, candidates=normalized)
    with pytest.raises(AttackError, match="truth: expected finite"):
        scored(photographs, photographs * math.nan)


def test_shapes_that_do_not_fit_are_refused(photographs):
    labels = torch.arange(6)
    with pytest.raises(WRONG_SHAPE):
        scored(photographs[:5], photographs)
    with pytest.raises(WRONG_SHAPE):
        scored(photographs, photographs, candidates=photographs[..., :8])
    with pytest.raises(WRONG_SHAPE):
        scored(photographs, photographs, labels_true=labels, labels_found=labels[:5])


def test_what_is_shown_is_what_is_scored(photographs, noisy):
    noisy[2] = torch.nan
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    found = metrics.match(0.5 * noisy[order], photographs, scaling="prior")
    assert order[found.order].tolist() == list(range(6))
    assert found.failed.tolist() == [False, False, True, False, False, False]
    scores = scored(0.5 * noisy[order], photographs, scaling="prior")
    for score, mse in zip(scores, metrics.mse(found.scaled, photographs).tolist(), strict=True):
        assert score.failed or score.mse == mse


@pytest.mark.parametrize("scaling", ["clip", "prior"])
def test_pictures_are_what_is_scored_in_their_own_order(photographs, noisy, scaling):
    shown = metrics.as_pictures(noisy, scaling=scaling)
    matched = metrics.match(noisy, photographs, scaling=scaling)
    assert torch.equal(shown[matched.order], matched.scaled)
    assert 0 <= float(shown.min()) <= float(shown.max()) <= 1


def test_of_a_failure_there_is_no_picture(noisy):
    broken = noisy.clone()
    broken[1, 0, 0, 0] = math.inf
    shown = metrics.as_pictures(broken, scaling="clip")
    assert shown.isnan().flatten(1).all(1).tolist() == [number == 1 for number in range(len(broken))]
    with pytest.raises(WRONG_SHAPE, match="scaling"):
        metrics.as_pictures(noisy, scaling="none")
