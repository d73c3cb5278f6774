"""What an experiment is about: the images and the networks that its configuration names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from fedkl import data, models
from fedkl.config import AttackConfig, DataConfig, TrainConfig
from fedkl.data import Dataset
from fedkl.errors import DataError


def dataset_of(config: DataConfig) -> Dataset:
    """What an experiment trains on and attacks.

    Raises:
        DataError: It is not there, or has fewer images than are asked for.
    """
    dataset = data.load(config.name, root=config.root, size=config.size)
    kept: dict[str, Any] = {}
    for part, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        wanted = getattr(config, f"{part}_images")
        if wanted is None:
            continue
        if wanted > len(images):
            raise DataError(
                f"data.{part}_images: expected at most {len(images)}, the {part} images of {config.name}, "
                f"got {wanted}."
            )
        kept |= {f"{part}_images": images[:wanted], f"{part}_labels": labels[:wanted]}
    return replace(dataset, **kept)


def networks_of(config: TrainConfig | AttackConfig, dataset: Dataset) -> Callable[[int], nn.Module]:
    """Builds the plain networks of an experiment, by what is added to its seed."""
    spec = dataset.spec

    def build(offset: int) -> nn.Module:
        model = models.build_model(
            config.model.name,
            channels=spec.shape[0],
            classes=spec.classes,
            seed=config.seed + offset,
            initialization=config.model.initialization,
            normalization=(spec.mean, spec.std) if config.model.standardize else None,
        )
        return model.to(config.device) if isinstance(config, AttackConfig) else model

    return build
