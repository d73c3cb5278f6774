"""Augmentation of whole batches on their own device, reproducible from a CPU generator.

kornia is not used here: it draws from the global generator, so its results depend on what other threads draw.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from fedkl.types import Inputs

Batch = Float32[Tensor, "batch channels height width"]

_CANDIDATES = 10


class Augmentation(Protocol):
    """Random changes of a batch of images."""

    def __call__(self, images: Batch, generator: torch.Generator, /) -> Batch:
        """Returns changed images of the same shape in [0, 1]; the input is never written to.

        Args:
            images: In [0, 1], shape `(batch, channels, height, width)`.
            generator: A CPU generator, the only source of randomness whatever the images' device.
        """
        ...


def unchanged(images: Inputs, generator: torch.Generator) -> Inputs:
    """No augmentation, also of tokens; draws nothing."""
    return images


def flip(images: Batch, generator: torch.Generator) -> Batch:
    """Mirrors each image left to right with probability 1/2.

    >>> images = torch.arange(4.0).view(1, 1, 1, 4).div(4).expand(8, 1, 1, 4)
    >>> sorted(set(flip(images, torch.Generator().manual_seed(0))[:, 0, 0, 0].tolist()))
    [0.0, 0.75]
    """
    mirrored = _coins(len(images), generator).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def crop_flip(images: Batch, generator: torch.Generator, *, padding: int = 4) -> Batch:
    """Pads with zeros on all sides, crops each image at random to its size, and mirrors half of them.

    Args:
        images: In [0, 1], shape `(batch, channels, height, width)`.
        generator: A CPU generator.
        padding: Pixels on each side, at least 0.

    Returns:
        The same shape; one crop per image, the same in all its channels.

    Source:
        He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2 (CIFAR-10).
    """
    batch, channels, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, batch), generator=generator).to(images.device)
    mirrored = _coins(batch, generator).to(images.device)
    padded = F.pad(images, (padding,) * 4)
    stride = width + 2 * padding
    columns = torch.arange(width, device=images.device).expand(batch, width)
    columns = torch.where(mirrored[:, None], columns.flip(-1), columns) + offsets[0, :, None]
    rows = torch.arange(height, device=images.device) + offsets[1, :, None]
    # One gather of flat pixel positions takes a third of the time of indexing rows and columns.
    pixels = (rows.mul_(stride)[:, :, None] + columns[:, None, :]).view(batch, 1, height * width)
    return padded.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view(images.shape)


def resized_crop_flip(
    images: Batch,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Batch:
    """Crops a random rectangle, enlarges it bilinearly to the size of the image, and mirrors half of them.

    Args:
        images: In [0, 1], shape `(batch, channels, height, width)`.
        generator: A CPU generator.
        scale: Share of the image's area that the rectangle has, drawn uniformly.
        ratio: Its width / height, drawn uniformly on a logarithmic scale.

    Returns:
        The same shape.

    Source:
        Szegedy et al. 2015, "Going Deeper with Convolutions", section 6, with torchvision's defaults and its
        ten attempts to fit a rectangle. Deviations: rectangles are not rounded to whole pixels, and one that
        never fits is cut at the image's border.
    """
    batch, _, height, width = images.shape
    boxes = _boxes(batch, generator, aspect=width / height, scale=scale, ratio=ratio)
    sign = _coins(batch, generator).float().mul(-2).add(1)
    share, center = boxes[:, :2], boxes[:, 2:]
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = share[:, 0] * sign, share[:, 1]
    theta[:, :, 2] = center
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    result = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return result.clamp_(0, 1)  # interpolation may round one ulp past 1


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": unchanged,
    "flip": flip,
    "crop-flip": crop_flip,
    "resized-crop-flip": resized_crop_flip,
}
"""Augmentations by name."""


def _coins(count: int, generator: torch.Generator) -> Bool[Tensor, " {count}"]:
    return torch.rand(count, generator=generator) < 0.5


def _boxes(
    count: int,
    generator: torch.Generator,
    *,
    aspect: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Float[Tensor, "{count} 4"]:
    """Rectangles: width and height as shares of the image's, then the center in -1 .. 1 (x, y)."""
    numbers = torch.rand(2, _CANDIDATES, count, generator=generator)
    area = scale[0] + numbers[0] * (scale[1] - scale[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    stretch = torch.exp(low + numbers[1] * (high - low)) / aspect
    sides = torch.stack((area.mul(stretch).sqrt(), area.div(stretch).sqrt()), dim=-1)
    fits = (sides <= 1).all(-1)
    first = fits.int().argmax(0)  # 0 where none fits: that one is cut
    chosen = sides[first, torch.arange(count)].clamp(max=1)
    places = torch.rand(count, 2, generator=generator)
    return torch.cat((chosen, (2 * places - 1) * (1 - chosen)), dim=1)
