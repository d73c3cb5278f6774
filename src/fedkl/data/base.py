"""What every dataset delivers: images in [0, 1] and labels, with the facts that a model needs about them."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from fedkl import rng
from fedkl.data.images import TensorImages, in_unit_range
from fedkl.data.messages import place, told
from fedkl.errors import DataError, gathered
from fedkl.types import Images


def default_root() -> Path:
    """Returns the data root: `$FEDKL_DATA`, or `~/.cache/fedkl/data` where that is unset or empty.

    Raises:
        DataError: It begins with the home folder of a user who is not known.
    """
    root = Path(os.environ.get("FEDKL_DATA") or "~/.cache/fedkl/data")
    try:
        return root.expanduser()
    except RuntimeError as error:
        raise DataError(
            f"FEDKL_DATA: expected a folder, got {place(root)}, whose home is not known. Give its path."
        ) from error


def folder_with(root: Path, *, name: str, files: Iterable[str], unpacked: str = "") -> Path:
    """Finds the folder of a dataset's files.

    Args:
        root: The data root.
        name: The dataset's name, which is the folder's where `fetch` makes it.
        files: Names of the files, of which any, plain or with `.gz`, shows the folder.
        unpacked: Folder inside the dataset's official archive.

    Returns:
        The first of `<root>/<name>`, `<root>/<name>/<unpacked>`, `<root>/<unpacked>` and `<root>` that has
        such a file; `<root>/<name>` where none has.

    Raises:
        DataError: The system does not let us look there.
    """
    names = [each for file in files for each in (file, f"{file}.gz")]
    folders = [root / name, root / name / unpacked, root / unpacked, root]
    with readable(root):
        return next(
            (folder for folder in folders if any((folder / each).is_file() for each in names)), folders[0]
        )


@contextlib.contextmanager
def readable(root: Path) -> Iterator[None]:
    """For looking around in the data root, or in a part of it.

    Raises:
        DataError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{place(root)}: expected a readable folder, got {told(error)}. Correct its permissions, or give "
            "another data root."
        ) from error


def mixed(labels: Int64[Tensor, " images"]) -> Int64[Tensor, " images"]:
    """An order of images, the same each time: as they are, but mixed where they lie class after class.

    That is where the label changes less than half as often as it would by chance.

    Attacks take the first images, and the first ones stand for fewer: they shall be of all classes. The very
    first stays the first.

    Args:
        labels: Of all images, in their own order.

    >>> mixed(torch.tensor([0, 1, 0])), mixed(torch.tensor([0, 0, 0, 1, 1, 1])).sort().values
    (tensor([0, 1, 2]), tensor([0, 1, 2, 3, 4, 5]))
    """
    shares = labels.bincount().double() / max(1, len(labels))
    by_chance = (len(labels) - 1) * (1 - float(shares.square().sum()))
    changes = int(labels.diff().count_nonzero())
    if changes == 0 or changes >= by_chance / 2:
        return torch.arange(len(labels))
    drawn = torch.randperm(len(labels) - 1, generator=rng.generator(0, "images class after class"))
    return torch.cat([torch.zeros(1, dtype=torch.int64), 1 + drawn])


