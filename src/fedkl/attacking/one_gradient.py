"""What a server has of one client, from a network and images at hand: for notebooks and first looks."""

from __future__ import annotations

import torch
from torch import nn

from fedkl.attacking.observing import Trial, observe
from fedkl.data.base import label_problems
from fedkl.data.images import in_unit_range
from fedkl.defenses import Arm, Defense, NoDefense
from fedkl.errors import DataError, gathered
from fedkl.protocol import Knowledge, Observation
from fedkl.types import ImageBatch, Labels


def observe_gradient(
    model: nn.Module,
    images: ImageBatch,
    labels: Labels,
    *,
    classes: int,
    defense: Defense | None = None,
    knowledge: Knowledge | None = None,
    generator: torch.Generator | None = None,
) -> Observation:
    """What a server has of a new client that sends one gradient.

    The client draws its secrets from the operating system; what the server was not granted of them, it draws
    for itself.

    Args:
        model: The plain network, which the server knows; not changed.
        images: The client's, in [0, 1]; shape ``(batch, channels, height, width)``.
        labels: Theirs; shape ``(batch,)``.
        classes: Number of classes.
        defense: What the client does against a curious server; None: nothing.
        knowledge: What the server is granted beyond the public; None: the labels, and which defense it is.
        generator: The attacker's, of what it draws; None: the operating system's.

    Returns:
        What attacks take.

    Raises:
        DataError: Images and labels do not fit together, or are out of range.

    >>> from fedkl.attacks import LinearRows
    >>> images, labels = torch.rand(1, 1, 8, 8), torch.tensor([3])
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> seen = observe_gradient(model, images, labels, classes=10)
    >>> found = LinearRows().reconstruct(seen, generator=torch.Generator())
    >>> torch.allclose(found.pictures.float(), images, atol=1e-3)
    True
    """
    _check(images, labels, classes)
    used = (defense or NoDefense()).for_images((images.shape[1], images.shape[2], images.shape[3]))
    arm = Arm(
        name=used.type,
        description=used.describe(),
        defense=used,
        knowledge=knowledge or Knowledge(),
    )
    trial = Trial(index=0, places=tuple(range(len(images))), images=images, labels=labels)
    return observe(
        used.prepare(model), arm=arm, model=model, trial=trial, classes=classes, generator=generator
    )


def _check(images: torch.Tensor, labels: torch.Tensor, classes: int) -> None:
    problems = label_problems("labels", labels, images=images, classes=classes)
    if images.ndim != 4:
        shape = tuple(images.shape)
        problems.append(f"images: expected shape (batch, channels, height, width), got {shape}")
    elif not images.is_floating_point() or not in_unit_range(images):
        problems.append(f"images: expected floats in [0, 1], got {images.dtype} or others")
    if problems:
        remedy = "Divide images by what means white; give image[None] for one, and the number of classes."
        raise DataError(gathered("observe_gradient: images and labels do not fit.", problems, remedy))
