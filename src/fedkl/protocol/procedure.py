"""What a client does between receiving a model and sending an update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkl.errors import AttackError


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """The public protocol of a client's update: plain SGD steps on its batch.

    One step sends the gradient; several send the sum of the steps' gradients, that is (before − after) / lr.

    Attributes:
        steps: How many.
        lr: Learning rate of the steps.
        batch_size: Images of one step, taken in turn; None: all of them in every step.
    """

    steps: int = 1
    lr: float = 0.01
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < math.inf or (self.batch_size or 1) < 1:
            raise AttackError(
                f"LocalSteps: expected steps ≥ 1, lr > 0 and batch_size ≥ 1, got steps={self.steps}, "
                f"lr={self.lr}, batch_size={self.batch_size}."
            )

    def batch(self, step: int, images: int) -> Tensor:
        """Indexes of a step's images, among so many."""
        size = images if self.batch_size is None else min(self.batch_size, images)
        return torch.arange(step * size, (step + 1) * size) % images
