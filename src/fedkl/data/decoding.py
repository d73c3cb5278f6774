"""One image file becomes a square of RGB bytes, in memory that is bounded whatever the file says."""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import os
import stat
import threading
import traceback
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from fedkl.data.messages import place, told
from fedkl.errors import DataError

MOST_PIXELS = 1024**3 // 12
"""Pixels of the largest image: 89,478,485 is what Pillow takes without a warning."""

MOST_BYTES = 4 * MOST_PIXELS
"""Bytes of the largest file: what the largest image takes uncompressed. Some decoders read a file whole."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow has others that run programs
_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_LARGE = 1 << 22


class PixelBudget:
    """For threads that decode at the same time: they have at most `MOST_PIXELS` pixels in work together.

    Whoever waits is next, so that small images do not keep a large one waiting for ever.
    """

    def __init__(self) -> None:
        self._free = MOST_PIXELS
        self._next = threading.Lock()
        self._given_back = threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Waits until so many pixels are free, and has them meanwhile."""
        with self._next, self._given_back:
            self._given_back.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            if pixels > _LARGE:
                _trim()
            with self._given_back:
                self._free += pixels
                self._given_back.notify()


def _trim() -> None:
    # The C library of Linux keeps what a thread has freed for that thread: four would keep four images.
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def decoded(
    path: str | os.PathLike[str], *, size: int, budget: PixelBudget
) -> UInt8[Tensor, "{size} {size} 3"]:
    """Reads a file and delivers the square in its middle; see `FolderImages`.

    Args:
        path: The file.
        size: Height and width, in pixels.
        budget: That of all who decode at the same time.

    Raises:
        DataError: It is no image file, is damaged, or is too large.
    """
    with contextlib.ExitStack() as charge:  # given back when the image is gone
        try:
            return _read(path, size=size, taken=lambda pixels: charge.enter_context(budget.taken(pixels)))
        except Exception as error:  # decoders raise whatever they please on damaged files
            _let_go(error)
            if isinstance(error, DataError):
                raise
            if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
                raise _too_large(path, got=f"more ({error})") from error
            raise DataError(
                f"{place(path)}: expected a readable image, got {told(error)}. Replace or remove this file."
            ) from error


def _let_go(error: BaseException) -> None:
    """Empties the frames of an error and of those before it: the image would live as long as they do."""
    earlier: BaseException | None = error
    while earlier is not None:
        traceback.clear_frames(earlier.__traceback__)
        earlier = earlier.__context__


def _read(
    path: str | os.PathLike[str], *, size: int, taken: Callable[[int], None]
) -> UInt8[Tensor, "{size} {size} 3"]:
    with _opened(path) as file, Image.open(file, formats=_FORMATS) as image:
        if image.mode not in _EIGHT_BITS:
            raise ValueError(f"pixels of mode {image.mode}, not 8 bits per channel")
        pixels, extent = _extent(image)
        if pixels > min(MOST_PIXELS, Image.MAX_IMAGE_PIXELS or MOST_PIXELS):
            raise _too_large(path, got=extent)
        taken(pixels)
        # JPEG only: decodes at a fraction of the size where that is still twice what is needed.
        image.draft(None, (2 * size, 2 * size))
        image.load()  # TIFF is turned by it, so its size is known only now
        return torch.from_numpy(np.array(_square(image, size=size)))


def _opened(path: str | os.PathLike[str]) -> io.BufferedReader:
    file: io.BufferedReader = io.BufferedReader(io.FileIO(os.fspath(path), opener=_open_at_once))
    about = os.fstat(file.fileno())
    if stat.S_ISREG(about.st_mode) and about.st_size <= MOST_BYTES:
        return file
    file.close()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("neither a file nor a link to one")
    raise DataError(
        f"{place(path)}: expected a file of at most {MOST_BYTES} bytes, got {about.st_size}. Shrink or "
        "remove this file."
    )


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for somebody to write


def _extent(image: Image.Image) -> tuple[int, str]:
    """The pixels that are decoded at once, as a number and in words."""
    tags = getattr(image, "tag_v2", {})
    width, length = int(tags.get(_TILE_WIDTH, 0)), int(tags.get(_TILE_LENGTH, 0))
    if width * length > image.width * image.height:  # in TIFF a small image may lie in a large tile
        return width * length, f"a tile of {width}×{length}"
    return image.width * image.height, f"{image.width}×{image.height}"


def _too_large(path: str | os.PathLike[str], *, got: str) -> DataError:
    most = min(MOST_PIXELS, Image.MAX_IMAGE_PIXELS or MOST_PIXELS)
    return DataError(
        f"{place(path)}: expected an image of at most {most} pixels, got {got}. Shrink or remove this file."
    )


def _square(image: Image.Image, *, size: int) -> Image.Image:
    side = min(image.size)
    left, upper = (image.width - side) / 2, (image.height - side) / 2
    if image.mode == "RGB" or image.width * image.height <= _LARGE:
        box = (left, upper, left + side, upper + side)
        return _rgb(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
    # Converted and made narrow strip by strip: a second image of full size would take as much memory again.
    # Where Pillow begins with the height, it rounds otherwise: a value may be one off.
    reach = max(side / size, 1) + 1  # of the resize beyond the square
    first, last = max(0, math.floor(upper - reach)), min(image.height, math.ceil(upper + side + reach))
    start, end = max(0, math.floor(left - reach)), min(image.width, math.ceil(left + side + reach))
    narrow = Image.new("RGB", (size, last - first))
    rows = max(1, _LARGE // (end - start))
    for top in range(first, last, rows):
        bottom = min(top + rows, last)
        strip = _rgb(image.crop((start, top, end, bottom)))
        box = (left - start, 0, left - start + side, bottom - top)
        resized = strip.resize((size, bottom - top), Image.Resampling.BILINEAR, box=box)
        narrow.paste(resized, (0, top - first))
    box = (0, upper - first, size, upper - first + side)
    return narrow.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _rgb(image: Image.Image) -> Image.Image:
    # By way of RGBA, because Pillow warns where a palette has transparent entries.
    opaque = image.convert("RGBA") if image.mode in ("P", "PA") else image
    return opaque if opaque.mode == "RGB" else opaque.convert("RGB")
