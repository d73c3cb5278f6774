"""How well a global model does, from what it gets right of each class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from fedkl.metrics import class_accuracies
from fedkl.types import Images, Labels


@dataclass(frozen=True, kw_only=True, eq=False)
class TestSet:
    """Images that nobody trains on.

    Attributes:
        images: Shape ``(images, channels, height, width)``.
        labels: Shape ``(images,)``.
        classes: Number of classes.
    """

    __test__ = False  # to pytest

    images: Images = field(repr=False)
    labels: Labels = field(repr=False)
    classes: int

    def recalls(self, model: nn.Module) -> Float64[Tensor, " classes"]:
        """The share of each class that a model gets right, in [0, 1]; NaN of a class without images."""
        return class_accuracies(
            model, self.images, self.labels, classes=self.classes, batch_size=_batch_of(self.images)
        )

    def accuracies(self, recalls: Mapping[str, Tensor]) -> dict[str, float]:
        """Accuracy on all images by client, in [0, 1].

        Args:
            recalls: See `recalls`, by client.
        """
        whole = torch.bincount(self.labels, minlength=self.classes).double()
        return weighted(recalls, dict.fromkeys(recalls, whole))


def weighted(recalls: Mapping[str, Tensor], frequencies: Mapping[str, Tensor]) -> dict[str, float]:
    """Accuracy by client on a test set of class frequencies of its own, in [0, 1].

    Classes without test images do not count, nor do clients that have no others.

    Args:
        recalls: The share of each class that a client's model gets right, by client.
        frequencies: Of each class, by client.
    """
    found = {}
    for name, recall in recalls.items():
        known = ~recall.isnan()
        weights = frequencies[name][known]
        if weights.any():
            found[name] = float((recall[known] * weights).sum() / weights.sum())
    return found


def _batch_of(images: Images) -> int:
    """512 images of 32×32 pixels, fewer of larger ones: activations grow with the pixels."""
    return max(1, 512 * 32 * 32 // max(32 * 32, images.shape[-2] * images.shape[-1]))
