"""A federated client: its data, key, private state and optimizer never leave it; its update does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import rng
from fedkl.errors import ConfigError, DataError, SecretError
from fedkl.keys import Key
from fedkl.locking import Lock, Split
from fedkl.types import NamedTensors
from fedkl.update import PublicUpdate


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """How a client trains. Defaults: arXiv 2305.04095, section 5.

    Attributes:
        algorithm: ``"fedavg"``: `epochs` of local training, weights are sent. ``"fedsgd"``: one gradient of
            one batch is sent; the private parameters take a local step of their own.
        epochs: Local epochs of a round (fedavg).
        batch_size: Samples of a batch; the last batch of an epoch may be smaller.
        lr: Learning rate of SGD.
        momentum: Nesterov momentum; 0 switches it off.
        weight_decay: L2 weight decay of all trained tensors.
        lock_weight_decay: The same for private parameters only; None: as `weight_decay`, as published. It
            pulls γ to act(0).
        lr_milestones: Rounds from which on the learning rate is multiplied by `lr_factor` once more.
        lr_factor: See `lr_milestones`.
    """

    algorithm: Literal["fedavg", "fedsgd"] = "fedavg"
    epochs: int = 1
    batch_size: int = 64
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lock_weight_decay: float | None = None
    lr_milestones: tuple[int, ...] = (60, 120, 160)
    lr_factor: float = 0.2

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.lr < math.inf:
            got = f"epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}"
            raise ConfigError(f"LocalTraining: expected epochs ≥ 1, batch_size ≥ 1, lr > 0, got {got}.")
        decays = (self.weight_decay, self.lock_weight_decay or 0.0)
        if not 0 <= self.momentum < 1 or not all(0 <= decay < math.inf for decay in decays):
            got = f"momentum={self.momentum}, weight_decay={self.weight_decay}"
            got += f", lock_weight_decay={self.lock_weight_decay}"
            raise ConfigError(f"LocalTraining: expected momentum in [0, 1) and weight decays ≥ 0, got {got}.")
        if not 0 < self.lr_factor < math.inf:
            raise ConfigError(f"LocalTraining: expected lr_factor > 0, got lr_factor={self.lr_factor}.")

    def lr_at(self, round: int) -> float:
        """The learning rate of a round, from 0."""
        return self.lr * self.lr_factor ** sum(round >= milestone for milestone in self.lr_milestones)


class Client:
    """One client of a federation. The model instance is lent to it for a round and serves all clients.

    Args:
        name: Stable name; seeds its batch order.
        images: Training images in [0, 1], shape ``(samples, channels, height, width)``.
        labels: Class indexes, shape ``(samples,)``.
        split: The client's own prepared model; its key and private state become this client's.
        training: How it trains.
        seed: The experiment's seed.

    Raises:
        DataError: There are no samples, or not one label per image.
        ConfigError: Gradients are to be sent, but the model has public running statistics, which no gradient
            carries.
    """

    def __init__(
        self,
        *,
        name: str,
        images: Float[Tensor, "samples channels height width"],
        labels: Int64[Tensor, " labels"],
        split: Split,
        training: LocalTraining,
        seed: int,
    ) -> None:
        if len(images) == 0 or len(images) != len(labels):
            raise DataError(
                f"Client '{name}': expected at least one image and one label per image, "
                f"got {len(images)} images and {len(labels)} labels."
            )
        sent, trained = split.public_state(), split.public_parameters()
        statistics = [name for name, t in sent.items() if name not in trained and t.is_floating_point()]
        if training.algorithm == "fedsgd" and statistics:
            raise ConfigError(
                f"fedsgd sends gradients only, but '{statistics[0]}' is a public buffer that nobody would "
                "learn. Use algorithm='fedavg', or a defense that keeps norm statistics private."
            )
        self.name = name
        self._images = images
        self._labels = labels
        self._training = training
        self._seed = seed
        self._key: Key | None = split.key if isinstance(split, Lock) else None
        self._private_state = split.private_state()
        self._optimizer: torch.optim.SGD | None = None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SecretError("A Client holds private tensors and cannot be pickled.")

    def __repr__(self) -> str:
        return f"Client({self.name!r}, samples={self.num_samples}, key={self._key})"

    @property
    def num_samples(self) -> int:
        """Number of training samples."""
        return len(self._images)

    def enter(self, split: Split, state: NamedTensors) -> None:
        """Puts the server's public state and this client's own key and private state into the model."""
        split.load_public_state(state)
        if isinstance(split, Lock) and self._key is not None:
            split.use_key(self._key)
        split.load_private_state(self._private_state)

    def update(self, split: Split, state: NamedTensors, *, round: int) -> PublicUpdate:
        """One round of local training.

        Args:
            split: The shared model instance. The optimizer's state is this client's own and persists, so
                it must be the same instance in every round.
            state: The server's public state.
            round: The round's number, from 0.

        Returns:
            The public update. The private state stays here.
        """
        self.enter(split, state)
        split.model.train()
        optimizer = self._optimizer_for(split)
        for group in optimizer.param_groups:
            group["lr"] = self._training.lr_at(round)
        if self._training.algorithm == "fedavg":
            for batch in self._batches(round):
                optimizer.zero_grad()
                self._loss(split.model, batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            tensors, num_samples = split.public_state(), self.num_samples
        else:
            batch = next(self._batches(round))
            tensors, num_samples = self._gradient(split, optimizer, batch), len(batch)
        self._private_state = split.private_state()
        return split.public_update(tensors, kind=self._update_kind, num_samples=num_samples, round=round)

    @property
    def _update_kind(self) -> Literal["gradient", "weights"]:
        return "weights" if self._training.algorithm == "fedavg" else "gradient"

    def _gradient(self, split: Split, optimizer: torch.optim.SGD, batch: Tensor) -> dict[str, Tensor]:
        """The public gradient; the private parameters take their step here, the public ones on the server."""
        private = split.private_parameters()
        loss = self._loss(split.model, batch)
        gradient = split.public_gradient(loss, retain_graph=bool(private))
        if private:
            optimizer.zero_grad()
            loss.backward(inputs=list(private.values()))  # type: ignore[no-untyped-call]
            optimizer.step()  # parameters without a gradient are left alone
        return gradient

    def _loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(self._images[batch]), self._labels[batch])

    def _batches(self, round: int) -> Iterator[Tensor]:
        for epoch in range(self._training.epochs):
            generator = rng.generator(self._seed, "batches", self.name, round, epoch)
            order = torch.randperm(self.num_samples, generator=generator)
            yield from torch.split(order, self._training.batch_size)

    def _optimizer_for(self, split: Split) -> torch.optim.SGD:
        if self._optimizer is None:
            options = self._training
            decay = options.weight_decay
            lock_decay = decay if options.lock_weight_decay is None else options.lock_weight_decay
            public, private = split.public_parameters(), split.private_parameters()
            groups = [{"params": list(public.values())}]
            if private:
                groups.append({"params": list(private.values()), "weight_decay": lock_decay})  # type: ignore[dict-item]
            self._optimizer = torch.optim.SGD(
                groups,
                lr=options.lr,
                momentum=options.momentum,
                weight_decay=decay,
                nesterov=options.momentum > 0,
            )
        return self._optimizer
