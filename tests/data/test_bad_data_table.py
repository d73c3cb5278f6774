"""The messages of docs/data-errors.md; `python -m tests.data.test_bad_data_table` prints them anew."""

import gzip
import os
import re
import struct
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from fedkl.data import cifar10, cifar100, idx, load
from fedkl.errors import DataError
from tests.data import dicom_files
from tests.data.test_decoding import png_header, tiled_tiff

PAGE = Path(__file__).parents[2] / "docs" / "data-errors.md"
IMAGES, LABELS = idx.TRAIN_IMAGES, idx.TRAIN_LABELS


def _idx(*dims, kind=0x08):
    return struct.pack(f">{1 + len(dims)}I", (kind << 8) + len(dims), *dims)


def _idx_files():
    return {
        IMAGES: _idx(2, 28, 28) + bytes(2 * 784),
        LABELS: _idx(2) + bytes([5, 0]),
        idx.TEST_IMAGES: _idx(1, 28, 28) + bytes(784),
        idx.TEST_LABELS: _idx(1) + bytes([7]),
    }


def _mnist(**changes):
    """Writes MNIST with changed files; None: without that file."""
    names = {"images": IMAGES, "labels": LABELS, "packed": f"{IMAGES}.gz"}
    contents = _idx_files() | {names[key]: content for key, content in changes.items()}
    if "packed" in changes:
        contents[IMAGES] = None
    return lambda root: _write(root / "mnist", contents)


def _cifar10(content):
    """Writes CIFAR-10 with this as its test file."""
    contents = {f"data_batch_{number}.bin": bytes(2 * 3073) for number in range(1, 6)}
    return lambda root: _write(root / "cifar10", contents | {"test_batch.bin": content})


def _cifar100(content):
    """Writes CIFAR-100 with this as its test file."""
    return lambda root: _write(root / "cifar100", {"train.bin": bytes(2 * 3074), "test.bin": content})


def _write(folder, contents):
    folder.mkdir(parents=True)
    for name, content in contents.items():
        if content is not None:
            (folder / name).write_bytes(content)


def _folder(change):
    def _make(root):
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                place = root / "imagefolder" / split / name
                place.mkdir(parents=True)
                Image.new("RGB", (16, 16)).save(place / "1.jpg")
        change(root / "imagefolder")

    return _make


def _pickled(root):
    (root / "cifar-10-batches-py").mkdir()


def _wide(folder):
    Image.new("I", (4, 4)).save(folder / "train" / "cat" / "0.tif")


def _unscaled(folder):
    Image.new("F", (4, 4), 200).save(folder / "train" / "cat" / "0.tif")


def _dicom(**options):
    content = dicom_files.dicom(**{"pixels": bytes(32)} | options)
    return _folder(lambda at: (at / "train" / "cat" / "0.dcm").write_bytes(content))


def _large(folder):
    (folder / "train" / "cat" / "0.png").write_bytes(png_header(20_000, 20_000))


def _tile(folder):
    (folder / "train" / "cat" / "0.tif").write_bytes(tiled_tiff(16, tile=16384))


def _pipe(folder):
    os.mkfifo(folder / "train" / "cat" / "0.jpg")


def _line(folder):
    (folder / "train" / "cat" / "a\nb.txt").touch()


def _flat(folder):
    _remove(folder / "val")
    _write(folder / "val", {"ILSVRC2012_val_00000001.JPEG": b""})


def _remove(path):
    for file in path.rglob("*.jpg"):
        file.unlink()
    for place in sorted(path.rglob("*"), reverse=True):
        place.rmdir()
    path.rmdir()


def _half(folder):
    file = folder / "train" / "cat" / "1.jpg"
    file.write_bytes(file.read_bytes()[:-100])


