"""The square in the middle of a decoded image, in gray or RGB, with as many levels as the file has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor

LARGE = 1 << 22
"""Pixels from which an image is converted in strips, and its memory given back at once."""

_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0

Mode = Literal["L", "RGB", "F"]


class RefusedError(ValueError):
    """A file cannot be used; the text is ours, says what to do, and quotes nothing but numbers."""


@dataclass(frozen=True)
class Raster:
    """A decoded image, and what its pixels mean.

    Attributes:
        image: As it was decoded.
        mode: What it becomes: "L" and "RGB" are bytes, "F" is gray in [0, 1].
        converted: Makes such an image of the whole or of a part; not asked where the mode is that already.
    """

    image: Image.Image
    mode: Mode
    converted: Callable[[Image.Image], Image.Image]


def raster_of(image: Image.Image, *, channels: int) -> Raster:
    """What the pixels of a file that Pillow has opened mean; nothing is decoded for that.

    8 bits stay bytes. Gray with more levels is divided by the largest number that its bits can hold, the same
    for every file, so that equal grays stay equal: 65535 for 16 bits. Floats are in [0, 1] already.

    Raises:
        RefusedError: Black and white of such pixels are not known.
    """
    if image.mode in _EIGHT_BITS:
        return Raster(image, "RGB", rgb) if channels == 3 else Raster(image, "L", _gray)
    white = _white(image)
    if white is None:
        raise RefusedError(
            f"pixels of mode {image.mode}, whose black and white are not known. Save it as gray or RGB of 8 "
            "bits, as unsigned gray of 16 bits, or as gray floats in [0, 1]"
        )
    inverted = _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO and image.mode.startswith("I;16")

    def converted(part: Image.Image) -> Image.Image:
        levels = np.asarray(part).astype(np.float32)
        if image.mode == "F" and not (np.isfinite(levels).all() and 0 <= levels.min() <= levels.max() <= 1):
            raise RefusedError("floats outside [0, 1]. Divide them by what is white, or save 16-bit gray")
        levels /= np.float32(white)
        return Image.fromarray(1 - levels if inverted else levels)

    return Raster(image, "F", converted)


def _white(image: Image.Image) -> float | None:
    """The number that means white; None where it is not known: of signed numbers, and of 32 bits."""
    if image.mode.startswith("I;16"):
        return float(2 ** (_tag(image, _BITS) or 16) - 1)
    if image.mode == "I":  # Pillow scales PGM to 65535, and read PNG in this mode until version 11
        return 65535.0 if image.format in ("PNG", "PPM") else None
    return 1.0 if image.mode == "F" else None


def _tag(image: Image.Image, number: int) -> int | None:
    value = getattr(image, "tag_v2", {}).get(number)
    return int(value[0] if isinstance(value, tuple) else value) if value is not None else None


def rgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits in RGB, without its transparency."""
    # By way of RGBA, because Pillow warns where a palette has transparent entries.
    opaque = image.convert("RGBA") if image.mode in ("P", "PA") else image
    return opaque if opaque.mode == "RGB" else opaque.convert("RGB")


def _gray(image: Image.Image) -> Image.Image:
    """An image of 8 bits in gray: .299 R + .587 G + .114 B."""
    return image if image.mode == "L" else rgb(image).convert("L")


def square(raster: Raster, *, size: int, channels: int) -> Float32[Tensor, "{channels} {size} {size}"]:
    """The largest square in the middle, resized (bilinear, antialiased), in [0, 1]; gray is repeated."""
    pixels = torch.from_numpy(np.array(_resized(raster, size=size), dtype=np.float32))
    if raster.mode == "F":
        pixels.clamp_(0, 1)  # a mean may round one ulp past 1
    else:
        pixels /= 255
    return (pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]).expand(channels, -1, -1)


def _resized(raster: Raster, *, size: int) -> Image.Image:
    image = raster.image
    side = min(image.size)
    left, upper = (image.width - side) / 2, (image.height - side) / 2
    if image.mode == raster.mode != "F" or image.width * image.height <= LARGE:
        whole = image if image.mode == raster.mode != "F" else raster.converted(image)
        box = (left, upper, left + side, upper + side)
        return whole.resize((size, size), Image.Resampling.BILINEAR, box=box)
    # Converted and made narrow strip by strip: a second image of full size would take as much memory again.
    # Where Pillow begins with the height, it rounds otherwise: a value may be one off.
    reach = max(side / size, 1) + 1  # of the resize beyond the square
    first, last = max(0, math.floor(upper - reach)), min(image.height, math.ceil(upper + side + reach))
    start, end = max(0, math.floor(left - reach)), min(image.width, math.ceil(left + side + reach))
    narrow = Image.new(raster.mode, (size, last - first))
    rows = max(1, LARGE // (end - start))
    for top in range(first, last, rows):
        bottom = min(top + rows, last)
        strip = raster.converted(image.crop((start, top, end, bottom)))
        box = (left - start, 0, left - start + side, bottom - top)
        resized = strip.resize((size, bottom - top), Image.Resampling.BILINEAR, box=box)
        narrow.paste(resized, (0, top - first))
    box = (0, upper - first, size, upper - first + side)
    return narrow.resize((size, size), Image.Resampling.BILINEAR, box=box)
