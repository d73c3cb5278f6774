import gzip
import struct

import pytest
from PIL import Image

from fedkl.data import idx


def idx_bytes(array_bytes, *dims, kind=0x08):
    return struct.pack(f">{1 + len(dims)}I", (kind << 8) + len(dims), *dims) + array_bytes


@pytest.fixture
def files():
    """Six training and three test images, as the contents of the four files."""
    pixels = bytes(range(256)) * 28
    return {
        idx.TRAIN_IMAGES: idx_bytes(pixels[: 6 * 784], 6, 28, 28),
        idx.TRAIN_LABELS: idx_bytes(bytes([5, 0, 4, 1, 9, 2]), 6),
        idx.TEST_IMAGES: idx_bytes(pixels[: 3 * 784], 3, 28, 28),
        idx.TEST_LABELS: idx_bytes(bytes([7, 2, 1]), 3),
    }


@pytest.fixture
def put(tmp_path):
    """Writes files into `<root>/mnist` and returns the root."""

    def _put(contents, *, packed=False):
        folder = tmp_path / "mnist"
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (folder / name).write_bytes(content)
        return tmp_path

    return _put


@pytest.fixture
def image_files(tmp_path):
    """Five PNGs of different sizes, each of one gray of its own."""
    sizes = [(9, 9), (20, 8), (8, 20), (40, 33), (3, 5)]
    paths = []
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", size, (number * 10,) * 3).save(paths[-1])
    return paths