CASES = {
    ("mnist", "no file"): lambda root: None,
    ("mnist", "empty file"): _mnist(images=b""),
    ("mnist", "labels in place of images"): _mnist(images=_idx(2) + bytes(100)),
    ("mnist", "another kind of numbers"): _mnist(labels=_idx(2, kind=0x0D) + bytes(8)),
    ("mnist", "another image size"): _mnist(images=_idx(2, 27, 28) + bytes(2 * 27 * 28)),
    ("mnist", "no images"): _mnist(images=_idx(0, 28, 28)),
    ("mnist", "more images than are read"): _mnist(images=_idx(1 << 20, 28, 28)),
    ("mnist", "truncated"): _mnist(images=_idx(2, 28, 28) + bytes(2 * 784 - 1)),
    ("mnist", "too long"): _mnist(labels=_idx(2) + bytes(3)),
    ("mnist", "a label that is none"): _mnist(labels=_idx(2) + bytes([5, 10])),
    ("mnist", "fewer labels than images"): _mnist(labels=_idx(1) + bytes(1)),
    ("mnist", "not gzip"): _mnist(packed=b"<html>"),
    ("mnist", "gzip cut off"): _mnist(packed=gzip.compress(_idx_files()[IMAGES], mtime=0)[:-9]),
    ("cifar10", "no file"): _cifar10(None),
    ("cifar10", "only the python version"): _pickled,
    ("cifar10", "empty file"): _cifar10(b""),
    ("cifar10", "truncated"): _cifar10(bytes(3073)),
    ("cifar10", "too long"): _cifar10(bytes(2 * 3073 + 1)),
    ("cifar10", "a label that is none"): _cifar10(bytes([10]) + bytes(2 * 3073 - 1)),
    ("cifar100", "no file"): lambda root: None,
    ("cifar100", "truncated"): _cifar100(bytes(2 * 3074 - 1)),
    ("cifar100", "a coarse label that is none"): _cifar100(bytes([20, 0]) + bytes(2 * 3074 - 2)),
    ("cifar100", "a fine label that is none"): _cifar100(bytes([0, 100]) + bytes(2 * 3074 - 2)),
    ("imagefolder", "no folder"): lambda root: None,
    ("imagefolder", "no class folders"): _folder(lambda at: _remove(at / "val") or (at / "val").mkdir()),
    ("imagefolder", "images without class folders"): _folder(_flat),
    ("imagefolder", "an empty class"): _folder(lambda at: (at / "train" / "emu").mkdir()),
    ("imagefolder", "a class that train lacks"): _folder(lambda at: (at / "val/cat").rename(at / "val/emu")),
    ("imagefolder", "not an image file"): _folder(lambda at: (at / "train/cat/notes.txt").touch()),
    ("imagefolder", "a folder among the images"): _folder(lambda at: (at / "train/cat/more.jpg").mkdir()),
    ("imagefolder", "empty file"): _folder(lambda at: (at / "train/cat/0.jpg").touch()),
    ("imagefolder", "text called .jpg"): _folder(lambda at: (at / "train/cat/0.jpg").write_text("<html>")),
    ("imagefolder", "truncated"): _folder(_half),
    ("imagefolder", "signed, or 32 bits"): _folder(_wide),
    ("imagefolder", "floats beyond 1"): _folder(_unscaled),
    ("imagefolder", "too many pixels"): _folder(_large),
    ("imagefolder", "a TIFF with an enormous tile"): _folder(_tile),
    ("imagefolder", "a pipe called .jpg"): _folder(_pipe),
    ("imagefolder", "a line break in a name"): _folder(_line),
    ("imagefolder", "DICOM of several frames"): _dicom(more=[(0x00280008, "IS", "30")]),
    ("imagefolder", "DICOM in lossless JPEG"): _dicom(syntax=dicom_files.JPEG_LOSSLESS),
    ("imagefolder", "DICOM deflated"): _dicom(syntax=dicom_files.DEFLATED),
    ("imagefolder", "DICOM, truncated"): _dicom(pixels=bytes(30)),
    ("imagefolder", "DICOM of floats, or of masks of bits"): _dicom(bits=1),
    ("imagefolder", "DICOM, color of fewer bits"): _dicom(
        pixels=bytes(48), samples=3, photometric="RGB", bits=8, stored=7
    ),
    ("imagefolder", "DICOM, damaged"): _dicom(
        pixels=dicom_files.encapsulated(b"junk"), bits=8, syntax=dicom_files.JPEG
    ),
    ("imagefolder", "text called .dcm"): _folder(lambda at: (at / "train/cat/0.dcm").write_text("<html>")),
}


@contextmanager
def _bad(case):
    few = (
        patch.object(cifar10, "_PER_FILE", 2),
        patch.object(cifar100, "_TRAIN", replace(cifar100._TRAIN, images=2)),
        patch.object(cifar100, "_TEST", replace(cifar100._TEST, images=2)),
    )
    with tempfile.TemporaryDirectory() as root, few[0], few[1], few[2]:
        CASES[case](Path(root))
        yield Path(root)


def message_of(case):
    """What loading and reading says, without the root and without the words of other libraries."""
    if "DICOM" in case[1] or ".dcm" in case[1]:
        pytest.importorskip("pydicom", reason="of the extra dicom")
    with _bad(case) as root, pytest.raises(DataError) as caught:
        load(case[0], root=root).train_images[torch.tensor([0])]
    text = str(caught.value).replace(str(root), "ROOT")
    problems = [line[4:] for line in text.splitlines() if line.startswith("  - ")] or [text]
    if case[1] == "only the python version":
        problems = [text.splitlines()[-1]]
    first = re.sub(r"(got (?!ValueError)[A-Z]\w+(?:Error|File)): .*?(?=\. Replace|$)", r"\1: …", problems[0])
    first = re.sub(r"got more \(.*\)", "got more (…)", first)
    return first + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def entry(case):
    message = message_of(case)
    quoted = message if "`" in message else f"`{message}`"
    return f"* {case[1]}: {quoted}"


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_page_shows_what_is_said(case):
    text = PAGE.read_text(encoding="utf-8")
    section = text.partition(f"\n## {case[0]}\n")[2].partition("\n## ")[0]
    assert entry(case) in section.splitlines()


if __name__ == "__main__":
    for dataset in dict.fromkeys(name for name, _ in CASES):
        entries = "\n".join(entry(case) for case in CASES if case[0] == dataset)
        sys.stdout.write(f"## {dataset}\n{entries}\n\n")
