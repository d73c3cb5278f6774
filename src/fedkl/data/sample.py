"""A sample of real MNIST that travels inside the package, so that demo and tests need no download."""

from __future__ import annotations

from pathlib import Path

from fedkl.data.base import Dataset
from fedkl.data.idx import dataset_from_idx
from fedkl.data.sources import DatasetEntry

_FOLDER = Path(__file__).with_name("mnist_sample")


def load_mnist_sample(*, size: int = 32, channels: int = 3) -> Dataset:
    """Loads the first 2,000 training and the first 500 test images of MNIST.

    Mean and standard deviation in the spec are those of the sample, not of the full set.

    Args:
        size: Height and width of the delivered images, in pixels.
        channels: Number of identical channels (a stride-0 view; clone before writing).

    Returns:
        Images in [0, 1] of shape `(n, channels, size, size)`, labels in 0 .. 9.

    Raises:
        DataError: The installed package is damaged, or `size` or `channels` is below 1.

    >>> load_mnist_sample()
    Dataset('mnist-sample', train=2000, test=500, shape=(3, 32, 32), classes=10)
    """
    remedy = "These files travel inside the package: reinstall fedkl."
    return dataset_from_idx(_FOLDER, name="mnist-sample", size=size, channels=channels, remedy=remedy)


def _load(root: Path, /, *, size: int, channels: int) -> Dataset:
    return load_mnist_sample(size=size, channels=channels)


ENTRY = DatasetEntry(
    info="the first 2,000 + 500 images of MNIST, inside the package",
    load=_load,
    unfetched="travels inside the package. Load it as it is: fedkl.data.load('mnist-sample').",
)
