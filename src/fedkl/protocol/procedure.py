"""What a client does between receiving a model and sending an update, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import rng
from fedkl.errors import ConfigError, gathered
from fedkl.protocol.per_example import PerExample


def loss_of(predictions: Tensor, labels: Tensor) -> Tensor:
    """What clients minimize: the mean cross-entropy, of labels or of probabilities."""
    return F.cross_entropy(predictions, labels)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, what training changes: all parameters but frozen ones, which require no gradient."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """How a client trains, and what of it is sent. The defaults: one gradient of all images.

    The norms' mode is not in here: an experiment says it once, as `norm_mode`, and a federation trains in
    train mode.

    Attributes:
        algorithm: ``"fedavg"``: local training, the weights are sent. ``"fedsgd"``: a gradient is sent; of
            several `steps` the sum of the gradients of plain SGD steps, which is what local accumulation
            sends and what most of the literature attacks.
        epochs: Local epochs of a round (fedavg).
        steps: So many local steps, and not whole epochs; None: epochs, and with fedsgd one step.
        batch_size: Samples of a batch; the last batch of an epoch may be smaller. None: all of them.
        optimizer: ``"sgd"`` (with Nesterov momentum) or ``"adam"``.
        lr: Learning rate, before any schedule.
        momentum: Of SGD; 0 switches it off. Adam has its usual (0.9, 0.999).
        weight_decay: L2 weight decay of all trained tensors.
        lock_weight_decay: The same for private parameters only; None: as `weight_decay`, as published. It
            pulls γ to act(0).
        proximal: μ of FedProx (Li et al. 2020, equation 2): the gradient of every public parameter gets
            μ (w − w_global). Private parameters have no global value. 0: plain FedAvg.
        augmentation: Name of `fedkl.data.AUGMENTATIONS`, applied to every training batch.
        precision: ``"bfloat16"`` runs forward passes under autocast; weights stay float32.
        per_example: Clips each image's gradient and adds noise, in every step; None: neither. Batches are
            then drawn: each image is in each with the probability `sampling_rate`, and one may be empty.

    Raises:
        ConfigError: A field is out of range.
    """

    algorithm: Literal["fedavg", "fedsgd"] = "fedsgd"
    epochs: int = 1
    steps: int | None = None
    batch_size: int | None = None
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    lock_weight_decay: float | None = None
    proximal: float = 0.0
    augmentation: str = "none"
    precision: Literal["float32", "bfloat16"] = "float32"
    per_example: PerExample | None = None

    def __post_init__(self) -> None:
        problems = [problem for problem, fine in self._checks().items() if not fine]
        if problems:
            name = type(self).__name__
            raise ConfigError(gathered(f"{name} is not usable.", problems, "Correct these fields."))
        if (
            self.algorithm == "fedsgd" and self.steps == 1
        ):  # one meaning, one value: it is compared and hashed
            object.__setattr__(self, "steps", None)

    def _checks(self) -> dict[str, bool]:
        """Problems, and whether each is absent."""
        decays = (self.weight_decay, self.lock_weight_decay or 0.0, self.proximal)
        return {
            f"epochs: expected at least 1, got {self.epochs}": self.epochs >= 1,
            f"steps: expected at least 1, got {self.steps}": self.steps is None or self.steps >= 1,
            f"batch_size: expected at least 1, got {self.batch_size}": (
                self.batch_size is None or self.batch_size >= 1
            ),
            f"lr: expected a finite value > 0, got {self.lr}": 0 < self.lr < math.inf,
            f"momentum: expected a value in [0, 1), got {self.momentum}": 0 <= self.momentum < 1,
            "weight_decay, lock_weight_decay, proximal: expected finite values ≥ 0, got "
            f"{self.weight_decay}, {self.lock_weight_decay}, {self.proximal}": all(
                0 <= decay < math.inf for decay in decays
            ),
            "proximal: a single gradient never leaves the global model, so it has no effect with "
            f"algorithm='fedsgd', got {self.proximal}": self.algorithm == "fedavg" or not self.proximal,
        }

    @property
    def is_gradient(self) -> bool:
        """Whether one gradient is sent, of all images at the model that was received."""
        return self.algorithm == "fedsgd" and self.steps is None

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Fields that were set, and do nothing to what is sent: a gradient knows no optimizer."""
        if self.algorithm == "fedavg":
            return ("epochs",) if self.steps is not None and self.epochs > 1 else ()
        plain = Procedure()
        names = ("epochs", "optimizer", "momentum", "weight_decay", "lock_weight_decay")
        return tuple(name for name in names if getattr(self, name) != getattr(plain, name))

    @property
    def obstacle(self) -> str | None:
        """Why what is sent cannot be differentiated with respect to the images; None where it can."""
        if self.augmentation != "none":
            return f"augmentation = '{self.augmentation}'"
        if self.precision != "float32":
            return f"precision = '{self.precision}'"
        if self.algorithm == "fedavg" and self.optimizer != "sgd":
            return f"optimizer = '{self.optimizer}'"
        return None

    @property
    def differentiable(self) -> bool:
        """Whether what is sent can be differentiated with respect to the images."""
        return self.obstacle is None

    def decay(self, *, private: bool) -> float:
        """The weight decay of private or of public parameters."""
        own = self.lock_weight_decay if private else None
        return self.weight_decay if own is None else own

    def step_count(self, images: int) -> int:
        """How many local steps a client with so many images does."""
        return len(self.batches(images))

    def batches(self, images: int) -> list[Tensor]:
        """Indexes of the images of each step, for an update that is attacked.

        Steps take the images in turn. Of epochs the first takes them as they come (images that are attacked
        have no order of their own), and each later one is shuffled, always in the same way: the server is
        granted the order, which in practice it would have to guess. Drawn batches are always the same, too.
        """
        if self.per_example is not None and not self.is_gradient:
            draws = rng.generator(0, "audited-batches", "drawn")
            return [
                (torch.rand(images, generator=draws) < self.sampling_rate(images)).nonzero().flatten()
                for _ in range(self.steps or self.epochs * self.steps_of_epoch(images))
            ]
        if self.algorithm == "fedsgd" or self.steps is not None:
            size = images if self.batch_size is None else min(self.batch_size, images)
            steps = self.steps or 1
            size = images if self.is_gradient else size
            return [torch.arange(step * size, (step + 1) * size) % images for step in range(steps)]
        orders = [torch.arange(images)]
        for epoch in range(1, self.epochs):
            orders.append(torch.randperm(images, generator=rng.generator(0, "audited-batches", epoch)))
        return [part for order in orders for part in torch.split(order, self.batch_size or images)]

    def steps_of_epoch(self, images: int) -> int:
        """Batches in an epoch of a client with so many images."""
        return math.ceil(images / (self.batch_size or images))

    def sampling_rate(self, images: int) -> float:
        """The probability of each image to be in a batch, where batches are drawn.

        Args:
            images: How many the client has.
        """
        return 1.0 if self.is_gradient else min(1.0, (self.batch_size or images) / images)

    def summed_share(self, images: int) -> float:
        """The sum of the steps' gradients as they are sent, if all of them were one and the same, over it.

        1 for one gradient, the number of steps for plain SGD, more with momentum. Not for Adam.
        """
        momentum = self.momentum if self.algorithm == "fedavg" else 0.0
        velocity, total = 0.0, 0.0
        for _ in range(self.step_count(images)):
            velocity = momentum * velocity + 1
            total += 1 + momentum * velocity
        return total
