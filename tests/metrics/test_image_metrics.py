from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import skimage.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from fedkl import metrics
from fedkl.errors import AttackError

# Under jaxtyping's import hook the annotation catches a wrong shape before the function does.
WRONG_SHAPE = (AttackError, TypeCheckError)
PAIR_METRICS = [metrics.mse, metrics.psnr, metrics.ssim, metrics.correlation]


def noisy(images, generator, *, sigma=0.1):
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return (images + sigma * noise).clamp(0, 1)


def colored(photographs):
    return torch.cat([photographs, photographs.roll(1, 0), photographs.roll(2, 0)], dim=1)


def test_mse_and_psnr_agree_with_scikit_image(photographs, generator):
    truth = colored(photographs)
    found = noisy(truth, generator)
    mse, psnr = metrics.mse(found, truth), metrics.psnr(found, truth)
    for row in range(len(truth)):
        pair = truth[row].numpy(), found[row].numpy()
        assert mse[row].item() == pytest.approx(skimage.metrics.mean_squared_error(*pair), rel=1e-12)
        oracle = skimage.metrics.peak_signal_noise_ratio(*pair, data_range=1)
        assert psnr[row].item() == pytest.approx(oracle, rel=1e-12)


def test_ssim_agrees_with_scikit_image(photographs, generator):
    truth = colored(photographs)
    found = noisy(truth, generator)
    ours = metrics.ssim(found, truth)
    margin = ((0, 0), (5, 5), (5, 5))  # scikit-image leaves out the border of what it is given
    for row in range(len(truth)):
        oracle = skimage.metrics.structural_similarity(
            np.pad(truth[row].numpy(), margin, mode="reflect"),
            np.pad(found[row].numpy(), margin, mode="reflect"),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        assert ours[row].item() == pytest.approx(oracle, abs=1e-9)


def test_correlation_agrees_with_scipy(photographs, generator):
    truth = colored(photographs)
    found = noisy(truth, generator, sigma=0.3)
    ours = metrics.correlation(found, truth)
    for row in range(len(truth)):
        oracle = scipy.stats.pearsonr(found[row].flatten().numpy(), truth[row].flatten().numpy()).statistic
        assert ours[row].item() == pytest.approx(oracle, abs=1e-12)


@pytest.mark.parametrize("metric", PAIR_METRICS)
def test_metrics_are_per_image(metric, photographs, generator):
    found = noisy(photographs, generator)
    found[2] = photographs[3]
    together = metric(found, photographs)
    alone = torch.cat([metric(found[row : row + 1], photographs[row : row + 1]) for row in range(6)])
    assert together.shape == (6,)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, alone)
    assert len(set(together.tolist())) == 6


def test_identical_images_score_perfectly(photographs):
    assert metrics.mse(photographs, photographs).tolist() == [0] * 6
    assert metrics.psnr(photographs, photographs).tolist() == [math.inf] * 6
    torch.testing.assert_close(metrics.ssim(photographs, photographs), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(
        metrics.correlation(photographs, photographs), torch.ones(6, dtype=torch.float64)
    )


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 1.0])
def test_a_constant_image_has_no_correlation(level, photographs):
    flat = torch.full_like(photographs, level)
    assert metrics.correlation(flat, photographs).tolist() == [0] * 6
    assert metrics.correlation(photographs, flat).tolist() == [0] * 6


def test_single_precision_is_computed_in_double(photographs):
    single = photographs.float()
    shifted = (single * 0.999).float()
    expected = metrics.ssim(shifted.double(), single.double())
    assert torch.equal(metrics.ssim(shifted, single), expected)


@pytest.mark.parametrize("metric", [*PAIR_METRICS, metrics.fix_affine])
def test_wrong_shapes_are_refused(metric, photographs):
    with pytest.raises(WRONG_SHAPE):
        metric(photographs[:2], photographs)
    with pytest.raises(WRONG_SHAPE):
        metric(photographs[0], photographs[0])


@pytest.mark.parametrize("metric", [*PAIR_METRICS, metrics.fix_affine])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_error_names_the_non_finite_images(metric, value, photographs):
    broken = photographs.clone()
    broken[1, 0, 3, 4] = broken[4, 0, 0, 0] = value
    with pytest.raises(AttackError, match=r"reconstruction: .* index 1, 4\."):
        metric(broken, photographs)


@pytest.mark.parametrize("rule", [metrics.clip, metrics.fix_by_prior])
def test_rules_refuse_non_finite_images(rule, photographs):
    broken = photographs.clone()
    broken[2] = math.nan
    with pytest.raises(AttackError, match=r"index 2\."):
        rule(broken)


def test_ssim_needs_six_pixels(photographs):
    assert metrics.ssim(photographs[..., :6, :6], photographs[..., :6, :6]).shape == (6,)
    with pytest.raises(AttackError, match="at least 6 × 6 pixels, got 5 × 6"):
        metrics.ssim(photographs[..., :5, :6], photographs[..., :5, :6])


