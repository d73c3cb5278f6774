"""Gaussian priors: images and features change little from a place to its neighbor; images are like others."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_RIDGE = 1e-3
_UNSEEN, _CHROMA = 0.05, 10.0  # share of what no example shows, which is smooth, in its colors too


def smooth(shape: tuple[int, ...], *, precision: float, chroma: float = 0.0) -> Float[Tensor, "n n"]:
    """Independent differences between neighbors, with the given precision, and a weak pull to the mean.

    Args:
        shape: ``(channels, height, width)``.
        precision: 1 / variance of a difference between neighbors.
        chroma: How much more precisely channels are known to change together: the factor, less 1.

    Returns:
        Shape ``(channels × height × width, …)``, positive definite.
    """
    channels, height, width = shape
    rows, columns = _path(height), _path(width)
    space = torch.kron(rows, torch.eye(width).double()) + torch.kron(torch.eye(height).double(), columns)
    space += _RIDGE * torch.eye(height * width).double()
    mixing = torch.eye(channels).double()
    mixing += chroma * (mixing - 1 / channels)
    return precision * torch.kron(mixing, space)


def constant(channels: Bool[Tensor, " channels"], places: int, *, precision: float) -> Float[Tensor, "n n"]:
    """Channels that are known to be constant.

    Args:
        channels: Which ones.
        places: Values of a channel.
        precision: 1 / variance about the channel's mean.
    """
    space = torch.eye(places).double() - 1 / places
    return precision * torch.kron(torch.diag(channels.double()), space)


def components(
    images: Float[Tensor, "images channels height width"], *, count: int
) -> tuple[Float[Tensor, " values"], Float[Tensor, "values components"]]:
    """Mean and principal components of images, each of the length of its standard deviation, strongest first.

    A part of the covariance is that of smooth images: there may be fewer examples than numbers in an image.

    Args:
        images: Examples, float64.
        count: Components, at most; no more than numbers in an image.
    """
    values = images.flatten(1)
    mean = values.mean(0)
    seen = (values - mean).T @ (values - mean) / len(values)
    smooth_ones = smooth(tuple(images.shape[1:]), precision=1.0, chroma=_CHROMA)
    unseen = torch.cholesky_inverse(torch.linalg.cholesky(smooth_ones))
    unseen *= seen.trace() / unseen.trace()
    power, directions = torch.linalg.eigh((1 - _UNSEEN) * seen + _UNSEEN * unseen)
    strongest = torch.arange(len(power) - 1, -1, -1)[:count]
    return mean, (directions[:, strongest] * power[strongest].clamp_min(0).sqrt()).contiguous()


def _path(length: int) -> Float[Tensor, "length length"]:
    """DᵀD for the differences D along a line."""
    steps = torch.eye(length).double().diff(dim=0)
    return steps.T @ steps
