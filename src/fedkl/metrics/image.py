"""Per-image metrics, and the rules that bring an unbounded reconstruction into [0, 1].

Everything is computed on the CPU in float64: single precision moves the SSIM of flat regions and the PSNR
of near-perfect reconstructions, and not every accelerator has double precision.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fedkl.errors import AttackError
from fedkl.types import ImageBatch

PerImage = Float[Tensor, " batch"]
"""One float64 value per image."""

_PAPER_OFFSET_DB = 20 * math.log10(255)
_SSIM_WINDOW = 11  # Wang et al. 2004: Gaussian window of 11 × 11 pixels, sigma 1.5
_TAIL = 0.005  # fraction of the pixels at either end that the prior ignores


def mse(reconstruction: ImageBatch, truth: ImageBatch) -> PerImage:
    """Mean squared error of every image over all of its pixels.

    Args:
        reconstruction: Images of shape (batch, channels, height, width); any range.
        truth: ImageBatch of the same shape in [0, 1].

    Returns:
        Shape (batch,), in squared intensity: 1 is black against white.

    Raises:
        AttackError: The shapes differ or an image is not finite.

    >>> mse(torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2)).item()
    0.25
    """
    found, true = paired(reconstruction, truth)
    return (found - true).square().flatten(1).mean(1)


def psnr(reconstruction: ImageBatch, truth: ImageBatch) -> PerImage:
    """Peak signal-to-noise ratio of every image, −10·log10(MSE), for a data range of 1.

    Args:
        reconstruction: Images of shape (batch, channels, height, width); any range.
        truth: ImageBatch of the same shape in [0, 1].

    Returns:
        Shape (batch,), in dB; +inf where the images are identical.

    Raises:
        AttackError: The shapes differ or an image is not finite.

    >>> psnr(torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 1, 2, 2)).round(decimals=4).item()
    20.0
    """
    return -10 * torch.log10(mse(reconstruction, truth))


def ssim(reconstruction: ImageBatch, truth: ImageBatch) -> PerImage:
    """Structural similarity of every image: Gaussian window (11 × 11, sigma 1.5), data range 1.

    Every pixel counts, the border by reflection: on a 28 × 28 image the windows that fit entirely would
    judge the middle 18 × 18 only. scikit-image and older releases of torchmetrics leave the border out, so
    the mean is taken here, over the full similarity map, and does not depend on the release.

    Args:
        reconstruction: Images of shape (batch, channels, height, width), at least 6 × 6 pixels.
        truth: ImageBatch of the same shape in [0, 1].

    Returns:
        Shape (batch,), in [−1, 1]; 1 where the images are identical.

    Raises:
        AttackError: The shapes differ, an image is not finite or smaller than 6 × 6 pixels.

    Source:
        Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004,
        section III, equation 13, with the population covariance.

    >>> ramp = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    >>> ssim(ramp, ramp).round(decimals=4).item()
    1.0
    """
    found, true = paired(reconstruction, truth)
    smallest = _SSIM_WINDOW // 2 + 1
    if min(found.shape[2:]) < smallest:
        size = " × ".join(str(side) for side in found.shape[2:])
        raise AttackError(
            f"ssim: expected images of at least {smallest} × {smallest} pixels, got {size}. "
            "Use psnr for images this small."
        )
    # Imported where it is needed: it brings all of torchmetrics, seconds of every command's start.
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, similarity = structural_similarity_index_measure(
        found, true, data_range=1.0, sigma=1.5, reduction="none", return_full_image=True
    )
    return similarity.flatten(1).mean(1)


def correlation(reconstruction: ImageBatch, truth: ImageBatch) -> PerImage:
    """Pearson correlation of every image with the truth, over all pixels of all channels.

    Args:
        reconstruction: Images of shape (batch, channels, height, width); any range.
        truth: ImageBatch of the same shape.

    Returns:
        Shape (batch,), in [−1, 1]; 0 where either image is constant, for a constant image tells nothing.

    Raises:
        AttackError: The shapes differ or an image is not finite.

    >>> ramp = torch.linspace(0, 1, 4).view(1, 1, 2, 2)
    >>> correlation(3 - 2 * ramp, ramp).round(decimals=4).item()
    -1.0
    """
    found, true = paired(reconstruction, truth)
    return (standardized(found) * standardized(true)).sum(1).clamp(-1, 1)


def clip(x: ImageBatch) -> ImageBatch:
    """Clips images to [0, 1]: the attacker's rule where the gradient pins the scale of the image.

    Args:
        x: Images of shape (batch, channels, height, width); any range.

    Returns:
        The same shape, float64, in [0, 1].

    Raises:
        AttackError: An image is not finite.
    """
    return checked(x, name="x").clamp(0, 1)


def fix_by_prior(x: ImageBatch) -> ImageBatch:
    """Fixes scale and offset by the attacker's own prior: pixels fill [0, 1].

    The 0.5 % quantile of each image becomes 0 and the 99.5 % quantile 1; what lies outside is clipped.
    Quantiles rather than extremes: a few pixels that the gradient hardly determines (the border rows of a
    strided convolution) would otherwise set the scale of all others.

    A train-mode norm behind the first convolution makes the gradient invariant to scale and offset of the
    image, so only the prior "images are in [0, 1]" can fix them; no ground truth is used. There is one scale
    and one offset per image, and no sign change (a norm keeps the sign). A norm leaves an offset per channel
    free as well, up to padding; that is not undone here.

    Args:
        x: Images of shape (batch, channels, height, width); any range.

    Returns:
        The same shape, float64, in [0, 1]; where the quantiles coincide, the image is clipped instead.

    Raises:
        AttackError: An image is not finite.

    >>> fix_by_prior(torch.tensor([[[[-4.0, 0.0, 4.0]]]])).flatten().tolist()
    [0.0, 0.5, 1.0]
    """
    found = checked(x, name="x")
    flat = _magnitude_free(found)
    # "nearest" picks pixels of the image, so that applying the rule twice changes nothing.
    low, high = (
        torch.quantile(flat, q, dim=1, keepdim=True, interpolation="nearest") for q in (_TAIL, 1 - _TAIL)
    )
    spread = torch.where(high > low, high - low, 1.0)
    stretched = ((flat - low) / spread).clamp(0, 1).view_as(found)
    return torch.where((high > low)[:, :, None, None], stretched, found.clamp(0, 1))


def fix_affine(x: ImageBatch, truth: ImageBatch) -> ImageBatch:
    """Fits a·x + b to the truth by least squares per image, then clips to [0, 1]. A diagnostic only.

    It uses the ground truth, which no attacker has: report it beside, never instead of, what the attacker's
    own rule gives. Before clipping, no other scale and offset of `x` has a smaller squared error.

    Args:
        x: Images of shape (batch, channels, height, width); any range.
        truth: ImageBatch of the same shape in [0, 1].

    Returns:
        The same shape, float64, in [0, 1]; where `x` is constant, the truth's mean.

    Raises:
        AttackError: The shapes differ or an image is not finite.

    >>> truth = torch.tensor([[[[0.0, 0.25, 1.0]]]])
    >>> fix_affine(7 - 4 * truth, truth).flatten().round(decimals=6).tolist()
    [0.0, 0.25, 1.0]
    """
    found, true = paired(x, truth)
    direction, flat = standardized(found), true.flatten(1)
    slope = (direction * flat).sum(1, keepdim=True)
    fitted = flat.mean(1, keepdim=True) + slope * direction
    return fitted.view_as(true).clamp(0, 1)


def paper_psnr_to_true(printed: float) -> float:
    """Converts a "PSNR" printed in the FedKL paper into a PSNR.

    The paper prints 10·log10(255² / RMSE) with the RMSE on 0..255, so the true value is 2·printed −
    20·log10(255), and 20·log10(255) = 48.1308 dB. Being linear, this converts a mean over images as well.

    Args:
        printed: The printed figure, in "dB".

    Returns:
        The PSNR in dB.

    Source:
        arXiv 2305.04095, table 6, and the metric code of its public implementation.

    >>> round(paper_psnr_to_true(32.71), 1)  # DLG, LeNet, MNIST, without lock
    17.3
    """
    return 2 * printed - _PAPER_OFFSET_DB


def true_psnr_to_paper(true: float) -> float:
    """Converts a PSNR into the figure that the FedKL paper would print: the inverse of `paper_psnr_to_true`.

    Args:
        true: The PSNR in dB.

    Returns:
        The paper's figure, (PSNR + 20·log10(255)) / 2.

    >>> round(true_psnr_to_paper(paper_psnr_to_true(28.0)), 6)
    28.0
    """
    return (true + _PAPER_OFFSET_DB) / 2


def standardized(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch pixels"]:
    """Flattens images, takes each one's mean off and scales it to unit length; constant images become 0.

    Args:
        x: Finite float64 images of shape (batch, channels, height, width).

    Returns:
        Shape (batch, channels · height · width).
    """
    flat = _magnitude_free(x)
    # A constant image is exactly ±1 here, so no rounding of its mean is left over to look like a signal.
    centered = flat - flat.mean(1, keepdim=True)
    length = centered.norm(dim=1, keepdim=True)
    return centered / torch.where(length > 0, length, 1.0)


def _magnitude_free(x: Tensor) -> Tensor:
    """Flattens and divides each image by its largest magnitude, so that no square or difference overflows."""
    flat = x.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)
    return flat / torch.where(largest > 0, largest, 1.0)


def paired(reconstruction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both stacks of images as `checked` gives them.

    Raises:
        AttackError: The shapes differ, or as `checked`.
    """
    if reconstruction.shape != truth.shape:
        raise AttackError(
            f"reconstruction: expected the shape of the truth, {tuple(truth.shape)}, got "
            f"{tuple(reconstruction.shape)}. Pass one reconstruction per true image."
        )
    return checked(reconstruction, name="reconstruction"), checked(truth, name="truth")


def checked(x: Tensor, *, name: str) -> Tensor:
    """The images on the CPU in float64, detached.

    Raises:
        AttackError: The shape is not (batch, channels, height, width), or an image is not finite.
    """
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise AttackError(
            f"{name}: expected shape (batch, channels, height, width), got {tuple(x.shape)}. "
            "Add the missing axis, for instance with x.unsqueeze(0)."
        )
    values = x.detach().to(device="cpu", dtype=torch.float64)
    broken = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise AttackError(
            f"{name}: expected finite pixels, got NaN or infinity in image index "
            f"{', '.join(map(str, broken))}. Use fedkl.metrics.score, which records a failure instead."
        )
    return values
