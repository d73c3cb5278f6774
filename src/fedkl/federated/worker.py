"""Workers: a model instance and an optimizer each, lent to one client at a time."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.data import Subset
from fedkl.errors import TrainingError, UpdateError, gathered
from fedkl.federated.client import Client
from fedkl.federated.optimizer_state import put_state, take_state
from fedkl.federated.options import LocalTraining
from fedkl.keys import secure_uniform
from fedkl.locking import Split, recalibrate_norms_
from fedkl.locking.statistics import private_norms
from fedkl.protocol import Sending
from fedkl.protocol.local_training import LocalTrainer, batches_of
from fedkl.types import Images, NamedTensors
from fedkl.update import PublicUpdate, UpdateKind

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True, repr=False)
class Samples:
    """Images with their labels; clients have indexes into the training samples."""

    images: Images
    labels: Tensor

    def first(self, indexes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The first so many of some samples, and their labels."""
        chosen = indexes[:count]
        return self.images[chosen], self.labels[chosen]


@dataclass(frozen=True, kw_only=True)
class ClientResult:
    """What one client's round gives: the update that is sent, and what the simulation notes down.

    Attributes:
        update: The public update.
        loss: Mean training loss over the round's batches.
    """

    update: PublicUpdate
    loss: float


class Worker:
    """One model instance with its optimizer.

    Args:
        split: The instance.
        training: How clients train.
        data: All clients' samples.
        seed: The experiment's seed.
        draws: Whether the model itself draws random numbers; see `draws_random_numbers`. Such a worker must
            be the only one.
        recalibrates: Whether clients count their private norm statistics anew before they use a model.
    """

    def __init__(
        self,
        split: Split,
        *,
        training: LocalTraining,
        data: Samples,
        seed: int,
        draws: bool = False,
        recalibrates: bool = False,
    ) -> None:
        self.split = split
        self._training = training
        self._data = data
        self._seed = seed
        self._draws = draws
        self._recalibrates = recalibrates and bool(private_norms(split))
        self._frozen, self._tied = split.frozen_parameters(), split.tied_names()
        self._unsent = _unsent_buffers(split)
        self._trainer = LocalTrainer(
            split.model,
            procedure=training,
            public=split.public_parameters(),
            private=split.private_parameters(),
        )

    def train(
        self,
        client: Client,
        state: NamedTensors,
        *,
        round: int,
        lr: float,
        transform: Callable[[PublicUpdate, Sending], PublicUpdate],
        guaranteed: bool = False,
    ) -> ClientResult:
        """One round of a client's local training; the client changes only if all of it goes well.

        Args:
            client: Whose turn it is.
            state: The server's public state.
            round: The round's number, from 0.
            lr: Learning rate.
            transform: What the defense does to the update before it is sent.
            guaranteed: Whether differential privacy is promised of what is sent. Then a client whose training
                diverged sends what it sends where nothing has changed: one image may decide whether it does.

        Raises:
            UpdateError: The training diverged: the update, the loss or the private state is not finite.
        """
        self._lend(client, state)
        self.split.model.train()
        optimizer, named = self._trainer.optimizer, self._trainer.named
        put_state(optimizer, named, client.optimizer_state)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sample = partial(self._data.first, client.samples)
        with self._model_randomness(client, round):
            if self._training.algorithm == "fedavg":
                losses = self._trainer.train(self._batches(client, round), samples=client.num_samples)
                tensors, num_samples = self.split.public_state(), client.num_samples
            else:
                images, labels = next(self._batches(client, round))
                tensors, num_samples, losses = self._gradient(client, images, labels)
                sample = partial(_first, images, labels)
        silent = guaranteed and not _are_finite(tensors | self.split.private_state())
        if silent:
            unchanged = state if self._training.algorithm == "fedavg" else {}
            tensors = {name: _unchanged(tensor, unchanged.get(name)) for name, tensor in tensors.items()}
        update = self.split.public_update(
            tensors,
            kind=UPDATE_KINDS[self._training.algorithm],
            num_samples=num_samples,
            round=round,
            search=False,
        )
        update = transform(
            update,
            Sending(
                received=state,
                network=self.split.model,
                sample=sample,
                frozen=self._frozen,
                tied=self._tied,
            ),
        )
        private, loss = self.split.private_state(), torch.stack(losses).mean()
        if silent:
            return ClientResult(update=update, loss=float(loss))
        hidden = guaranteed or self._training.per_example is not None
        _check_finite(private if hidden else private | {"loss": loss}, client)
        moments = take_state(optimizer, named)
        client.keep(private, moments if self._training.keep_optimizer else {})
        return ClientResult(update=update, loss=float(loss))

    def run(self, client: Client, state: NamedTensors, task: Callable[[nn.Module], _Result]) -> _Result:
        """Runs a task on the model as this client uses it, e.g. an evaluation."""
        self.prepare(client, state)
        return task(self.split.model)

    def prepare(self, client: Client, state: NamedTensors) -> None:
        """Makes the model the one that this client uses: with statistics of these weights, which it keeps.

        They are of its training images. Where they are not finite, it has those that it had.
        """
        self._lend(client, state)
        if not self._recalibrates or client.num_samples < 2:
            return
        with suppress(TrainingError):  # the model is of no use either way, which an evaluation shows
            recalibrate_norms_(self.split, Subset(self._data.images, client.samples))
            client.keep_statistics(self.split.private_state())

    def _lend(self, client: Client, state: NamedTensors) -> None:
        """Makes the model this client's, without anything that the client before it left in there.

        Buffers outside the state start anew: else what a client trains would depend on who had the worker
        before, and thus on how many workers there are.
        """
        with torch.no_grad():
            for module, name, buffer, start in self._unsent:
                if buffer is not None and start is not None and not torch.equal(buffer, start):
                    buffer.copy_(start)
                module._buffers[name] = buffer  # `forward` may have put another tensor there
        client.enter(self.split, state)

    def _gradient(
        self, client: Client, images: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], int, list[Tensor]]:
        """The public gradient of one batch; private parameters step here, public ones on the server."""
        if self._training.per_example is not None:
            loss = self._trainer.private_backward(images, labels, samples=client.num_samples)
            gradient = {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in self.split.trained_parameters().items()
            }
            self._trainer.step_private()
            # Not how many there happen to be in the batch: that tells who is in it.
            size = client.num_samples * self._training.sampling_rate(client.num_samples)
            return gradient, max(1, int(size)), [loss]
        loss = self._trainer.loss(images, labels)
        private = self.split.private_parameters().values()
        gradient = self.split.public_gradient(loss, retain_graph=any(p.requires_grad for p in private))
        self._trainer.train_private(loss)
        return gradient, len(labels), [loss.detach()]

    def _batches(self, client: Client, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The round's batches: of whole epochs, or of so many steps."""
        training = self._training
        epochs = range(training.epochs) if training.steps is None else itertools.count()
        batches = (batch for epoch in epochs for batch in self._epoch(client, round, epoch))
        return itertools.islice(batches, training.steps)

    def _epoch(self, client: Client, round: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Order and augmentation depend on seed, client, round and epoch only."""
        place = (client.name, round, epoch)
        order = torch.randperm(client.num_samples, generator=rng.generator(self._seed, "batches", *place))
        parts = torch.split(order, self._training.batch_size or client.num_samples)
        if self._training.per_example is not None:
            parts = self._drawn(client)
        return batches_of(
            self._data.images,
            self._data.labels,
            [client.samples[part] for part in parts],
            augmentation=self._training.augmentation,
            generator=self._generator("augmentation", *place),
        )

    def _generator(self, *place: str | int) -> torch.Generator:
        """Of what touches each image; where that is to be private, nobody may know the seed."""
        if self._training.per_example is not None:
            return torch.Generator().manual_seed(secrets.randbits(63))
        return rng.generator(self._seed, *place)

    def _drawn(self, client: Client) -> tuple[Tensor, ...]:
        """An epoch's batches of images that are drawn: whoever knew the draws would know who is in which."""
        count, training = client.num_samples, self._training
        rate = training.sampling_rate(count)
        return tuple(
            (secure_uniform(count) < rate).nonzero().flatten() for _ in range(training.steps_of_epoch(count))
        )

    def _model_randomness(self, client: Client, round: int) -> AbstractContextManager[None]:
        """Seeds what the model itself draws (dropout layers); the global generators are left as they were."""
        if not self._draws:
            return nullcontext()
        seed = self._generator("model", client.name, round).initial_seed()
        return rng.seeded(seed, device=self._data.labels.device)


def _unsent_buffers(split: Split) -> list[tuple[nn.Module, str, Tensor | None, Tensor | None]]:
    """Buffers that are neither public nor a client's own: module, local name, the buffer, its values."""
    known = {*split.public_state(), *split.private_names}
    buffers = dict(split.model.named_buffers(remove_duplicate=False))
    kept = {id(buffer) for name, buffer in buffers.items() if name in known}
    return [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in split.model.modules()
        for name, buffer in module._buffers.items()
        if id(buffer) not in kept and (buffer is not None or name in module._non_persistent_buffers_set)
    ]


def _first(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return images[:count], labels[:count]


def _unchanged(tensor: Tensor, received: Tensor | None) -> Tensor:
    """What is sent where nothing has changed; counts of batches say how many there were in any case."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return torch.zeros_like(tensor) if received is None else received.clone()


def _are_finite(tensors: NamedTensors) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _check_finite(tensors: NamedTensors, client: Client) -> None:
    """Private tensors diverge without the update where a norm's statistics overflow."""
    problems = [f"'{name}' has non-finite values" for name, t in tensors.items() if not t.isfinite().all()]
    if problems:
        raise UpdateError(gathered(f"{client.name} diverged.", problems, "Lower its learning rate."))


UPDATE_KINDS: dict[str, UpdateKind] = {"fedavg": "weights", "fedsgd": "gradient"}
