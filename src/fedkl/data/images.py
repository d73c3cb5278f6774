"""Images that are converted, or read from disk, a batch at a time: what `fedkl.types.Images` asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from fedkl.errors import DataError
from fedkl.types import Images

Batch = Float32[Tensor, "batch channels height width"]
Index = Int64[Tensor, " batch"] | slice


class TensorImages:
    """Images in memory, held as they are and converted to float32 in [0, 1] on access, a batch at a time.

    CIFAR-10's training images take 154 MB as bytes, 614 MB as floats. A resize is bilinear with
    `align_corners=False`, antialiased only where it shrinks. Repeated channels are an `.expand`ed view with
    stride 0 that takes the memory of one.

    Args:
        tensor: Shape `(n, channels, height, width)`, bytes or float32 in [0, 1]; not copied.
        size: Height and width of the delivered images; None: as held.
        channels: Number of delivered channels; None: as held. Others than those held only from one channel,
            which is repeated.

    Raises:
        DataError: The tensor is empty, has another shape, dtype or range, or does not give `channels`.

    >>> images = TensorImages(torch.full((5, 1, 28, 28), 255, dtype=torch.uint8), size=32, channels=3)
    >>> images.shape, images[:2].shape, images[torch.tensor([4])].max().item()
    ((5, 3, 32, 32), torch.Size([2, 3, 32, 32]), 1.0)
    """

    def __init__(self, tensor: Tensor, *, size: int | None = None, channels: int | None = None) -> None:
        _check_tensor(tensor)
        held, height, width = tensor.shape[1:]
        channels = held if channels is None else channels
        if (size is not None and size < 1) or channels < 1 or held not in (1, channels):
            raise DataError(
                f"TensorImages: expected size ≥ 1 and channels = {held} (or more where one is held), "
                f"got size={size}, channels={channels}. Leave them out to deliver the images as they are."
            )
        self._tensor = tensor
        self._side = size
        self._shape = (len(tensor), channels, size or height, size or width)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(images, channels, height, width)` as delivered."""
        return self._shape

    @property
    def device(self) -> torch.device:
        """Where the images are held and delivered."""
        return self._tensor.device

    def to(self, device: torch.device | str) -> TensorImages:
        """The same images held on `device`."""
        return TensorImages(self._tensor.to(device), size=self._side, channels=self._shape[1])

    def __len__(self) -> int:
        return len(self._tensor)

    def __getitem__(self, index: Index, /) -> Batch:
        part = self._tensor[checked_index(index, device=self.device)]
        if part.dtype == torch.uint8:
            part = part.to(torch.float32).div_(255)
        if self._side is not None:
            part = resized(part, size=self._side)
        return part.expand(-1, self._shape[1], -1, -1)

    def __repr__(self) -> str:
        return f"TensorImages(shape={self._shape}, held={self._tensor.dtype}, device={self.device})"


class Subset:
    """Some of the images of a store, in a given order, without reading or copying any.

    Args:
        images: The store.
        indexes: Which, or a slice of them.

    Raises:
        DataError: An index is outside the store.

    >>> half = Subset(TensorImages(torch.zeros(6, 1, 4, 4)), slice(3, None))
    >>> half.shape, half[:2].shape
    ((3, 1, 4, 4), torch.Size([2, 1, 4, 4]))
    """

    def __init__(self, images: Images, indexes: Index) -> None:
        if isinstance(indexes, slice):
            indexes = torch.arange(len(images))[indexes]
        if outside := int(((indexes < 0) | (indexes >= len(images))).sum()):
            raise DataError(f"Subset: expected indexes in 0..{len(images) - 1}, got {outside} outside it.")
        self._images = images
        self._indexes = indexes

    @property
    def shape(self) -> tuple[int, ...]:
        """`(images, channels, height, width)`."""
        return (len(self._indexes), *self._images.shape[1:])

    @property
    def streams(self) -> bool:
        """Whether the images are read from disk on access."""
        return bool(getattr(self._images, "streams", False))

    def __len__(self) -> int:
        return len(self._indexes)

    def __getitem__(self, index: Index, /) -> Batch:
        return self._images[self._indexes[checked_index(index, device=self._indexes.device)]]


def prefetched(images: Images, index_batches: Iterable[Int64[Tensor, " _"]]) -> Iterator[Batch]:
    """Yields a batch for each tensor of indexes, in order; a store that streams loads one batch ahead.

    Only stores whose `streams` is true get a background thread; it ends with the iteration, also where the
    consumer stops early (a generator that is not used up is closed when it is garbage collected; use
    `contextlib.closing` to have it at once). Two batches are held: the consumer's and the next.

    Args:
        images: The store.
        index_batches: Indexes of each batch. For a store that streams, they are taken one batch ahead, so
            they should not share a random generator with what the consumer does.

    Raises:
        DataError: As the store does, at the batch that it concerns.

    >>> store = TensorImages(torch.zeros(5, 1, 4, 4))
    >>> [len(batch) for batch in prefetched(store, torch.arange(5).split(2))]
    [2, 2, 1]
    """
    if not getattr(images, "streams", False):
        for index in index_batches:
            yield images[index]
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="fedkl-prefetch")
    try:
        waiting: Future[Tensor] | None = None
        for index in index_batches:
            ahead = pool.submit(images.__getitem__, index)
            if waiting is not None:
                yield waiting.result()
            waiting = ahead
        if waiting is not None:
            yield waiting.result()
    finally:
        pool.shutdown(cancel_futures=True)


def checked_index(index: Index, *, device: torch.device) -> Tensor | slice:
    """Returns the index on `device`.

    Raises:
        DataError: It is neither a slice nor a 1-D int64 tensor.
    """
    if isinstance(index, slice):
        return index
    if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype != torch.int64:
        got = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else f"{index!r}"
        raise DataError(f"Images: expected a 1-D int64 tensor or a slice as index, got {got}.")
    return index.to(device)


def resized(
    images: Float[Tensor, "batch channels _ _"], *, size: int
) -> Float[Tensor, "batch channels {size} {size}"]:
    """Resizes images in [0, 1], bilinear, antialiased where it shrinks; the input is never written to."""
    if images.shape[2:] == (size, size):
        return images
    shrinks = size < max(images.shape[2:])
    result = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)
    return result.clamp_(0, 1)  # interpolation may round one ulp past 1


def _check_tensor(tensor: UInt8[Tensor, "..."] | Float32[Tensor, "..."]) -> None:
    if tensor.ndim != 4 or tensor.numel() == 0 or tensor.dtype not in (torch.uint8, torch.float32):
        raise DataError(
            "TensorImages: expected a uint8 or float32 tensor (n, channels, height, width), not empty, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}."
        )
    if tensor.dtype == torch.float32 and not in_unit_range(tensor):
        raise DataError("TensorImages: expected every value in [0, 1], got values outside it or NaN.")


def in_unit_range(images: Tensor) -> bool:
    """Whether all values are in [0, 1]; copies that an expanded view pretends to have are read once."""
    for dim, stride in enumerate(images.stride()):
        if stride == 0:
            images = images.narrow(dim, 0, 1)
    low, high = torch.aminmax(images)
    return bool(low >= 0 and high <= 1)  # written so that NaN fails too
