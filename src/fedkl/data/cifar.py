"""Reads the binary version of CIFAR-10 and CIFAR-100: label bytes and 3×32×32 pixel bytes, record by record.

The python version holds pickles, which can run anything when they are read: this project never reads them.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images", and its page, section
"Binary version".
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from fedkl.data.base import Dataset, DataSpec, readable
from fedkl.data.images import TensorImages
from fedkl.data.messages import place, told
from fedkl.errors import DataError, gathered

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True, kw_only=True)
class BinaryFile:
    """One file.

    Attributes:
        name: Its name, without `.gz`.
        images: How many it holds; there is no header that would say so.
    """

    name: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the files of one dataset look like.

    Attributes:
        name: The dataset's name.
        train: Files of the training images, in order.
        test: Files of the test images, in order.
        classes: Number of classes of each label byte of a record; the last one is the label.
    """

    name: str
    train: tuple[BinaryFile, ...]
    test: tuple[BinaryFile, ...]
    classes: tuple[int, ...]


def dataset_from_binary(folder: Path, layout: Layout, *, size: int, channels: int, remedy: str) -> Dataset:
    """Loads all files; the images stay bytes in memory and are converted a batch at a time.

    Args:
        folder: Holds the files, plain or with `.gz`; a plain one is preferred.
        layout: What they look like.
        size: Height and width of the delivered images, in pixels; other than 32: resized on access.
        channels: 3.
        remedy: How to get sound files, for messages.

    Returns:
        Images in [0, 1] of shape `(n, 3, size, size)` with labels; mean and standard deviation in its spec
        are those of the training images before a resize.

    Raises:
        DataError: `size` or `channels` is not possible, or files (all are listed) are missing or damaged.
    """
    if size < 1 or channels != _SHAPE[0]:
        raise DataError(
            f"Dataset {layout.name!r}: expected size ≥ 1 and channels=3, got size={size}, "
            f"channels={channels}. Its images are in color."
        )
    problems: list[str] = []
    with readable(folder):
        train = _read_all(folder, layout.train, classes=layout.classes, problems=problems)
        test = _read_all(folder, layout.test, classes=layout.classes, problems=problems)
    if problems:
        raise DataError(gathered(f"Cannot load the dataset {layout.name!r}.", problems, remedy))
    mean, std = _statistics(train[0])
    spec = DataSpec(
        name=layout.name, shape=(channels, size, size), classes=layout.classes[-1], mean=mean, std=std
    )
    side = None if size == _SHAPE[1] else size
    return Dataset(
        spec,
        train_images=TensorImages(train[0], size=side),
        train_labels=train[1],
        test_images=TensorImages(test[0], size=side),
        test_labels=test[1],
    )


def _read_all(
    folder: Path, files: Sequence[BinaryFile], *, classes: tuple[int, ...], problems: list[str]
) -> tuple[UInt8[Tensor, "images 3 32 32"], Int64[Tensor, " images"]]:
    """Reads files one after the other into one tensor; what is wrong with them goes to `problems`."""
    images = torch.empty(sum(file.images for file in files), *_SHAPE, dtype=torch.uint8)
    labels = torch.empty(len(images), dtype=torch.int64)
    start = 0
    for file in files:
        part = slice(start, start + file.images)
        start += file.images
        try:
            rows = _read_records(folder / file.name, count=file.images, classes=classes)
        except DataError as error:
            problems.append(str(error))
            continue
        images[part] = rows[:, len(classes) :].view(-1, *_SHAPE)
        labels[part] = rows[:, len(classes) - 1]
    return images, labels


def _read_records(path: Path, *, count: int, classes: tuple[int, ...]) -> UInt8[Tensor, "records bytes"]:
    packed = path.with_name(f"{path.name}.gz")
    if not path.is_file() and not packed.is_file():
        raise DataError(f"{path.name} (or {packed.name}) is missing: looked for it in {place(path.parent)}")
    path = path if path.is_file() else packed
    length = len(classes) + _PIXELS
    try:
        with gzip.open(path) if path is packed else path.open("rb") as file:
            content = bytearray(file.read(count * length + 1))
    except (OSError, EOFError, zlib.error) as error:
        kind = "a readable gzip file" if path is packed else "a readable file"
        raise DataError(f"{place(path)}: expected {kind}, got {told(error)}") from error
    if len(content) != count * length:
        came = "more" if len(content) > count * length else f"{len(content)}, it is truncated"
        raise DataError(f"{place(path)}: expected {count * length} bytes ({count} images), got {came}")
    rows = torch.frombuffer(content, dtype=torch.uint8).view(count, length)
    for byte, allowed in enumerate(classes):
        if outside := int((rows[:, byte] >= allowed).sum()):
            kind = "labels" if byte == len(classes) - 1 else "coarse labels"
            raise DataError(f"{place(path)}: expected {kind} in 0..{allowed - 1}, got {outside} outside it")
    return rows


def _statistics(images: UInt8[Tensor, "images 3 32 32"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], exact to float64."""
    total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for block in torch.split(images, 1024):
        values = block.to(torch.float32)
        total += values.sum((2, 3)).sum(0, dtype=torch.float64)  # whole numbers below 2²⁴: exact
        squares += values.square_().sum((2, 3), dtype=torch.float64).sum(0)
    count = images.numel() / 3
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.div(255).tolist()), tuple(std.div(255).tolist())