def fetch_remedy(root: Path, *, name: str) -> str:
    """How to get sound files of a dataset, for messages."""
    command = f"fedkl data fetch {name}"
    with contextlib.suppress(DataError):
        if root == default_root():
            return f"`{command}` puts sound files into {place(root / name)}."
    command = f"FEDKL_DATA={shlex.quote(place(root))} {command}"
    return f"`{command}` puts sound files into {place(root / name)}."


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The facts about a dataset that a model and its preprocessing need.

    Attributes:
        name: The name it is registered by.
        shape: `(channels, height, width)` of one image as delivered.
        classes: Number of classes; labels are in 0 .. classes − 1.
        mean: Per channel, over the training images, in [0, 1]; the dataset says if it is of others.
        std: Per channel, over the same values (population, not sample), above 0.

    Raises:
        DataError: A field is out of its range; the message lists every such field.

    >>> DataSpec(name="toy", shape=(1, 8, 8), classes=2, mean=(0.5,), std=(0.25,)).shape
    (1, 8, 8)
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        problems = []
        if not self.name:
            problems.append("DataSpec.name: expected a name, got an empty string")
        if len(self.shape) != 3 or min(self.shape) < 1:
            problems.append(
                f"DataSpec.shape: expected (channels, height, width), all at least 1, got {self.shape}"
            )
        if self.classes < 1:
            problems.append(f"DataSpec.classes: expected at least 1, got {self.classes}")
        for field, values in (("mean", self.mean), ("std", self.std)):
            if self.shape and len(values) != self.shape[0]:
                problems.append(
                    f"DataSpec.{field}: expected one value per channel of {self.shape}, got {len(values)}"
                )
        if not all(0 <= value <= 1 for value in self.mean):
            problems.append(f"DataSpec.mean: expected values in [0, 1], got {self.mean}")
        if not all(0 < value < math.inf for value in self.std):
            problems.append(f"DataSpec.std: expected finite values above 0, got {self.std}")
        if problems:
            raise DataError(gathered("This is not a usable DataSpec.", problems, "Correct these fields."))


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Training and test images with their labels; its repr shows sizes, never values.

    Images may be expanded views (stride 0 along channels), so clone them before writing into them.

    A tensor's values are all checked here, and a `TensorImages` has checked its own. Of any other store, one
    image is: it might have to read everything from disk.

    Attributes:
        spec: Name, image shape, number of classes, mean and standard deviation.
        train_images: float32 in [0, 1], shape `(batch, channels, height, width)`: a tensor, or a store that
            delivers such tensors batch by batch.
        train_labels: int64 in 0 .. classes − 1, shape `(batch,)`.
        test_images: As `train_images`.
        test_labels: As `train_labels`.

    Raises:
        DataError: A tensor has another shape, dtype, range or length than `spec` says, or is empty; the
            message lists every problem.
    """

    spec: DataSpec
    _: KW_ONLY
    train_images: Images
    train_labels: Int64[Tensor, " train"]
    test_images: Images
    test_labels: Int64[Tensor, " test"]

    def __post_init__(self) -> None:
        classes = self.spec.classes
        problems = [
            *_image_problems("train_images", self.train_images, spec=self.spec),
            *label_problems("train_labels", self.train_labels, images=self.train_images, classes=classes),
            *_image_problems("test_images", self.test_images, spec=self.spec),
            *label_problems("test_labels", self.test_labels, images=self.test_images, classes=classes),
        ]
        if problems:
            remedy = "Deliver float32 images in [0, 1] and int64 class indexes that fit the DataSpec."
            raise DataError(gathered(f"Dataset {self.spec.name!r} is not usable.", problems, remedy))

    def __repr__(self) -> str:
        return (
            f"Dataset({self.spec.name!r}, train={len(self.train_images)}, test={len(self.test_images)}, "
            f"shape={self.spec.shape}, classes={self.spec.classes})"
        )


def _image_problems(field: str, images: Images, *, spec: DataSpec) -> list[str]:
    if not isinstance(images, Images) or (isinstance(images, Tensor) and images.layout != torch.strided):
        return [f"{field}: expected a dense torch.Tensor or Images, got {type(images).__name__}"]
    shape = tuple(images.shape)
    problems = []
    if shape[1:] != spec.shape:
        problems.append(f"{field}: expected shape (n, {str(spec.shape)[1:]}, got {shape}")
    if math.prod(shape) == 0:
        return [*problems, f"{field}: expected at least one image, got shape {shape}"]
    if isinstance(images, TensorImages):
        return problems
    values = images if isinstance(images, Tensor) else images[:1]
    if values.dtype != torch.float32:
        problems.append(f"{field}: expected dtype torch.float32, got {values.dtype}")
    if not values.is_complex() and not in_unit_range(values):
        problems.append(f"{field}: expected every value in [0, 1], got values outside it or NaN")
    return problems


def label_problems(field: str, labels: Tensor, *, images: Images, classes: int) -> list[str]:
    """What keeps labels from being those of images, one line each; empty if nothing does.

    Args:
        field: What they are called.
        labels: Class indexes, int64, shape ``(n,)``.
        images: What they are of, n of them.
        classes: Number of classes.
    """
    if not isinstance(labels, Tensor) or labels.layout != torch.strided:
        return [f"{field}: expected a dense torch.Tensor, got {type(labels).__name__}"]
    problems = []
    if labels.ndim != 1:
        problems.append(f"{field}: expected shape (n,), got {tuple(labels.shape)}")
    elif isinstance(images, Images) and len(images.shape) > 0 and len(labels) != len(images):
        problems.append(f"{field}: expected {len(images)} labels, one per image, got {len(labels)}")
    if labels.dtype != torch.int64:
        problems.append(f"{field}: expected dtype torch.int64, got {labels.dtype}")
    elif outside := int(((labels < 0) | (labels >= classes)).sum()):
        problems.append(f"{field}: expected labels in 0..{classes - 1}, got {outside} outside it")
    return problems
