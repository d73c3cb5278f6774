"""CIFAR-100: 50,000 training and 10,000 test photographs of 32×32 pixels in a hundred (fine) classes.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

from __future__ import annotations

import os
from pathlib import Path

from fedkl.data.base import Dataset, fetch_remedy, folder_with
from fedkl.data.cifar import BinaryFile, Layout, dataset_from_binary
from fedkl.data.packages import TarSource
from fedkl.data.sources import DatasetEntry, FileRecord

_NAME = "cifar100"
_UNPACKED = "cifar-100-binary"
_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
_TRAIN = BinaryFile(name="train.bin", images=50_000)
_TEST = BinaryFile(name="test.bin", images=10_000)


def load_cifar100(root: str | os.PathLike[str], *, size: int = 32, channels: int = 3) -> Dataset:
    """Loads CIFAR-100 with its fine labels from the two files of its binary version, plain or gzipped.

    Args:
        root: The data root, with the files in its folder `cifar100` (where `fetch` puts them) or
            `cifar-100-binary` (inside it or not), or the folder of the files itself.
        size: Height and width of the delivered images, in pixels; other than 32: resized on access.
        channels: 3.

    Returns:
        `TensorImages` of shape `(n, 3, size, size)`, held as bytes (184 MB in all), labels in 0 .. 99.

    Raises:
        DataError: Files are missing or damaged, or `size` is below 1.
    """
    root = Path(root)
    folder = folder_with(root, name=_NAME, files=ENTRY.files, unpacked=_UNPACKED)
    layout = Layout(name=_NAME, train=(_TRAIN,), test=(_TEST,), classes=(20, 100))
    remedy = (
        f"{fetch_remedy(root, name=_NAME)} Without network: unpack {_URL} there (the binary version; the "
        "python version holds pickles, which fedkl never reads)."
    )
    return dataset_from_binary(folder, layout, size=size, channels=channels, remedy=remedy)


ENTRY = DatasetEntry(
    info="photographs, 50,000 + 10,000 color images of 32×32, 100 classes",
    load=load_cifar100,
    files={
        _TRAIN.name: FileRecord(size=153_700_000, md5="6172c7755cfe09b2fe270c85cebc1b15"),
        _TEST.name: FileRecord(size=30_740_000, md5="4499cfba6c016c1be1438163640a0898"),
    },
    sources=(TarSource(_URL, folder=_UNPACKED),),
)
