"""Datasets by name. A new one is a new file with an `ENTRY`, and a line in `ENTRIES`."""

from __future__ import annotations

import os
from pathlib import Path

from fedkl.data import cifar10, cifar100, fashion_mnist, image_folder, mnist, sample
from fedkl.data.base import Dataset, default_root
from fedkl.data.sources import Entry
from fedkl.errors import DataError

ENTRIES: dict[str, Entry] = {
    "cifar10": cifar10.ENTRY,
    "cifar100": cifar100.ENTRY,
    "fashion-mnist": fashion_mnist.ENTRY,
    "imagefolder": image_folder.ENTRY,
    "mnist": mnist.ENTRY,
    "mnist-sample": sample.ENTRY,
}

DATASETS: dict[str, str] = {name: entry.info for name, entry in ENTRIES.items()}
"""One line about each dataset, by name."""


def entry_of(name: str) -> Entry:
    """Returns the registry's entry for `name`.

    Raises:
        DataError: There is no such dataset; the message lists the known ones.
    """
    if name not in ENTRIES:
        known = ", ".join(repr(known) for known in sorted(ENTRIES))
        raise DataError(f"Unknown dataset: expected one of {known}, got {name!r}. Choose one of these names.")
    return ENTRIES[name]


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    channels: int | None = None,
) -> Dataset:
    """Loads a dataset by name.

    Args:
        name: One of `DATASETS`.
        root: The data root; `default_root()` by default. A dataset inside the package does not use it.
        size: Height and width of the delivered images, in pixels; None: the dataset's usual size.
        channels: Number of channels of the delivered images; None: 3.

    Returns:
        Images in [0, 1] of shape `(n, channels, size, size)` with their labels.

    Raises:
        DataError: The name is unknown, or the dataset's files are missing or damaged.

    >>> load("mnist-sample", channels=1).spec.shape
    (1, 32, 32)
    """
    entry = entry_of(name)
    return entry.load(
        default_root() if root is None else Path(root),
        size=entry.size if size is None else size,
        channels=3 if channels is None else channels,
    )
