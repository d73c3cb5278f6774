"""Reads the IDX files that MNIST and its relatives come in.

Source: the MNIST page (LeCun, Cortes, Burges), section "File formats for the MNIST database".
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fedkl.data.base import Dataset, DataSpec, readable
from fedkl.data.images import resized
from fedkl.data.messages import place, told
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
_MOST_ITEMS = 1 << 19  # MNIST has 60,000, QMNIST 402,953
_BLOCK = 1 << 20


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
    with readable(folder):
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
            problems.append(f"{file} (or {file}.gz) is missing: looked for it in {place(folder)}")
            continue
        try:
            raw[file] = _read_idx(path if path.is_file() else packed, item_shape=item_shape)
        except DataError as error:
            problems.append(str(error))
    for images, labels in ((TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)):
        if images in raw and labels in raw and len(raw[images]) != len(raw[labels]):
            problems.append(
                f"{place(folder / labels)}: expected {len(raw[images])} labels, as many as {images} has "
                f"images, got {len(raw[labels])}"
            )
    if problems:
        raise DataError(gathered(f"Cannot load the dataset {name!r}.", problems, remedy))
    return raw


def _read_idx(path: Path, *, item_shape: tuple[int, ...]) -> UInt8[Tensor, "items ..."]:
    """Reads one file of unsigned bytes; `item_shape` is () for labels, which must be in 0 .. 9."""
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            count = _item_count(file, item_shape=item_shape)
            body = _body(file, length=count * math.prod(item_shape))
    except (OSError, EOFError, zlib.error) as error:
        kind = "a readable gzip file" if packed else "a readable file"
        raise DataError(f"{place(path)}: expected {kind}, got {told(error)}") from error
    except DataError as error:
        raise DataError(f"{place(path)}: {error}") from error
    items = torch.frombuffer(body, dtype=torch.uint8).view(count, *item_shape)
    if not item_shape and (outside := int((items >= _CLASSES).sum())):
        raise DataError(f"{place(path)}: expected labels in 0..{_CLASSES - 1}, got {outside} outside it")
    return items


def _item_count(file: io.BufferedIOBase, *, item_shape: tuple[int, ...]) -> int:
    """Reads the header."""
    length = 8 + 4 * len(item_shape)
    head = file.read(length)
    if len(head) < length:
        raise DataError(f"expected a header of {length} bytes, got {len(head)}")
    numbers: tuple[int, ...] = struct.unpack(f">{2 + len(item_shape)}I", head)
    magic, count, *shape = numbers
    expected_magic = (_UNSIGNED_BYTE << 8) + 1 + len(item_shape)
    if magic != expected_magic:
        raise DataError(f"expected the magic number {expected_magic:#010x}, got {magic:#010x}")
    if tuple(shape) != item_shape:
        raise DataError(f"expected items of shape {item_shape}, got {tuple(shape)}")
    if count == 0:
        raise DataError("expected at least one item, got a file with none")
    if count > _MOST_ITEMS:
        raise DataError(f"expected at most {_MOST_ITEMS} items, got a header that announces {count}")
    return count


def _body(file: io.BufferedIOBase, *, length: int) -> bytearray:
    """Reads in blocks: a forged header must not make us allocate what it announces."""
    body = bytearray()
    while block := file.read(min(_BLOCK, length + 1 - len(body))):
        body += block
    if len(body) != length:
        came = "more" if len(body) > length else f"{len(body)}, it is truncated"
        raise DataError(f"expected {length} bytes after the header, got {came}")
    return body


def _resized(
    images: UInt8[Tensor, "batch height width"], *, size: int
) -> Float[Tensor, "batch 1 {size} {size}"]:
    """Converts bytes to [0, 1] and resizes, in blocks so that only the result is ever held in full."""
    result = torch.empty(len(images), 1, size, size)
    for source, target in zip(torch.split(images, 1024), torch.split(result, 1024), strict=True):
        target.copy_(resized(source.unsqueeze(1).float().div_(255), size=size))
    return result
