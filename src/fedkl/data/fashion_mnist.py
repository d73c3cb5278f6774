"""Fashion-MNIST: 60,000 training and 10,000 test images of clothing, in MNIST's form.

Source: Xiao, Rasul, Vollgraf 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms".
"""

from __future__ import annotations

import os
from pathlib import Path

from fedkl.data import idx
from fedkl.data.base import Dataset, fetch_remedy
from fedkl.data.packages import DebianSource
from fedkl.data.sources import DatasetEntry, FileRecord, UrlSource

_NAME = "fashion-mnist"


def load_fashion_mnist(root: str | os.PathLike[str], *, size: int = 32, channels: int = 3) -> Dataset:
    """Loads Fashion-MNIST from its four IDX files, plain or gzipped; see `load_mnist`.

    Args:
        root: The data root, with the files in its folder `fashion-mnist`, where `fetch` puts them. The folder
            of the files itself will not do: they are called as MNIST's are.
        size: Height and width of the delivered images, in pixels.
        channels: Number of identical channels (a stride-0 view; clone before writing).

    Returns:
        Images in [0, 1] of shape `(n, channels, size, size)`, labels in 0 .. 9.

    Raises:
        DataError: Files are missing or damaged, or `size` or `channels` is below 1.
    """
    root = Path(root)
    remedy = fetch_remedy(root, name=_NAME)
    return idx.dataset_from_idx(root / _NAME, name=_NAME, size=size, channels=channels, remedy=remedy)


ENTRY = DatasetEntry(
    info="clothing, 60,000 + 10,000 gray images of 28×28, 10 classes",
    load=load_fashion_mnist,
    files={
        idx.TRAIN_IMAGES: FileRecord(size=47_040_016, md5="f4a8712d7a061bf5bd6d2ca38dc4d50a"),
        idx.TRAIN_LABELS: FileRecord(size=60_008, md5="9018921c3c673c538a1fc5bad174d6f9"),
        idx.TEST_IMAGES: FileRecord(size=7_840_016, md5="8181f5470baa50b63fa0f6fddb340f0a"),
        idx.TEST_LABELS: FileRecord(size=10_008, md5="15d484375f8d13e6eb1aabb0c3f46965"),
    },
    sources=(
        UrlSource("https://fashion-mnist.s3.eu-central-1.amazonaws.com/"),
        DebianSource(package="dataset-fashion-mnist", folder="usr/share/datasets/fashion-mnist"),
    ),
)
