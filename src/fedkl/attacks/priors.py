"""What an attacker knows about natural images, as terms that are added to an objective.

Every prior maps an image batch of shape (batch, channels, height, width) to a scalar, differentiably.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from fedkl.types import ImageBatch

Prior = Callable[[Tensor], Tensor]


def weighted(prior: Prior, weight: float) -> Prior | None:
    """A prior times its weight; None for a weight of 0, which costs nothing then."""
    return (lambda images: weight * prior(images)) if weight else None


def outside_box(images: ImageBatch) -> Tensor:
    """Mean squared excess of the pixels over [0, 1]: all that can fix the scale behind a norm."""
    return (F.relu(-images) + F.relu(images - 1)).square().mean()


def total_variation(images: ImageBatch) -> Tensor:
    """Mean absolute difference of neighboring pixels, vertically plus horizontally.

    Source:
        Geiping et al. 2020 (Inverting Gradients), the anisotropic form of their public code.
    """
    vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    horizontal = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    return vertical + horizontal


def squared_variation(images: ImageBatch) -> Tensor:
    """Mean over the batch of ½(Σ vertical² + Σ horizontal²): the smooth form of total variation."""
    vertical = (images[..., 1:, :] - images[..., :-1, :]).square().sum()
    horizontal = (images[..., :, 1:] - images[..., :, :-1]).square().sum()
    return (vertical + horizontal) / (2 * len(images))
