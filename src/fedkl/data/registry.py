"""Datasets by name. A new one is a new file with an `ENTRY`, and a line in `ENTRIES`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedkl.data import cifar10, cifar100, fashion_mnist, image_folder, mnist, sample
from fedkl.data.base import Dataset, default_root
from fedkl.data.dicom import Values
from fedkl.data.sources import DatasetEntry
from fedkl.errors import DataError, shown

_Build = TypeVar("_Build", bound=Callable[[], Dataset])

ENTRIES: dict[str, DatasetEntry] = {
    "cifar10": cifar10.ENTRY,
    "cifar100": cifar100.ENTRY,
    "fashion-mnist": fashion_mnist.ENTRY,
    "imagefolder": image_folder.ENTRY,
    "mnist": mnist.ENTRY,
    "mnist-sample": sample.ENTRY,
}

DATASETS: dict[str, str] = {name: entry.info for name, entry in ENTRIES.items()}
"""One line about each dataset, by name."""

_NAME = "[A-Za-z0-9]+(-[A-Za-z0-9]+)*"
_REGISTERED: dict[str, Callable[[], Dataset]] = {}


def register_dataset(name: str) -> Callable[[_Build], _Build]:
    """Gives a dataset of one's own a name: a decorator of a function without arguments that returns it.

    Experiments call it then, with `fedkl --plugin FILE train --data NAME`; see docs/data.md.

    Args:
        name: Of letters, digits and hyphens. The same one again replaces the function.

    Raises:
        DataError: The name is one of fedkl's own, or is no such name.

    >>> @register_dataset("squares")
    ... def squares():
    ...     return load("mnist-sample", channels=1)
    >>> load("squares").spec.name
    'squares'
    >>> forget_dataset("squares")
    """
    if name in ENTRIES or re.fullmatch(_NAME, name) is None:
        raise DataError(
            "register_dataset: expected a new name of ASCII letters, digits and single hyphens, "
            f"got {shown(name)}. Choose another one."
        )

    def register(build: _Build) -> _Build:
        _REGISTERED[name] = build
        DATASETS[name] = f"registered by {build.__module__}.{build.__qualname__}"
        return build

    return register


def forget_dataset(name: str) -> None:
    """Takes a registered dataset out again, as a test does that added one; nothing where there is none."""
    if _REGISTERED.pop(name, None) is not None:
        del DATASETS[name]


def _built(name: str, asked: dict[str, Any]) -> Dataset:
    """A registered dataset, as its function makes it."""
    given = [option for option, value in asked.items() if value is not None]
    if given:
        raise DataError(
            f"data.{given[0]}: expected none, because the dataset {name!r} is made by a function of yours. "
            "Leave it out; the function decides."
        )
    dataset = _REGISTERED[name]()
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"The dataset {name!r}: expected a function that returns a fedkl.data.Dataset, got "
            f"{type(dataset).__name__}. Return fedkl.data.from_torch(train, test)."
        )
    return replace(dataset, spec=replace(dataset.spec, name=name))


def entry_of(name: str) -> DatasetEntry:
    """Returns the registry's entry for `name`.

    Raises:
        DataError: There is no such dataset; the message lists the known ones.
    """
    if name not in ENTRIES:
        known = ", ".join(repr(known) for known in sorted(DATASETS))
        raise DataError(
            f"Unknown dataset: expected one of {known}, got {name!r}. Choose one of these names, or register "
            "yours."
        )
    return ENTRIES[name]


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    channels: int | None = None,
    dicom: Values | None = None,
) -> Dataset:
    """Loads a dataset by name.

    Args:
        name: One of `DATASETS`.
        root: The data root; `default_root()` by default. A dataset inside the package does not use it.
        size: Height and width of the delivered images, in pixels; None: the dataset's usual size.
        channels: Number of channels of the delivered images; None: 3.
        dicom: What is black and white in gray DICOM files; see `FolderImages`. Of `imagefolder` only.

    Returns:
        Images in [0, 1] of shape `(n, channels, size, size)` with their labels. A registered dataset is as
        its function makes it, and takes no options.

    Raises:
        DataError: The name is unknown, an option is not one of the dataset's, or its files are missing or
            damaged.

    >>> load("mnist-sample", channels=1).spec.shape
    (1, 32, 32)
    """
    if name in _REGISTERED:
        return _built(name, {"root": root, "size": size, "channels": channels, "dicom": dicom})
    entry = entry_of(name)
    loader: Callable[..., Dataset] = entry.load
    if dicom is not None:
        if not entry.reads_dicom:
            raise DataError(f"data.dicom: expected none, because {name!r} has no DICOM files. Leave it out.")
        loader = partial(loader, dicom=dicom)
    return loader(
        default_root() if root is None else Path(root),
        size=entry.size if size is None else size,
        channels=3 if channels is None else channels,
    )
