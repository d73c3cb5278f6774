"""What an experiment is about: the images and the networks that its configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkl import data, models
from fedkl.config import AttackConfig, DataConfig, ModelConfig, TrainConfig
from fedkl.data import Dataset, Subset
from fedkl.defenses import Defense
from fedkl.errors import ConfigError, DataError
from fedkl.modelfile import read_tensors
from fedkl.runs import RunDirectory, is_run
from fedkl.update import TensorSpec, check_tensors

_MAX_WEIGHTS = 2**32  # bytes of a file
_DECODED = 2**30  # bytes of images of a folder that are decoded once, and not for each epoch


def dataset_of(config: DataConfig) -> Dataset:
    """What an experiment trains on and attacks.

    Raises:
        DataError: It is not there, or has fewer images than are asked for.
    """
    dataset = data.load(
        config.name, root=config.root, size=config.size, channels=config.channels, dicom=config.dicom
    )
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
        large = getattr(images, "streams", False) and 4 * wanted * prod(images.shape[1:]) > _DECODED
        some = Subset(images, slice(wanted)) if large else images[:wanted]
        kept |= {f"{part}_images": some, f"{part}_labels": labels[:wanted]}
    return replace(dataset, **kept)


def prepared(defense: Defense, *, config: TrainConfig | AttackConfig, dataset: Dataset) -> Defense:
    """A defense that knows the images' shape and whether the experiment's networks were trained.

    Of a training whose clients kept norms to themselves, the run has no trained γ and β for a lock to keep.
    """
    defense, weights = defense.for_images(dataset.spec.shape), config.model.weights
    if weights is None or (is_run(Path(weights)) and _training_at(Path(weights)).defense.keeps_tensors):
        return defense.for_untrained()
    return defense


def networks_of(config: TrainConfig | AttackConfig, dataset: Dataset) -> Callable[[int], nn.Module]:
    """Builds the plain networks of an experiment, by what is added to its seed.

    With `ModelConfig.weights` there is one network, the same object for every number. What the clients of a
    locked training kept to themselves is not in its run directory but in their own, encrypted checkpoints:
    such tensors are those of an untrained network, and a defense draws private ones as it always does.

    Raises:
        ConfigError: The weights cannot be read, or are of another network.
    """
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

    if config.model.weights is None:
        return build
    model = build(0)
    _load_(model, Path(config.model.weights), config.model, dataset)
    return lambda offset: model


def _load_(model: nn.Module, place: Path, config: ModelConfig, dataset: Dataset) -> None:
    """Puts trained weights into a plain network."""
    expected: Mapping[str, Tensor] = model.state_dict()
    if is_run(place):
        expected = _sent_by(place, model, config, dataset)
        place = place / "global.safetensors"
    tensors, _ = read_tensors(
        place,
        limit=_MAX_WEIGHTS,
        problem=f"model.weights: {place} cannot be read",
        remedy="Give the run directory of a finished training, or a safetensors file.",
    )
    check_tensors(
        tensors,
        {name: TensorSpec.of(tensor) for name, tensor in expected.items()},
        subject=f"model.weights: {place} does not fit {config.name} on {dataset.spec.name}.",
        remedy="Name the model and the data that it was trained with.",
        error=ConfigError,
    )
    own = model.state_dict()
    foreign = sorted(tensors.keys() - own.keys())
    if foreign:
        raise ConfigError(
            f"model.weights: the training at {place} sent '{foreign[0]}', which the plain network does not "
            "have. Train without share_statistics."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _sent_by(place: Path, model: nn.Module, config: ModelConfig, dataset: Dataset) -> dict[str, Tensor]:
    """What the clients of a training sent: tensors of the right names and shapes."""
    run = _training_at(place)
    if (run.model.name, run.model.standardize) != (config.name, config.standardize):
        raise ConfigError(
            f"model.weights: {place} trained {run.model.name}, standardize = {run.model.standardize}; "
            f"this experiment has {config.name}, {config.standardize}. Set model.name and model.standardize."
        )
    return prepared(run.defense, config=run, dataset=dataset).prepare(model).public_state()


def _training_at(place: Path) -> TrainConfig:
    run = RunDirectory.open(place).config
    if not isinstance(run, TrainConfig):
        raise ConfigError(
            f"model.weights: {place} is no training, but '{run.type}'. Give one of fedkl train."
        )
    return run
