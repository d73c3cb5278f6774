"""A `torch.utils.data.Dataset` of the user's, with its items checked, as fedkl takes images and labels."""

from __future__ import annotations

import numbers
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fedkl import rng
from fedkl.data.base import Dataset, DataSpec, mixed
from fedkl.data.images import Index, Subset, TensorImages, checked_index, in_unit_range
from fedkl.data.squares import RefusedError, raster_of
from fedkl.errors import DataError
from fedkl.types import Images

_MOST_CLASSES = 2**20
_HELD_OUT = 5  # of so many images one is kept back for tests


def from_torch(
    train: Any, test: Any = None, *, classes: int | None = None, keep: bool = True, name: str = "own"
) -> Dataset:
    """Makes of a `torch.utils.data.Dataset`, or of two, what fedkl trains with and attacks.

    Every item is read once, in order, checked, and kept in memory: bytes as bytes, anything else as float32.
    Items that lie class after class are mixed then, the same way each time, since attacks take the first.
    Random augmentation is thereby drawn once, with the seed 0 of PyTorch's, NumPy's and Python's generator;
    leave it to fedkl (`--set training.local.augmentation=flip`).

    Args:
        train: Has `len()` and gives pairs of an image and a class index, as torchvision's and MedMNIST's
            datasets do. An image is a tensor ``(channels, height, width)`` or ``(height, width)``, a NumPy
            array of such a shape or with the channels last, or a PIL image; bytes in 0 .. 255 or floats in
            [0, 1]. All have the same shape. An index is a number, or an array or tensor of one number.
        test: The same; None: every fifth image on average, drawn with the seed 0, is kept back from `train`.
            Images of one patient may then be in both: give two where that matters.
        classes: How many there are; None: the largest index, and one.
        keep: Whether images stay in memory. Without, items are read again whenever they are needed, and must
            be the same each time.
        name: What messages call it.

    Raises:
        DataError: It is no such dataset; the first item that is not usable is named by its index.

    >>> pixels, labels = torch.rand(50, 1, 8, 8), torch.arange(50) % 3
    >>> from_torch(torch.utils.data.TensorDataset(pixels, labels))
    Dataset('own', train=40, test=10, shape=(1, 8, 8), classes=3)
    """
    first = _read(train, f"{name}, train", keep=keep)
    if test is None:
        if len(first.labels) < 2:
            raise DataError(f"{name}: expected at least two images, got one. Give `test` too.")
        order = torch.randperm(len(first.labels), generator=rng.generator(0, "held out for tests"))
        count = max(1, len(order) // _HELD_OUT)
        held_out, rest = order[:count].sort().values, order[count:].sort().values
        parts = [first.part(places[mixed(first.labels[places])]) for places in (rest, held_out)]
    else:
        second = _read(test, f"{name}, test", keep=keep)
        parts = [first.all(), second.all()]
    largest = 1 + max(int(labels.max()) for _, labels in parts)
    mean, std = first.moments()
    shape = cast(tuple[int, int, int], first.images.shape[1:])
    spec = DataSpec(name=name, shape=shape, classes=classes or largest, mean=mean, std=std)
    (train_images, train_labels), (test_images, test_labels) = parts
    return Dataset(
        spec,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )


def as_tensors(dataset: Any) -> tuple[Float32[Tensor, "batch _ _ _"], Int64[Tensor, " batch"]]:
    """All images and labels of a `torch.utils.data.Dataset`, as `fedkl.Subject` takes them.

    Args:
        dataset: As `from_torch` takes it.

    Returns:
        Images in [0, 1], and class indexes.

    Raises:
        DataError: As `from_torch`.

    >>> images, labels = as_tensors([(Image.new("L", (8, 8), 255), 1), (Image.new("L", (8, 8)), 0)])
    >>> images.amax((1, 2, 3)), labels
    (tensor([1., 0.]), tensor([1, 0]))
    """
    found = _read(dataset, "dataset", keep=True)
    return found.images[:], found.labels


@dataclass(eq=False, repr=False)
class _Read:
    """What was read, and sums over the pixels of each channel."""

    images: Images
    kept: Tensor | None
    labels: Tensor
    sums: Tensor
    squares: Tensor

    def all(self) -> tuple[Images, Tensor]:
        """All images, mixed where they lie class after class, with their labels."""
        order = mixed(self.labels)
        in_order = torch.equal(order, torch.arange(len(order)))
        return (self.images, self.labels) if in_order else self.part(order)

    def part(self, indexes: Tensor) -> tuple[Images, Tensor]:
        """Some of the images, with their labels."""
        kept = Subset(self.images, indexes) if self.kept is None else TensorImages(self.kept[indexes])
        return kept, self.labels[indexes]

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel; 1 where all pixels are the same."""
        count = len(self.labels) * self.images.shape[2] * self.images.shape[3]
        mean = self.sums / count
        std = (self.squares / count - mean**2).clamp(min=0).sqrt()
        std = torch.where(std > 1e-6, std, torch.ones_like(std))
        return tuple(mean.clamp(0, 1).tolist()), tuple(std.tolist())


class _StoredElsewhere:
    """Images of a dataset that are read when they are asked for."""

    streams = False  # nothing is gained by reading ahead: one thread reads at a time

    def __init__(self, item: Callable[[int], Tensor], shape: tuple[int, ...]) -> None:
        self._item = item
        self._reading = threading.Lock()  # files that are open in the dataset cannot be read by two threads
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index, /) -> Tensor:
        places = checked_index(index, device=torch.device("cpu"))
        indexes = range(len(self))[places] if isinstance(places, slice) else places.tolist()
        images = torch.empty(len(indexes), *self.shape[1:])
        with self._reading:
            for row, number in enumerate(indexes):
                images[row] = self._same(number)
        return images

    def _same(self, number: int) -> Tensor:
        image = self._item(number)
        if tuple(image.shape) != self.shape[1:]:
            raise DataError(
                f"Image {number}: expected the shape that it had, {self.shape[1:]}, got "
                f"{tuple(image.shape)}. A dataset that is read again must give the same each time."
            )
        return _levels(image)


def _read(dataset: Any, what: str, *, keep: bool) -> _Read:
    count = _length(dataset, what)
    with rng.seeded(0):  # what the dataset's transforms draw
        first, _ = _item(dataset, 0, what)
    kept = _room(count, first, what) if keep else None
    labels = torch.empty(count, dtype=torch.int64)
    sums, squares = torch.zeros(2, len(first), dtype=torch.float64)
    with rng.seeded(0):
        for index in range(count):
            image, labels[index] = _item(dataset, index, what)
            if (image.shape, image.dtype) != (first.shape, first.dtype):
                raise DataError(
                    f"{what}[{index}]: expected an image as the first, {_kind(first)}, got {_kind(image)}. "
                    "Bring all to one size and type in the dataset's transform, for example with "
                    "torchvision.transforms.Resize((224, 224))."
                )
            if kept is not None:
                kept[index] = image
            levels = _levels(image).double()
            sums += levels.sum((1, 2))
            squares += levels.square().sum((1, 2))
    shape = (count, *first.shape)
    read_again = _StoredElsewhere(lambda index: _item(dataset, index, what)[0], shape)
    return _Read(read_again if kept is None else TensorImages(kept), kept, labels, sums, squares)


def _length(dataset: Any, what: str) -> int:
    if isinstance(dataset, DataLoader):
        raise DataError(f"{what}: expected a Dataset, got a DataLoader. Give loader.dataset.")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{what}: expected a Dataset with len() and an index, got {type(dataset).__name__}. Give one "
            "that has both, or a list of pairs (image, label)."
        )
    try:
        count = len(dataset)
    except (TypeError, NotImplementedError):
        count = 0
    if count < 1:
        raise DataError(f"{what}: expected at least one item, got {type(dataset).__name__} with none.")
    return count


def _room(count: int, first: Tensor, what: str) -> Tensor:
    try:
        return torch.empty(count, *first.shape, dtype=first.dtype)
    except RuntimeError as error:
        size = count * first.numel() * first.element_size() / 1e9
        raise DataError(
            f"{what}: expected images that fit into memory, got {count} of {_kind(first)}, {size:.0f} GB. "
            "Shrink them in the dataset's transform, or give keep=False."
        ) from error


def _item(dataset: Any, index: int, what: str) -> tuple[Tensor, int]:
    try:
        item = dataset[index]
    except (Exception, SystemExit) as error:  # it is the user's code
        raise DataError(
            f"{what}[{index}]: expected an item, got {type(error).__name__}. Correct the dataset."
        ) from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        got = f"{type(item).__name__} of {len(item)}" if hasattr(item, "__len__") else type(item).__name__
        raise DataError(
            f"{what}[{index}]: expected a pair (image, label), got {got}. Return `image, label` in "
            "__getitem__."
        )
    return _image(item[0], f"{what}[{index}]"), _label(item[1], f"{what}[{index}]")


def _label(label: Any, what: str) -> int:
    if isinstance(label, Tensor | np.ndarray) and label.shape in ((), (1,)):
        label = label.item()  # MedMNIST gives arrays of one number
    if isinstance(label, numbers.Integral) and 0 <= int(label) < _MOST_CLASSES:
        return int(label)
    got = f"{tuple(label.shape)} numbers" if hasattr(label, "shape") else type(label).__name__
    if isinstance(label, numbers.Integral):
        got = "a number below 0" if int(label) < 0 else "a larger one"
    raise DataError(
        f"{what}: expected a class index of 0 .. {_MOST_CLASSES - 1} as label, got {got}. Several labels an "
        "image, and measured values, are not classes: choose one, and number the classes from 0."
    )


def _image(image: Any, what: str) -> Tensor:
    if isinstance(image, Image.Image):
        image = _of_pillow(image, what)
    if isinstance(image, np.ndarray):
        image = _of_array(image)
    if not isinstance(image, Tensor):
        raise DataError(
            f"{what}: expected a tensor, a NumPy array or a PIL image, got {type(image).__name__}. Convert "
            "it in the dataset's transform, for example with torchvision.transforms.ToTensor()."
        )
    image = image.detach().cpu()
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.numel() == 0 or (len(image) > 4 and image.shape[2] in (1, 3, 4)):
        raise DataError(
            f"{what}: expected an image of shape (channels, height, width), got {tuple(image.shape)}. "
            "Channels come first: image.permute(2, 0, 1)."
        )
    return _checked_range(image, what)


def _checked_range(image: Tensor, what: str) -> Tensor:
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise DataError(
            f"{what}: expected bytes, or floats in [0, 1], got {image.dtype}. Divide by the number that "
            "means white, for example image / 65535 for 16 bits, image / 4095 for 12."
        )
    image = image.to(torch.float32)
    if not in_unit_range(image):
        side = "some below 0" if bool((image < 0).any()) else "some above 1, or NaN"
        raise DataError(
            f"{what}: expected values in [0, 1], got {side}. Divide by the number that means white; leave "
            "Normalize out of the transform, and give mean and standard deviation to the network "
            "(--set model.standardize=true, or normalization= of a fedkl.Subject)."
        )
    return image


def _of_pillow(image: Image.Image, what: str) -> npt.NDArray[Any]:
    try:
        raster = raster_of(image, channels=1 if image.mode in ("1", "L", "LA") else 3)
        return np.array(image if image.mode == raster.mode != "F" else raster.converted(image))
    except RefusedError as error:
        raise DataError(f"{what}: expected a readable image, got {error}.") from error


def _of_array(image: npt.NDArray[Any]) -> Tensor:
    """Channels last, as images are in NumPy, unless only the first dimension can be channels."""
    if image.dtype == np.uint16:
        image = image.astype(np.int32)  # PyTorch cannot do much with it; refused with a remedy
    if image.ndim == 3 and image.shape[2] in (1, 3) and image.shape[0] not in (1, 3):
        image = image.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(image))


def _levels(image: Tensor) -> Tensor:
    return image.to(torch.float32) / 255 if image.dtype == torch.uint8 else image


def _kind(image: Tensor) -> str:
    return f"{image.dtype} of shape {tuple(image.shape)}"
