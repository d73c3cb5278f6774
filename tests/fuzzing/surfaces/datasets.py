"""Files of datasets: IDX, CIFAR's binary version, folders of images, packages of registries."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from unittest import mock

from PIL import Image

from fedkl import data as datasets
from fedkl.data import cifar10, cifar100, fetch, idx
from fedkl.data.cifar import BinaryFile
from tests.data.dicom_files import (
    BIG,
    IMPLICIT,
    JPEG,
    JPEG_2000,
    RUNS,
    dicom,
    element,
    encapsulated,
    item,
    words,
)
from tests.fuzzing.archive import packed, unpacked
from tests.fuzzing.binaries import packed_tar
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import ArchiveSurface

_SIDE = 8
_CHOICE = "dataset"  # the file that says how the others are read
_ARCHIVE = "package.tgz"
_FORMATS = {
    "a.png": "PNG",
    "b.jpg": "JPEG",
    "c.gif": "GIF",
    "d.tif": "TIFF",
    "e.bmp": "BMP",
    "f.webp": "WEBP",
}


class Datasets(ArchiveSurface):
    """`data.load`, after which all images are read, and `data.fetch` from a package."""

    name = "datasets"
    quick = 150
    target = "fedkl.data.load"

    def setting(self) -> AbstractContextManager[object]:
        """Files of one image where the real ones have thousands; the package is already there."""
        stack = ExitStack()
        one = {
            "_TRAIN": BinaryFile(name="train.bin", images=1),
            "_TEST": BinaryFile(name="test.bin", images=1),
        }
        stack.enter_context(mock.patch.multiple(cifar100, **one))
        stack.enter_context(mock.patch.multiple(cifar10, _PER_FILE=1, npm_pack=self._pack))
        return stack

    def __init__(self) -> None:
        self._package = b""

    def seeds(self) -> list[bytes]:
        """Every format once, plain or packed."""
        plain = _idx()
        zipped = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in plain.items()}
        record = bytes(range(256)) * 12
        ten = {f"data_batch_{n}.bin": b"\3" + record for n in range(1, 6)} | {
            "test_batch.bin": b"\4" + record
        }
        hundred = {"train.bin": b"\3\x63" + record, "test.bin.gz": gzip.compress(b"\4\5" + record, mtime=0)}
        seeds = [("mnist", plain), ("fashion-mnist", zipped), ("cifar10", ten), ("cifar100", hundred)]
        seeds += [("imagefolder", _images()), ("npm", {_ARCHIVE: _package()})]
        if importlib.util.find_spec("pydicom") is not None:  # of the extra dicom
            seeds += [("imagefolder", files) for files in _scans()]
        return [_seed(name, files) for name, files in seeds]

    def form_of(self, name: str) -> str:
        """By the kind of file."""
        return "choice" if name == _CHOICE else super().form_of(name)

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Loads the dataset that the input names."""
        files = unpacked(data)
        name = files.pop(_CHOICE, b"mnist").decode("latin1").strip()
        if name == "npm":
            self._package = files.get(_ARCHIVE, b"")
            fetch("cifar10", root=sandbox.place, sources=[cifar10.PngSource()])
            return
        sandbox.write({f"{name}/{file}": content for file, content in files.items()})
        loaded = datasets.load(name, root=sandbox.place, size=_SIDE)
        loaded.train_images[:]
        loaded.test_images[:]

    def _pack(self, package: str, *, folder: Path) -> Path:
        path = folder / _ARCHIVE
        path.write_bytes(self._package)
        return path


def _seed(name: str, files: dict[str, bytes]) -> bytes:
    return packed({_CHOICE: name.encode(), **files})


def _idx() -> dict[str, bytes]:
    pixels = bytes(range(256)) * 7
    return {
        idx.TRAIN_IMAGES: _header(3, 2, 28, 28) + pixels[:1568],
        idx.TRAIN_LABELS: _header(1, 2) + bytes([5, 9]),
        idx.TEST_IMAGES: _header(3, 1, 28, 28) + pixels[:784],
        idx.TEST_LABELS: _header(1, 1) + bytes([7]),
    }


def _header(ndim: int, *dims: int) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in (0x800 + ndim, *dims))


def _images() -> dict[str, bytes]:
    files = {f"train/{label}/{name}": _image(name) for label in ("cat", "dog") for name in _FORMATS}
    files["val/cat/g.png"] = _image("g.png", mode="P")
    files["val/dog/h.png"] = _image("h.png", mode="LA")
    return files


def _scans() -> list[dict[str, bytes]]:
    """DICOM in every encoding that is read, with what pixels are shown through; one or two in a folder."""
    gray, jpeg, twice = bytes(range(32)), io.BytesIO(), io.BytesIO()
    Image.linear_gradient("L").resize((4, 4)).save(jpeg, "JPEG")
    Image.linear_gradient("L").resize((4, 4)).save(twice, "JPEG2000", no_jp2=True)
    runs = words(2, 64, 64 + 17, *[0] * 13, kind="I") + 2 * (bytes([15]) + gray[:16])
    table = item(element(0x00283002, "US", (2, 0, 8)) + element(0x00283006, "OW", (0, 255)))
    window = [(0x00281050, "DS", "40\\7"), (0x00281051, "DS", "400\\9"), (0x00281052, "DS", "-9")]
    window += [(0x00281053, "DS", "2 "), (0x00280008, "IS", "1 ")]
    colors = [(0x00281101 + n, "US", (16, 0, 16)) for n in range(3)]
    colors += [(0x00281201 + n, "OW", tuple(range(0, 65536, 4096))) for n in range(3)]
    scans = [
        dicom(gray, more=window, stored=12, signed=True),
        dicom(gray, more=[(0x00283010, "SQ", table)], photometric="MONOCHROME1"),
        dicom(gray, syntax=BIG),
        dicom(bytes(48), samples=3, photometric="YBR_FULL", bits=8, vr="OB"),
        dicom(bytes(16), photometric="PALETTE COLOR", bits=8, more=colors, syntax=IMPLICIT),
        dicom(encapsulated(runs), syntax=RUNS),
        dicom(encapsulated(jpeg.getvalue()), syntax=JPEG, bits=8),
        dicom(encapsulated(twice.getvalue()), syntax=JPEG_2000, bits=8),
    ]
    pairs = zip(scans[::2], scans[1::2], strict=True)
    return [{"train/ill/a.dcm": a, "train/well/b.dcm": b, "val/ill/c.dcm": a} for a, b in pairs]


def _image(name: str, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    image = Image.linear_gradient("L").resize((9, 7)).convert("LA" if mode == "LA" else "RGB")
    image.convert(mode).save(stream, format=_FORMATS.get(name, "PNG"))
    return stream.getvalue()


def _package() -> bytes:
    """The npm package, of one image in each file."""
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((1024, 1)).convert("RGB").save(stream, format="PNG")
    pictures = [f"data_batch_{number}.png" for number in range(1, 6)] + ["test_batch.png"]
    files = {
        "package/train_lables.json": json.dumps([1, 2, 3, 4, 5]).encode(),
        "package/test_lables.json": b"[7]",
    }
    return packed_tar(files | {f"package/{name}": stream.getvalue() for name in pictures})
