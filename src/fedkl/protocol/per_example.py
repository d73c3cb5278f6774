"""Gradients of single images, clipped before they are added up: what DP-SGD adds its noise to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkl.errors import ConfigError

_AT_ONCE = 2**26  # numbers in the gradients of single images that are held together


@dataclass(frozen=True, kw_only=True)
class PerExample:
    """What DP-SGD does to the gradient of each batch.

    Attributes:
        clip: C: largest L2 norm of one image's gradient over all trained parameters, private ones included.
        noise_multiplier: z: the sum of the clipped gradients gets N(0, (z · C)²) in every entry.

    Raises:
        ConfigError: A field is out of range.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise ConfigError(f"PerExample: clip: expected a finite value > 0, got {self.clip}.")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(
                f"PerExample: noise_multiplier: expected a finite value ≥ 0, got {self.noise_multiplier}."
            )


def clip_factor(tensors: Mapping[str, Tensor], *, clip: float) -> Tensor:
    """What shortens tensors to an L2 norm of at most `clip`, over all of them together; in [0, 1].

    Args:
        tensors: By name; at least one.
        clip: Above 0.
    """
    # In half precision a norm is half a percent off, and each product is rounded.
    half = [torch.finfo(t.dtype).eps for t in tensors.values() if t.dtype in (torch.float16, torch.bfloat16)]
    wide = [tensor.float() if half else tensor for tensor in tensors.values()]
    squares = torch.stack([tensor.square().sum() for tensor in wide]).sum()
    # The derivative of a root is infinite at zero, and what is zero is not scaled anyway.
    norm = (squares + torch.finfo(squares.dtype).tiny).sqrt()
    return clip * (1 - max(half, default=0.0)) / norm.clamp_min(clip)


def clipped_sum(
    gradient: Callable[[Tensor, Tensor], tuple[dict[str, Tensor], Tensor]],
    images: Tensor,
    labels: Tensor,
    *,
    clip: float,
    like: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """Σ_i g_i · min(1, C / ‖g_i‖), differentiable with respect to the images.

    Args:
        gradient: The gradient by name, and the loss, of a batch of one image; works under `torch.vmap`.
        images: Shape ``(batch, …)``; there may be none.
        labels: Class indexes of shape ``(batch,)``, or probabilities ``(batch, classes)``.
        clip: C.
        like: A tensor of the shape of each gradient, by name.

    Returns:
        The sum by name, and the sum of the losses.
    """

    def clipped(image: Tensor, label: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        found, loss = gradient(image[None], label[None])
        factor = clip_factor(found, clip=clip)
        # An image whose gradient overflows counts as none: else it alone decided whether anything is sent.
        finite = factor > 0
        return {name: torch.where(finite, factor * tensor, 0.0) for name, tensor in found.items()}, loss

    total = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    losses = images.new_zeros(())
    size = max(1, _AT_ONCE // max(1, sum(tensor.numel() for tensor in like.values())))
    for x, y in zip(torch.split(images, size), torch.split(labels, size), strict=True):
        if len(x):
            each, loss = torch.vmap(clipped, randomness="different")(x, y)
            total = {name: total[name] + tensor.sum(0) for name, tensor in each.items()}
            losses = losses + loss.sum()
    return total, losses
