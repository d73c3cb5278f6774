"""Datasets by name, fetched with checks, delivered as images in [0, 1], split among clients, augmented."""

from fedkl.data.augmentation import AUGMENTATIONS, Augmentation, crop_flip, flip, resized_crop_flip
from fedkl.data.base import Dataset, DataSpec, default_root
from fedkl.data.fetch import fetch
from fedkl.data.folder_images import FolderImages
from fedkl.data.images import Subset, TensorImages, prefetched
from fedkl.data.mnist import load_mnist
from fedkl.data.partition import IID, AnyPartition, Dirichlet, Partition, Shards, class_counts
from fedkl.data.registry import DATASETS, forget_dataset, load, register_dataset
from fedkl.data.sample import load_mnist_sample
from fedkl.data.torch_dataset import as_tensors, from_torch

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "IID",
    "AnyPartition",
    "Augmentation",
    "DataSpec",
    "Dataset",
    "Dirichlet",
    "FolderImages",
    "Partition",
    "Shards",
    "Subset",
    "TensorImages",
    "as_tensors",
    "class_counts",
    "crop_flip",
    "default_root",
    "fetch",
    "flip",
    "forget_dataset",
    "from_torch",
    "load",
    "load_mnist",
    "load_mnist_sample",
    "prefetched",
    "register_dataset",
    "resized_crop_flip",
]
