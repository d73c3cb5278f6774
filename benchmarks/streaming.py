"""Peak memory of one pass over a folder of JPEGs; prints the rows of docs/large-data.md."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image

from fedkl.data import load, prefetched


def make(root: Path, *, count: int) -> None:
    """Writes smooth random JPEGs of 500×375 pixels, as large as photographs are."""
    random = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 4)):
        for number in range(images):
            folder = root / split / f"class{number % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.integers(256, size=(15, 20, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def measure(root: str, *, count: int) -> None:
    """Prints one row; in a process of its own, because the peak never falls."""
    torch.set_num_threads(1)
    images = load("imagefolder", root=root).train_images
    before = _peak_mb()
    start = perf_counter()
    for _ in prefetched(images, torch.arange(count).split(64)):
        pass
    speed = count / (perf_counter() - start)
    full = count * 3 * 224 * 224 * 4 / 1e6
    print(f"| {count} | {_peak_mb() - before:.0f} MB | {full:.0f} MB | {speed:.0f} |")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], count=int(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count=4000)
            for number in (256, 1000, 4000):
                subprocess.run([sys.executable, __file__, folder, str(number)], check=True)  # noqa: S603
