"""One image file becomes a square in [0, 1], in memory that is bounded whatever the file says."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import stat
import threading
import traceback
from collections.abc import Callable, Iterator

from jaxtyping import Float32
from PIL import Image
from torch import Tensor

from fedkl.data import dicom
from fedkl.data.messages import place, told
from fedkl.data.squares import LARGE, RefusedError, raster_of, square
from fedkl.errors import DataError

MOST_PIXELS = 1024**3 // 12
"""Pixels of the largest image: 89,478,485 is what Pillow takes without a warning."""

MOST_BYTES = 4 * MOST_PIXELS
"""Bytes of the largest file: what the largest image takes uncompressed. Some decoders read a file whole."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow has others that run programs
_TILE_WIDTH, _TILE_LENGTH = 322, 323


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
            if pixels > LARGE:
                _trim()
            with self._given_back:
                self._free += pixels
                self._given_back.notify()


def _trim() -> None:
    # The C library of Linux keeps what a thread has freed for that thread: four would keep four images.
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def decoded(
    path: str | os.PathLike[str],
    *,
    size: int,
    budget: PixelBudget,
    channels: int = 3,
    values: dicom.Values = "window",
) -> Float32[Tensor, "{channels} {size} {size}"]:
    """Reads a file and delivers the square in its middle; see `FolderImages`.

    Args:
        path: The file.
        size: Height and width, in pixels.
        budget: That of all who decode at the same time.
        channels: 1 or 3.
        values: What of a DICOM file's values is black and white.

    Raises:
        DataError: It is no image file, is damaged, or is too large.
    """
    with contextlib.ExitStack() as charge:  # given back when the image is gone

        def taken(pixels: int, extent: str) -> None:
            if pixels > min(MOST_PIXELS, Image.MAX_IMAGE_PIXELS or MOST_PIXELS):
                raise _too_large(path, got=extent)
            charge.enter_context(budget.taken(pixels))

        try:
            with _opened(path) as file:
                if dicom.is_dicom(file, name=os.fspath(path)):
                    raster = dicom.raster_of(file, path=path, taken=taken, channels=channels, values=values)
                    return square(raster, size=size, channels=channels)
                return _read(file, size=size, channels=channels, taken=taken)
        except Exception as error:  # decoders raise whatever they please on damaged files
            _let_go(error)
            if isinstance(error, DataError):
                raise
            if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
                raise _too_large(path, got=f"more ({error})") from error
            remedy = "" if isinstance(error, RefusedError) else " Replace or remove this file."
            got = error if isinstance(error, RefusedError) else told(error)
            raise DataError(f"{place(path)}: expected a readable image, got {got}.{remedy}") from error


def _let_go(error: BaseException) -> None:
    """Empties the frames of an error and of those before it: the image would live as long as they do."""
    earlier: BaseException | None = error
    while earlier is not None:
        traceback.clear_frames(earlier.__traceback__)
        earlier = earlier.__context__


def _read(
    file: io.BufferedReader, *, size: int, channels: int, taken: Callable[[int, str], None]
) -> Float32[Tensor, "{channels} {size} {size}"]:
    with Image.open(file, formats=_FORMATS) as image:
        raster = raster_of(image, channels=channels)
        taken(*_extent(image))
        # JPEG only: decodes at a fraction of the size where that is still twice what is needed.
        image.draft(None, (2 * size, 2 * size))
        image.load()  # TIFF is turned by it, so its size is known only now
        return square(raster, size=size, channels=channels)


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
