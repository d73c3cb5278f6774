"""Datasets by name. A new one is a new file with an `ENTRY`, and a line in `ENTRIES`."""

from __future__ import annotations

import os
from pathlib import Path

from fedkl.data import mnist, sample
from fedkl.data.base import Dataset, default_root
from fedkl.data.sources import Entry
from fedkl.errors import DataError

ENTRIES: dict[str, Entry] = {
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
    name: str, *, root: str | os.PathLike[str] | None = None, size: int = 32, channels: int = 3
) -> Dataset:
    """Loads a dataset by name.

    Args:
        name: One of `DATASETS`.
        root: The data root; `default_root()` by default. A dataset inside the package does not use it.
        size: Height and width of the delivered images, in pixels.
        channels: Number of channels of the delivered images.

    Returns:
        Images in [0, 1] of shape `(n, channels, size, size)` with their labels.

    Raises:
        DataError: The name is unknown, or the dataset's files are missing or damaged.

    >>> load("mnist-sample", channels=1).spec.shape
    (1, 32, 32)
    """
    entry = entry_of(name)
    return entry.load(default_root() if root is None else Path(root), size=size, channels=channels)