def test_clip_only_clips():
    x = torch.tensor([-1.0, 0.0, 0.3, 1.0, 7.0], dtype=torch.float64).view(1, 1, 1, 5)
    assert metrics.clip(x).flatten().tolist() == [0, 0, 0.3, 1, 1]


def test_fix_by_prior_maps_each_image_onto_the_unit_interval(photographs):
    unbounded = photographs * torch.arange(1, 7).view(6, 1, 1, 1) - 3
    fixed = metrics.fix_by_prior(unbounded)
    assert fixed.flatten(1).amin(1).tolist() == [0] * 6
    assert fixed.flatten(1).amax(1).tolist() == [1] * 6
    for row in range(6):
        low, high = np.quantile(unbounded[row], [0.005, 0.995], method="nearest")
        expected = np.clip((unbounded[row].numpy() - low) / (high - low), 0, 1)
        np.testing.assert_allclose(fixed[row].numpy(), expected, atol=1e-12)
    torch.testing.assert_close(fixed, metrics.fix_by_prior(photographs))
    torch.testing.assert_close(fixed, metrics.fix_by_prior(fixed))


def test_fix_by_prior_does_not_follow_a_few_wild_pixels(photographs):
    wild = photographs.clone()
    wild[:, :, 0, :4] = 50.0
    calm, upset = metrics.fix_by_prior(photographs), metrics.fix_by_prior(wild)
    inside = torch.ones(32, 32, dtype=torch.bool)
    inside[0, :4] = False
    assert (calm - upset)[..., inside].abs().mean() < 0.05  # by the extremes: about 0.5


def test_fix_by_prior_keeps_colors_together(photographs):
    image = torch.cat([photographs[:1] * 0.5, photographs[1:2]], dim=1)
    fixed = metrics.fix_by_prior(image)
    low, high = (float(np.quantile(image.numpy(), q, method="nearest")) for q in (0.005, 0.995))
    torch.testing.assert_close(fixed, ((image - low) / (high - low)).clamp(0, 1))


@pytest.mark.parametrize(("level", "expected"), [(-2.0, 0.0), (0.25, 0.25), (3.0, 1.0)])
def test_fix_by_prior_clips_constant_images(level, expected):
    assert metrics.fix_by_prior(torch.full((1, 1, 6, 6), level)).unique().tolist() == [expected]


def test_fix_affine_agrees_with_least_squares(photographs, generator):
    found = -4 * noisy(photographs, generator, sigma=0.3) + 9
    fixed = metrics.fix_affine(found, photographs)
    for row in range(6):
        x, y = found[row].flatten().numpy(), photographs[row].flatten().numpy()
        slope, offset = np.polyfit(x, y, 1)
        expected = np.clip(slope * x + offset, 0, 1)
        np.testing.assert_allclose(fixed[row].flatten().numpy(), expected, atol=1e-10)


def test_fix_affine_of_a_constant_image_is_the_mean_of_the_truth(photographs):
    fixed = metrics.fix_affine(torch.full_like(photographs, 5.0), photographs)
    torch.testing.assert_close(fixed, photographs.mean((1, 2, 3), keepdim=True).expand_as(photographs))


def test_rules_survive_diverged_magnitudes(photographs):
    huge = photographs * 1e300
    for fixed in (metrics.fix_by_prior(huge), metrics.fix_affine(huge, photographs)):
        assert fixed.isfinite().all()
    torch.testing.assert_close(metrics.fix_affine(huge, photographs), photographs)
    torch.testing.assert_close(metrics.correlation(huge, photographs), torch.ones(6, dtype=torch.float64))


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31 - 1),
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-100, 100),
    sigma=st.floats(0, 2),
)
def test_the_affine_diagnostic_bounds_the_prior_rule(seed, scale, offset, sigma):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    found = scale * (truth + sigma * noise) + offset
    by_prior, affine = metrics.fix_by_prior(found), metrics.fix_affine(found, truth)
    for fixed in (by_prior, affine):
        assert fixed.min() >= 0
        assert fixed.max() <= 1
    assert (metrics.mse(affine, truth) <= metrics.mse(by_prior, truth) + 1e-9).all()
    torch.testing.assert_close(
        metrics.correlation(found, truth), metrics.correlation(truth + sigma * noise, truth)
    )


@pytest.mark.parametrize(("printed", "true"), [(32.71, 17.3), (26.64, 5.2), (52.78, 57.4), (30.22, 12.3)])
def test_paper_figures_convert_as_the_reference_lists_them(printed, true):
    assert metrics.paper_psnr_to_true(printed) == pytest.approx(true, abs=0.06)
    assert metrics.true_psnr_to_paper(metrics.paper_psnr_to_true(printed)) == pytest.approx(printed)


def test_paper_formula_from_the_images(photographs, generator):
    found = noisy(photographs, generator)
    rmse = np.sqrt(((255 * found - 255 * photographs) ** 2).mean((1, 2, 3)).numpy())
    printed = 10 * np.log10(255**2 / rmse)
    true = metrics.psnr(found, photographs).numpy()
    np.testing.assert_allclose([metrics.paper_psnr_to_true(p) for p in printed], true, rtol=1e-12)
