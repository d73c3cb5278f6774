"""Images that stay in their files and are decoded a batch at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from jaxtyping import Float32
from torch import Tensor

from fedkl.data.decoding import PixelBudget, decoded
from fedkl.data.images import Index, checked_index
from fedkl.errors import DataError


class FolderImages:
    """Image files, decoded on access by a few threads; memory is that of the batches in use.

    The largest square in the middle is cut out and resized to `size` (bilinear, antialiased as Pillow does),
    which is what resizing the shorter side and cropping the center gives, and becomes RGB; transparency and
    the orientation in EXIF data are ignored (but not TIFF's, which Pillow applies). Files are read only when
    they are asked for, so a damaged one shows then. They are BMP, GIF, JPEG, PNG, PPM, TIFF or WebP, whatever
    their names; of several frames the first counts.

    An image has at most 89,478,485 pixels, which Pillow takes without a warning (fewer where
    `PIL.Image.MAX_IMAGE_PIXELS` is lower), and its file at most four bytes for each of them. However many
    threads there are, the images that they have in work have no more pixels than that together: large ones
    wait. A pixel takes 4 bytes of memory, 6 in progressive JPEGs, at most 16 (WebP, TIFF in one strip), so
    decoding a batch takes 0.5 GB, at most 1.5 GB, and what Pillow reads whole: files (WebP) and texts (PNG).

    Args:
        files: Paths, in the order of the images.
        size: Height and width of the delivered images, in pixels.
        workers: Threads that decode a batch.
        device: Where the batches are delivered.

    Raises:
        DataError: There is no file, or `size` or `workers` is below 1.
    """

    streams = True
    """Batches are worth loading ahead; see `prefetched`."""

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        *,
        size: int,
        workers: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(files) == 0 or size < 1 or workers < 1:
            raise DataError(
                "FolderImages: expected at least one file, size ≥ 1 and workers ≥ 1, got "
                f"{len(files)} files, size={size}, workers={workers}."
            )
        self._files = files
        self._side = size
        self._workers = workers
        self._device = torch.device(device)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(images, 3, size, size)`."""
        return (len(self._files), 3, self._side, self._side)

    @property
    def device(self) -> torch.device:
        """Where the batches are delivered."""
        return self._device

    def to(self, device: torch.device | str) -> FolderImages:
        """The same images delivered on `device`."""
        return FolderImages(self._files, size=self._side, workers=self._workers, device=device)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Index, /) -> Float32[Tensor, "batch 3 {self._side} {self._side}"]:
        """See `fedkl.types.Images`.

        Raises:
            DataError: A file cannot be read or is no image; the message names it.
        """
        places = checked_index(index, device=torch.device("cpu"))
        numbers = range(len(self._files))[places] if isinstance(places, slice) else places.tolist()
        pixels = torch.empty(len(numbers), self._side, self._side, 3, dtype=torch.uint8)
        files = [self._files[number] for number in numbers]
        decode = partial(decoded, size=self._side, budget=PixelBudget())
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fedkl-decode")
        try:
            for row, square in enumerate(pool.map(decode, files)):
                pixels[row] = square
        finally:
            pool.shutdown(cancel_futures=True)
        images = (
            pixels.to(self._device)
            .permute(0, 3, 1, 2)
            .to(torch.float32, memory_format=torch.contiguous_format)
        )
        return images.div_(255)

    def __repr__(self) -> str:
        return f"FolderImages(shape={self.shape}, device={self._device})"
