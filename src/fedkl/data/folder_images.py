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
from fedkl.data.dicom import Values, check_values
from fedkl.data.images import Index, checked_index
from fedkl.errors import DataError


class FolderImages:
    """Image files, decoded on access by a few threads; memory is that of the batches in use.

    The largest square in the middle is cut out and resized to `size` (bilinear, antialiased as Pillow does),
    which is what resizing the shorter side and cropping the center gives. Transparency and the orientation in
    EXIF data are ignored (but not TIFF's, which Pillow applies). Files are read only when they are asked for,
    so a damaged one shows then. They are BMP, GIF, JPEG, PNG, PPM, TIFF, WebP or DICOM (with pydicom),
    whatever their names; of several frames the first counts, but DICOM has to have one.

    Bytes are divided by 255. Gray of more than 8 bits keeps its levels and is divided by the largest number
    that its bits can hold, 65535 for 16 bits, whatever the image has; gray floats are in [0, 1] already.

    An image has at most 89,478,485 pixels, which Pillow takes without a warning (fewer where
    `PIL.Image.MAX_IMAGE_PIXELS` is lower), and its file at most four bytes for each of them. However many
    threads there are, the images that they have in work have no more pixels than that together: large ones
    wait. A pixel takes 4 bytes of memory, 6 in progressive JPEGs, at most 16 (WebP, DICOM, TIFF in one strip;
    color in JPEG 2000 counts as two pixels), so decoding a batch takes 0.5 GB, at most 1.5 GB, and what
    Pillow reads whole: files (WebP) and texts (PNG).

    Args:
        files: Paths, in the order of the images.
        size: Height and width of the delivered images, in pixels.
        channels: 3: gray is repeated. 1: color becomes gray, .299 R + .587 G + .114 B.
        dicom: What is black and white in gray DICOM files: "window" is the first lookup table or window of
            the file, and as "stored" where it has none; "stored" are the ends of what the bits can store;
            two numbers are the center and width of a window for all files, in the units that the rescale
            slope and intercept give, for example Hounsfield's.
        workers: Threads that decode a batch.
        device: Where the batches are delivered.

    Raises:
        DataError: There is no file, or an option is not possible.
    """

    streams = True
    """Batches are worth loading ahead; see `prefetched`."""

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        *,
        size: int,
        channels: int = 3,
        dicom: Values = "window",
        workers: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(files) == 0 or size < 1 or workers < 1:
            raise DataError(
                "FolderImages: expected at least one file, size ≥ 1 and workers ≥ 1, got "
                f"{len(files)} files, size={size}, workers={workers}."
            )
        if channels not in (1, 3):
            raise DataError(f"FolderImages: expected channels 1 (gray) or 3 (RGB), got {channels}.")
        check_values(dicom)
        self._files = files
        self._side = size
        self._channels = channels
        self._dicom = dicom
        self._workers = workers
        self._device = torch.device(device)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(images, channels, size, size)`."""
        return (len(self._files), self._channels, self._side, self._side)

    @property
    def device(self) -> torch.device:
        """Where the batches are delivered."""
        return self._device

    def to(self, device: torch.device | str) -> FolderImages:
        """The same images delivered on `device`."""
        return FolderImages(
            self._files,
            size=self._side,
            channels=self._channels,
            dicom=self._dicom,
            workers=self._workers,
            device=device,
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(
        self, index: Index, /
    ) -> Float32[Tensor, "batch {self._channels} {self._side} {self._side}"]:
        """See `fedkl.types.Images`.

        Raises:
            DataError: A file cannot be read or is no image; the message names it.
        """
        places = checked_index(index, device=torch.device("cpu"))
        numbers = range(len(self._files))[places] if isinstance(places, slice) else places.tolist()
        images = torch.empty(len(numbers), *self.shape[1:])
        files = [self._files[number] for number in numbers]
        decode = partial(
            decoded, size=self._side, channels=self._channels, values=self._dicom, budget=PixelBudget()
        )
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fedkl-decode")
        try:
            for row, square in enumerate(pool.map(decode, files)):
                images[row] = square
        finally:
            pool.shutdown(cancel_futures=True)
        return images.to(self._device)

    def __repr__(self) -> str:
        return f"FolderImages(shape={self.shape}, device={self._device})"
