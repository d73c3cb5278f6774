"""Reads the IDX files that MNIST and its relatives come in.

Source: the MNIST page (LeCun, Cortes, Burges), section "File formats for the MNIST database".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fedkl.data.base import Dataset, DataSpec
from fedkl.data.images import resized
from fedkl.errors import DataError, gathered

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"

_SIDE = 28
_CLASSES = 10
_ITEM_SHAPES: dict[str, tuple[int, ...]] = {
    TRAIN_IMAGES: (_SIDE, _SIDE),
    TRAIN_LABELS: (),
    TEST_IMAGES: (_SIDE, _SIDE),
    TEST_LABELS: (),
}
_UNSIGNED_BYTE = 0x08
_DEFLATE_RATIO = 1032  # the most that deflate can compress


def dataset_from_idx(folder: Path, *, name: str, size: int, channels: int, remedy: str) -> Dataset:
    """Loads four IDX files (28×28 gray images, 10 classes), resized and repeated to `channels`.

    The resize is bilinear with `align_corners=False`, antialiased only where it shrinks. The channels are
    an `.expand`ed view with stride 0: any number of them takes the memory of one. Clone before writing.

    Args:
        folder: Holds the four files, plain or with `.gz`; a plain one is preferred.
        name: The dataset's name, for its spec and for messages.
        size: Height and width of the delivered images, in pixels.
        channels: Number of identical channels.
        remedy: How to get sound files, for messages.

    Returns:
        Images in [0, 1] of shape `(n, channels, size, size)` with labels in 0 .. 9; the mean and standard
        deviation in its spec are those of the resized training images.

    Raises:
        DataError: `size` or `channels` is below 1, or files (all are listed) are missing or damaged.
    """
    _check_arguments(name=name, size=size, channels=channels)
    raw = _read_all(folder, name=name, remedy=remedy)
    train = _resized(raw[TRAIN_IMAGES], size=size)
    test = _resized(raw[TEST_IMAGES], size=size)
    std, mean = torch.std_mean(train, correction=0)
    return Dataset(
        DataSpec(
            name=name,
            shape=(channels, size, size),
            classes=_CLASSES,
            mean=(mean.item(),) * channels,
            std=(std.item(),) * channels,
        ),
        train_images=train.expand(-1, channels, -1, -1),
        train_labels=raw[TRAIN_LABELS].long(),
        test_images=test.expand(-1, channels, -1, -1),
        test_labels=raw[TEST_LABELS].long(),
    )


def _check_arguments(*, name: str, size: int, channels: int) -> None:
    if size < 1 or channels < 1:
        raise DataError(
            f"Dataset {name!r}: expected size and channels of at least 1, got size={size}, "
            f"channels={channels}. The paper's setting is size=32, channels=3."
        )


def _read_all(folder: Path, *, name: str, remedy: str) -> dict[str, Tensor]:
    raw: dict[str, Tensor] = {}
    problems: list[str] = []
    for file, item_shape in _ITEM_SHAPES.items():
        path = folder / file
        packed = folder / f"{file}.gz"
        if not path.is_file() and not packed.is_file():
            problems.append(f"{file} (or {file}.gz) is missing: looked for it in {folder}")
            continue
        try:
            raw[file] = _read_idx(path if path.is_file() else packed, item_shape=item_shape)
        except DataError as error:
            problems.append(str(error))
    for images, labels in ((TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)):
        if images in raw and labels in raw and len(raw[images]) != len(raw[labels]):
            problems.append(
                f"{folder / labels}: expected {len(raw[images])} labels, as many as {images} has images, "
                f"got {len(raw[labels])}"
            )
    if problems:
        raise DataError(gathered(f"Cannot load the dataset {name!r}.", problems, remedy))
    return raw


def _read_idx(path: Path, *, item_shape: tuple[int, ...]) -> UInt8[Tensor, "items ..."]:
    """Reads one file of unsigned bytes; `item_shape` is () for labels, which must be in 0 .. 9."""
    header, body = _header_and_body(path, ndim=1 + len(item_shape))
    magic, *dims = header
    expected_magic = (_UNSIGNED_BYTE << 8) + 1 + len(item_shape)
    if magic != expected_magic:
        raise DataError(f"{path}: expected the magic number {expected_magic:#010x}, got {magic:#010x}")
    if tuple(dims[1:]) != item_shape:
        raise DataError(f"{path}: expected items of shape {item_shape}, got {tuple(dims[1:])}")
    if dims[0] == 0:
        raise DataError(f"{path}: expected at least one item, got a file with none")
    if len(body) != math.prod(dims):
        came = "more" if len(body) > math.prod(dims) else f"{len(body)}, it is truncated"
        raise DataError(f"{path}: expected {math.prod(dims)} bytes after the header, got {came}")
    items = torch.frombuffer(body, dtype=torch.uint8).view(dims)
    if not item_shape and (outside := int((items >= _CLASSES).sum())):
        raise DataError(f"{path}: expected labels in 0..{_CLASSES - 1}, got {outside} outside it")
    return items


def _header_and_body(path: Path, *, ndim: int) -> tuple[tuple[int, ...], bytearray]:
    """Returns magic number and dimensions, and at most one byte more than these announce."""
    packed = path.suffix == ".gz"
    length = 4 * (1 + ndim)
    try:
        largest = path.stat().st_size * (_DEFLATE_RATIO if packed else 1)
        with gzip.open(path) if packed else path.open("rb") as file:
            head = file.read(length)
            if len(head) < length:
                raise DataError(f"{path}: expected a header of {length} bytes, got {len(head)}")
            header = struct.unpack(f">{1 + ndim}I", head)
            # A forged header must not make us allocate more than the file can hold.
            return header, bytearray(file.read(min(math.prod(header[1:]), largest) + 1))
    except (OSError, EOFError, zlib.error) as error:
        kind = "a readable gzip file" if packed else "a readable file"
        raise DataError(f"{path}: expected {kind}, got {type(error).__name__}: {error}") from error


def _resized(
    images: UInt8[Tensor, "batch height width"], *, size: int
) -> Float[Tensor, "batch 1 {size} {size}"]:
    """Converts bytes to [0, 1] and resizes, in blocks so that only the result is ever held in full."""
    result = torch.empty(len(images), 1, size, size)
    for source, target in zip(torch.split(images, 1024), torch.split(result, 1024), strict=True):
        target.copy_(resized(source.unsqueeze(1).float().div_(255), size=size))
    return result
