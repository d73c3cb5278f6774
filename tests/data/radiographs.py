"""Time and memory of one radiograph: `python -m tests.data.radiographs`, rows of docs/large-data.md."""

import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.dicom_files import JPEG, JPEG_2000, RUNS, dicom, encapsulated, words

WIDTH, HEIGHT = 3000, 2000
MEASURE = """
import sys, time
from pathlib import Path
import torch
from fedkl.data import FolderImages

torch.set_num_threads(1)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
warm, name = sys.argv[1:]
FolderImages([warm], size=224)[:]  # imports
before, start = peak(), time.perf_counter()
FolderImages([name] * 8, size=224, channels=1, workers=1)[:]
print((time.perf_counter() - start) / 8, peak() - before)
"""


def levels(width=WIDTH, height=HEIGHT):
    """Something like a radiograph of 12 bits: smooth, with noise."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    noise = np.random.default_rng(0).normal(0, 10, (height, width))
    return np.clip(3500 * np.exp(-(x**2) - y**2) + noise, 0, 4095).astype(np.uint16)


def _saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _runs(pixels):
    """Literal runs, as noise gives them."""
    parts = []
    for plane in ((pixels >> 8).astype(np.uint8).tobytes(), (pixels & 255).astype(np.uint8).tobytes()):
        parts.append(b"".join(bytes([127]) + plane[at : at + 128] for at in range(0, len(plane), 128)))
    return words(2, 64, 64 + len(parts[0]), *[0] * 13, kind="I") + b"".join(parts)


def files():
    """Names and contents."""
    pixels = levels()
    gray, small = Image.fromarray(pixels * 16), Image.fromarray((pixels >> 4).astype(np.uint8))
    about = {"size": (WIDTH, HEIGHT), "stored": 12}
    jpeg = encapsulated(_saved(small, "JPEG", quality=90))
    jpeg_2000 = _saved(Image.fromarray(pixels), "JPEG2000", no_jp2=True)
    return {
        "JPEG, 8 bits": ("a.jpg", _saved(small, "JPEG", quality=90)),
        "PNG, 8 bits": ("b.png", _saved(small, "PNG")),
        "PNG, 16 bits": ("c.png", _saved(gray, "PNG")),
        "TIFF, 16 bits": ("d.tif", _saved(gray, "TIFF")),
        "DICOM, not compressed": ("e.dcm", dicom(pixels.tobytes(), **about)),
        "DICOM, run lengths": ("f.dcm", dicom(encapsulated(_runs(pixels)), syntax=RUNS, **about)),
        "DICOM, JPEG, 8 bits": ("g.dcm", dicom(jpeg, syntax=JPEG, size=(WIDTH, HEIGHT), bits=8, vr="OB")),
        "DICOM, JPEG 2000": ("h.dcm", dicom(encapsulated(jpeg_2000), syntax=JPEG_2000, **about)),
    }


def main() -> None:
    """Prints a row for each: eight times the same on one thread, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm.dcm"
        warm.write_bytes(dicom(bytes(32)))
        for name, (file, content) in files().items():
            path = Path(folder) / file
            path.write_bytes(content)
            command = [sys.executable, "-c", MEASURE, warm, path]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, memory = map(float, done.stdout.split())
            sys.stdout.write(
                f"| {name} | {len(content) / 1e6:.1f} MB | {seconds:.2f} s | {memory:.0f} MiB |\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
