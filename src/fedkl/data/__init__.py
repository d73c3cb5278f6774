"""Datasets by name, fetched with checks, delivered as images in [0, 1], and split among clients."""

from fedkl.data.base import Dataset, DataSpec, default_root
from fedkl.data.fetch import fetch
from fedkl.data.mnist import load_mnist
from fedkl.data.partition import partition_iid
from fedkl.data.registry import DATASETS, load
from fedkl.data.sample import load_mnist_sample

__all__ = [
    "DATASETS",
    "DataSpec",
    "Dataset",
    "default_root",
    "fetch",
    "load",
    "load_mnist",
    "load_mnist_sample",
    "partition_iid",
]
