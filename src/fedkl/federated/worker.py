"""Workers: a model instance and an optimizer each, lent to one client at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import rng
from fedkl.data import AUGMENTATIONS, prefetched
from fedkl.errors import TrainingError, UpdateError, gathered
from fedkl.federated.client import Client
from fedkl.federated.optimizer_state import put_state, take_state
from fedkl.federated.options import LocalTraining
from fedkl.locking import Split
from fedkl.types import Images, NamedTensors
from fedkl.update import PublicUpdate, UpdateKind

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True, repr=False)
class Samples:
    """Images with their labels; clients have indexes into the training samples."""

    images: Images
    labels: Tensor


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
    """

    def __init__(
        self, split: Split, *, training: LocalTraining, data: Samples, seed: int, draws: bool = False
    ) -> None:
        self.split = split
        self._training = training
        self._data = data
        self._seed = seed
        self._draws = draws
        self._public = split.public_parameters()
        self._named = self._public | split.private_parameters()
        self._optimizer = _optimizer(split, training)
        self._augment = AUGMENTATIONS[training.augmentation]

    def train(
        self,
        client: Client,
        state: NamedTensors,
        *,
        round: int,
        lr: float,
        transform: Callable[[PublicUpdate], PublicUpdate],
    ) -> ClientResult:
        """One round of a client's local training; the client changes only if all of it goes well.

        Args:
            client: Whose turn it is.
            state: The server's public state.
            round: The round's number, from 0.
            lr: Learning rate.
            transform: What the defense does to the update before it is sent.

        Raises:
            UpdateError: The training diverged: the update, the loss or the private state is not finite.
        """
        client.enter(self.split, state)
        self.split.model.train()
        put_state(self._optimizer, self._named, client.optimizer_state)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with self._model_randomness(client, round):
            if self._training.algorithm == "fedavg":
                losses = self._epochs(client, round)
                tensors, num_samples = self.split.public_state(), client.num_samples
            else:
                tensors, num_samples, losses = self._gradient(client, round)
        update = self.split.public_update(
            tensors,
            kind=UPDATE_KINDS[self._training.algorithm],
            num_samples=num_samples,
            round=round,
            search=False,
        )
        update = transform(update)
        private, loss = self.split.private_state(), torch.stack(losses).mean()
        _check_finite(private | {"loss": loss}, client)
        moments = take_state(self._optimizer, self._named)
        client.keep(private, moments if self._training.keep_optimizer else {})
        return ClientResult(update=update, loss=float(loss))

    def run(self, client: Client, state: NamedTensors, task: Callable[[nn.Module], _Result]) -> _Result:
        """Runs a task on the model as this client sees it, e.g. an evaluation."""
        client.enter(self.split, state)
        return task(self.split.model)

    def _epochs(self, client: Client, round: int) -> list[Tensor]:
        """Local epochs on all of the client's samples; returns the loss of each batch."""
        start = [parameter.detach().clone() for parameter in self._anchored()]
        losses = []
        for epoch in range(self._training.epochs):
            for images, labels in self._batches(client, round, epoch):
                self._optimizer.zero_grad()
                loss = self._loss(images, labels)
                loss.backward()  # type: ignore[no-untyped-call]
                self._pull_towards(start)
                self._optimizer.step()
                losses.append(loss.detach())
        return losses

    def _anchored(self) -> list[nn.Parameter]:
        """What FedProx keeps near the global model."""
        if not self._training.proximal:
            return []
        return [parameter for parameter in self._public.values() if parameter.requires_grad]

    def _pull_towards(self, start: Sequence[Tensor]) -> None:
        for parameter, global_value in zip(self._anchored(), start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - global_value, alpha=self._training.proximal)

    def _gradient(self, client: Client, round: int) -> tuple[dict[str, Tensor], int, list[Tensor]]:
        """The public gradient of one batch; private parameters step here, public ones on the server."""
        images, labels = next(self._batches(client, round, 0))
        private = self.split.private_parameters()
        loss = self._loss(images, labels)
        gradient = self.split.public_gradient(loss, retain_graph=bool(private))
        if private:
            self._optimizer.zero_grad()
            loss.backward(inputs=list(private.values()))  # type: ignore[no-untyped-call]
            self._optimizer.step()  # parameters without a gradient are left alone
        return gradient, len(labels), [loss.detach()]

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        half = self._training.precision == "bfloat16"
        try:
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
                return F.cross_entropy(self.split.model(images), labels)
        except ValueError as error:
            if len(images) > 1:
                raise
            raise TrainingError(
                f"The model cannot train on a batch of one sample ({error}). Choose a batch_size that leaves "
                f"no client with a last batch of one, now {self._training.batch_size}, or a norm that does "
                "not need a batch."
            ) from error

    def _batches(self, client: Client, round: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches; order and augmentation depend on seed, client, round and epoch only."""
        place = (client.name, round, epoch)
        order = torch.randperm(client.num_samples, generator=rng.generator(self._seed, "batches", *place))
        batches = torch.split(client.samples[order], self._training.batch_size)
        draws = rng.generator(self._seed, "augmentation", *place)
        for index, images in zip(batches, prefetched(self._data.images, batches), strict=True):
            yield self._augment(images, draws), self._data.labels[index]

    @contextmanager
    def _model_randomness(self, client: Client, round: int) -> Iterator[None]:
        """Seeds what the model itself draws (dropout layers); the global generators are left as they were."""
        if not self._draws:
            yield
            return
        seed = rng.generator(self._seed, "model", client.name, round).initial_seed()
        devices = [self._data.labels.device] if self._data.labels.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield


def _check_finite(tensors: NamedTensors, client: Client) -> None:
    """Private tensors diverge without the update where a norm's statistics overflow."""
    problems = [f"'{name}' has non-finite values" for name, t in tensors.items() if not t.isfinite().all()]
    if problems:
        raise UpdateError(gathered(f"{client.name} diverged.", problems, "Lower its learning rate."))


UPDATE_KINDS: dict[str, UpdateKind] = {"fedavg": "weights", "fedsgd": "gradient"}


def draws_random_numbers(model: nn.Module, images: Tensor) -> bool:
    """Whether a training step draws from PyTorch's global generator, which all threads share.

    Args:
        model: Not changed.
        images: At least two, for norms that need a batch.
    """
    probe = copy.deepcopy(model).train()
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        before = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
        probe(images)
        after = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _optimizer(split: Split, training: LocalTraining) -> torch.optim.Optimizer:
    decay = training.weight_decay
    lock_decay = decay if training.lock_weight_decay is None else training.lock_weight_decay
    groups: list[dict[str, Any]] = [
        {"params": list(split.public_parameters().values()), "weight_decay": decay},
        {"params": list(split.private_parameters().values()), "weight_decay": lock_decay},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "adam":
        return torch.optim.Adam(groups, lr=training.lr)
    # The fused step walks memory, not indexes: a momentum from a checkpoint is laid out as contiguous.
    fused = all(parameter.is_contiguous() for group in groups for parameter in group["params"])
    return torch.optim.SGD(
        groups,
        lr=training.lr,
        momentum=training.momentum,
        nesterov=training.momentum > 0,
        fused=fused,
    )


class WorkerPool:
    """Runs tasks for clients on several workers at once, each on PyTorch threads of its own.

    A client's task gets the same number of threads whatever the others do: the last bits of a result may
    depend on it, and a resumed training must repeat them.

    Args:
        workers: At least one.
        threads: PyTorch's intra-op threads to share out.
    """

    def __init__(self, workers: Sequence[Worker], *, threads: int) -> None:
        self.workers = tuple(workers)
        self.threads = threads

    def map(
        self, task: Callable[[Worker, Client], _Result], clients: Sequence[Client]
    ) -> Iterator[tuple[Client, _Result]]:
        """Runs a task for every client; results come in an order that depends on the clients only.

        Args:
            task: Called with a worker that is free and the client.
            clients: Whom to run it for.
        """
        free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            free.put(worker)

        def run(client: Client) -> tuple[Client, _Result]:
            worker = free.get()
            try:
                return client, task(worker, client)
            finally:
                free.put(worker)

        largest_first = sorted(clients, key=lambda client: -client.num_samples)
        threads = max(1, self.threads // len(self.workers))
        before = torch.get_num_threads()
        try:
            if len(self.workers) == 1:
                torch.set_num_threads(threads)
                yield from map(run, largest_first)
                return
            with ThreadPoolExecutor(
                len(self.workers), initializer=torch.set_num_threads, initargs=(threads,)
            ) as executor:
                yield from executor.map(run, largest_first)
        finally:
            torch.set_num_threads(before)
