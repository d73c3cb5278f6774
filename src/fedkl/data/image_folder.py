"""Any images in folders by class, ILSVRC2012 among them: `train/<class>/…`, and `val/…` or `test/…` alike."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from fedkl.data import dicom as dicom_files
from fedkl.data.base import Dataset, DataSpec, default_root, mixed, readable
from fedkl.data.folder_images import FolderImages
from fedkl.data.messages import place, told
from fedkl.data.sources import DatasetEntry
from fedkl.errors import DataError, gathered

_NAME = "imagefolder"
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"} | {
    *dicom_files.SUFFIXES
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GRAY_MEAN, _GRAY_STD = (0.459,), (0.226,)  # luma of the means; the mean of the deviations
_SHOWN = 10
_ILSVRC = re.compile(r"\bn\d{8}\b|ILSVRC2012")  # its class folders, and names of its files


def load_image_folder(
    root: str | os.PathLike[str],
    *,
    size: int = 224,
    channels: int = 3,
    dicom: dicom_files.Values = "window",
) -> Dataset:
    """Loads images in folders by class; only names are read now, the files when a batch is asked for.

    Classes are numbered in the order of the sorted folder names of `train`; for ILSVRC2012 that is the usual
    order of WordNet ids. Names that begin with a dot are skipped. Images come in an order of their own, the
    same each time: the first ones, which attacks take and which stand for fewer, are of all classes. Mean and
    standard deviation in the spec are ImageNet's, as is usual for photographs, and not computed from these
    images; in gray those of its luma.

    Args:
        root: The data root, with the images in its folder `imagefolder`, or that folder itself.
        size: Height and width of the delivered images, in pixels; see `FolderImages`.
        channels: 3, in which gray is repeated, or 1, in which color becomes gray.
        dicom: What is black and white in gray DICOM files; see `FolderImages`.

    Returns:
        `FolderImages` of shape `(n, channels, size, size)` with their labels.

    Raises:
        DataError: A folder is missing or empty, `val` has a class that `train` lacks, a file is no image, or
            `size` or `channels` is not possible; files and folders (the first ten) are named.
    """
    if size < 1 or channels not in (1, 3):
        raise DataError(
            f"Dataset {_NAME!r}: expected size ≥ 1 and channels 1 (gray) or 3 (RGB), got size={size}, "
            f"channels={channels}."
        )
    root = Path(root)
    problems: list[str] = []
    with readable(root):
        folder = _folder_in(root)
        held_out = next(
            (folder / part for part in ("val", "test") if (folder / part).is_dir()), folder / "val"
        )
        train = _files_by_class(folder / "train", problems)
        test = _files_by_class(held_out, problems)
    problems += [
        f"{place(held_out / name)}: expected a class that train has" for name in test if name not in train
    ]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise DataError(
            gathered(
                f"Cannot load the dataset {_NAME!r}.",
                problems[:_SHOWN] + more,
                _remedy(folder, [*train, *problems]),
            )
        )
    numbers = {name: number for number, name in enumerate(train)}
    mean, std = (_MEAN, _STD) if channels == 3 else (_GRAY_MEAN, _GRAY_STD)
    spec = DataSpec(name=_NAME, shape=(channels, size, size), classes=len(train), mean=mean, std=std)
    options = partial(FolderImages, size=size, channels=channels, dicom=dicom)
    (train_files, train_labels), (test_files, test_labels) = (_mixed(part, numbers) for part in (train, test))
    return Dataset(
        spec,
        train_images=options(train_files),
        train_labels=train_labels,
        test_images=options(test_files),
        test_labels=test_labels,
    )


def _folder_in(root: Path) -> Path:
    """Where the images are, or should be: the root of all datasets has a folder for them."""
    if (root / _NAME).is_dir():
        return root / _NAME
    with contextlib.suppress(DataError):
        return root / _NAME if root == default_root() and not (root / "train").is_dir() else root
    return root


def _files_by_class(folder: Path, problems: list[str]) -> dict[str, list[str]]:
    """Paths of the image files of each class, both sorted; what is wrong goes to `problems`."""
    if not folder.is_dir():
        problems.append(f"{place(folder)}: expected a folder with a folder for each class, found none")
        return {}
    entries = _entries(folder)
    loose = [entry.path for entry in entries if _kind(entry) != "a folder"]
    if loose:
        problems.append(
            f"{place(loose[0])}: expected only a folder for each class in {place(folder)}, got {len(loose)} "
            "files"
        )
    classes = {
        entry.name: _image_files(entry.path, problems) for entry in entries if _kind(entry) == "a folder"
    }
    if not classes and not loose:
        problems.append(f"{place(folder)}: expected a folder for each class, got an empty folder")
    return classes


def _image_files(folder: str, problems: list[str]) -> list[str]:
    entries = _entries(folder)
    problems += [
        f"{place(entry.path)}: expected an image file ({', '.join(sorted(_SUFFIXES))}), got "
        f"{'a folder' if _kind(entry) == 'a folder' else 'another kind of file'}"
        for entry in entries
        if _kind(entry) != "a file" or Path(entry.name).suffix.lower() not in _SUFFIXES
    ]
    if not entries:
        problems.append(f"{place(folder)}: expected images of this class, got an empty folder")
    return [entry.path for entry in entries]


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            visible = [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"{place(folder)}: expected a readable folder, got {told(error)}. Correct its permissions."
        ) from error
    return sorted(visible, key=lambda entry: entry.name)


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        return "a folder" if entry.is_dir() else "a file" if entry.is_file() else "something else"
    except OSError:  # e.g. a link that leads back to itself
        return "something else"


def _remedy(folder: Path, found: Sequence[str]) -> str:
    root = place(folder)
    text = (
        f"Arrange the images as {root}/train/<class>/<image> and {root}/val/<class>/<image> (or test/): one "
        "folder for each class, those to test on in val. Nothing is divided for you."
    )
    if any(_ILSVRC.search(text) for text in found):
        text += (
            " The validation images of ILSVRC2012 come without class folders: move each into that of its "
            "WordNet id, which is in LOC_val_solution.csv (Kaggle) or in the development kit."
        )
    return text


def _mixed(files: dict[str, list[str]], numbers: dict[str, int]) -> tuple[list[str], torch.Tensor]:
    """The files of all classes, and their labels, in an order that is the same each time."""
    every = [file for names in files.values() for file in names]
    counts = torch.tensor([len(names) for names in files.values()])
    labels = torch.tensor([numbers[name] for name in files]).repeat_interleave(counts)
    order = mixed(labels)
    return [every[place] for place in order.tolist()], labels[order]


ENTRY = DatasetEntry(
    info="your own images in folders by class, ILSVRC2012 among them; read from disk batch by batch",
    load=load_image_folder,
    size=224,
    reads_dicom=True,
    unfetched="is made of your own files. Put them into <root>/imagefolder/train/<class>/ and "
    "<root>/imagefolder/val/<class>/.",
)
