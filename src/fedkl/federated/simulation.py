"""Rounds of clients and server in one process."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.aggregation import Aggregation, FederationPlan, OnSeen, RoundAggregation, RoundPlan
from fedkl.data import Dataset, class_counts
from fedkl.defenses import DEFENSES, Defense
from fedkl.errors import ConfigError, FedKLError, RoundLostError, TrainingError, UpdateError
from fedkl.federated.client import Client
from fedkl.federated.options import Execution, FederatedTraining
from fedkl.federated.server import AnyServerOptimizer, Averaging, Server, ServerSGD
from fedkl.federated.worker import (
    UPDATE_KINDS,
    ClientResult,
    Samples,
    Worker,
    WorkerPool,
    draws_random_numbers,
)
from fedkl.locking import Split
from fedkl.metrics import class_accuracies
from fedkl.privacy import Ledger
from fedkl.protocol import Sending
from fedkl.protocol.private_gradient import check_separate
from fedkl.types import Images, NamedTensors
from fedkl.update import PublicUpdate


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """One round.

    Attributes:
        round: From 0.
        seconds: Wall time of the clients' training and the aggregation, without evaluation.
        lr: The clients' learning rate.
        loss: Mean training loss of the clients whose updates came, each client weighing the same; None if
            none came.
        updates: How many updates came.
        dropped: Names of sampled clients that were gone.
        failed: Why a client's update was refused, by client.
        aggregated: Whether the global model changed: False if fewer updates came than `min_cohort`, or if the
            aggregation lost the round.
        lost: Why it did; empty if it did not.
        accuracies: Test accuracy of the new global model by client, each with its own private state, in
            [0, 1]; empty where the round was not evaluated.
        local_accuracies: The same on a test set of each client's own class frequencies; without the clients
            of whose classes there are no test images.
        update_bytes: Size of one client's update as sent; 0 if none came.
    """

    round: int
    seconds: float
    lr: float
    loss: float | None
    updates: int
    dropped: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    aggregated: bool
    lost: str = ""
    accuracies: Mapping[str, float] = field(default_factory=dict)
    local_accuracies: Mapping[str, float] = field(default_factory=dict)
    update_bytes: int

    @property
    def accuracy(self) -> float | None:
        """Mean over clients."""
        return fmean(self.accuracies.values()) if self.accuracies else None

    @property
    def local_accuracy(self) -> float | None:
        """Mean over clients."""
        return fmean(self.local_accuracies.values()) if self.local_accuracies else None


class Federation:
    """A server and its clients over one dataset.

    Args:
        model: The plain architecture with its initial weights; not changed.
        defense: What every client does.
        dataset: Training images are divided among the clients; test images evaluate them.
        training: How it trains.
        seed: Of the partition, the cohorts and the batch orders. Keys and lock layers come from the
            operating system.
        execution: On what it runs.
        aggregation: In place of that of `training`.

    Raises:
        ConfigError: The options do not go together.
        DataError: The samples cannot be divided among so many clients.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        defense: Defense,
        dataset: Dataset,
        training: FederatedTraining,
        seed: int,
        execution: Execution | None = None,
        aggregation: Aggregation | None = None,
    ) -> None:
        defense.check_training()
        execution = execution or Execution()
        self.defense = defense
        self.training = training
        self.dataset = dataset
        self._seed = seed
        self._device = _usable_device(execution.device)
        parts = training.partition.split(
            dataset.train_labels, clients=training.clients, generator=rng.generator(seed, "partition")
        )
        self.class_counts = class_counts(dataset.train_labels, parts, classes=dataset.spec.classes)
        self.clients = _clients(parts, defense, model)
        self._indexes = {client.name: index for index, client in enumerate(self.clients)}
        options = aggregation or training.aggregation
        _check_server_knows(options, training)
        self.aggregation = options.for_federation(self._federation_plan())
        self._pool = self._workers(model, execution)
        _check_fedsgd(self.split, training)
        self.ledger = self._new_ledger()
        _check_tied(self.split, training)
        self.server = Server(
            self.split.public_state(),
            trained=[name for name, p in self.split.public_parameters().items() if p.requires_grad],
            optimizer=_server_optimizer(training),
        )

    def _workers(self, model: nn.Module, execution: Execution) -> WorkerPool:
        dataset, device = self.dataset, self._device
        shared = Samples(images=_on(device, dataset.train_images), labels=dataset.train_labels.to(device))
        self._test = Samples(images=_on(device, dataset.test_images), labels=dataset.test_labels)
        threads = torch.get_num_threads()
        wanted = execution.workers or (threads if device.type == "cpu" else 1)
        probe = dataset.train_images[torch.arange(2) % len(dataset.train_images)]
        first = self.defense.prepare(model)
        draws = draws_random_numbers(first.model, probe)
        if draws:
            wanted = 1  # threads would share one generator, and their turns would decide the result
        count = max(1, min(wanted, self.training.cohort_size, os.cpu_count() or 1))
        memory = torch.channels_last if execution.channels_last else torch.contiguous_format
        splits = [first, *(self.defense.prepare(model) for _ in range(count - 1))]
        local = self.defense.procedure(self.training.local)
        for split in splits:
            split.model.to(device).to(memory_format=memory)  # type: ignore[call-overload]
        return WorkerPool(
            [
                Worker(
                    split,
                    training=local,
                    data=shared,
                    seed=self._seed,
                    draws=draws,
                    recalibrates=self.training.norm_statistics == "recalibrated",
                )
                for split in splits
            ],
            threads=threads,
        )

    @property
    def split(self) -> Split:
        """The first worker's model instance."""
        return self._pool.workers[0].split

    @property
    def workers(self) -> int:
        """Clients that train at once."""
        return len(self._pool.workers)

    @property
    def threads(self) -> int:
        """PyTorch threads that the workers share."""
        return self._pool.threads

    def run(
        self, *, start: int = 0, on_seen: OnSeen | None = None, watched: Container[int] | None = None
    ) -> Iterator[RoundResult]:
        """Trains all rounds from `start` on, yielding each as it is done.

        It ends before a round that would exceed the privacy budget.

        Args:
            start: The first of them.
            on_seen: Is told what the server saw of the watched rounds; see `run_round`.
            watched: Numbers of these rounds; None: all.

        Raises:
            TrainingError: The training of all clients of a round diverged.
            ConfigError: The privacy budget does not suffice for one round.
        """
        for round in range(start, self.training.rounds):
            if round > 0 and not self._affords(round):
                return
            yield self.run_round(round, on_seen=on_seen if watched is None or round in watched else None)

    def run_round(self, round: int, *, on_seen: OnSeen | None = None) -> RoundResult:
        """One round: the sampled clients train on the server's state, the server aggregates.

        Args:
            round: Its number, from 0.
            on_seen: Is told, before the evaluation, what was sent to the clients and what the server has
                then; with plain averaging every update of the round is kept for it. It changes no result.

        Raises:
            TrainingError: The training of all clients of the round diverged, of more than one where the
                federation has more than one.
            ConfigError: The privacy budget does not suffice.
        """
        begin = perf_counter()
        lr = self.training.lr_at(round)
        present, dropped = self._cohort(round)
        plan = self._plan(round, [*present, *dropped])
        if self.ledger is not None:
            self.ledger.charge(round, [client.name for client in present])
        collected = self.aggregation.begin(plan, record=on_seen is not None)
        for client in dropped:
            collected.drop(client.name)
        losses, failed = [], {}
        for client, result in self._train(present, plan.state, round=round, lr=lr):
            error = result if isinstance(result, UpdateError) else _refusal(collected, client, result)
            if error is not None:
                failed[client.name] = str(error)
                collected.drop(client.name)
            elif isinstance(result, ClientResult):
                losses.append(result.loss)
        alone = self.training.clients > 1 and len(failed) == 1  # a single one may be at fault itself
        if failed and not losses and not alone:
            raise TrainingError(_diverged(round, lr, failed))
        enough = len(collected.offered) >= self.training.min_cohort and collected.enough
        lost = self._aggregated(collected, round) if enough else ""
        seconds = perf_counter() - begin
        if on_seen is not None:
            on_seen(plan, collected.what_the_server_sees())
        accuracies, local_accuracies = self.evaluate() if self._evaluation_due(round) else ({}, {})
        return RoundResult(
            round=round,
            seconds=seconds,
            lr=lr,
            loss=fmean(losses) if losses else None,
            updates=len(collected.offered),
            dropped=tuple(client.name for client in dropped),
            failed=failed,
            aggregated=enough and not lost,
            lost=lost,
            accuracies=accuracies,
            local_accuracies=local_accuracies,
            update_bytes=collected.update_bytes,
        )

    def is_last(self, round: int) -> bool:
        """Whether no round comes after this one: all are done, or there is no privacy left for another."""
        return round == self.training.rounds - 1 or not self._affords(round + 1)

    def _affords(self, round: int) -> bool:
        if self.ledger is None:
            return True
        present, _ = self._cohort(round)
        return self.ledger.affords([client.name for client in present])

    def _new_ledger(self) -> Ledger | None:
        """Of a defense that gives every client a guarantee; None of others."""
        training, procedure = self.training, self.defense.procedure(self.training.local)
        if procedure.per_example is not None:
            check_separate(self.split.model.train())
        costs = {
            client.name: self.defense.privacy(procedure, samples=client.num_samples)
            for client in self.clients
        }
        guaranteed = {name: cost for name, cost in costs.items() if cost is not None}
        if len(guaranteed) == len(costs):
            return Ledger(guaranteed, options=training.privacy)
        if training.privacy.budget is not None:
            offered = [each for kind in DEFENSES for each in kind.variants()]
            others = [each.type for each in offered if each.privacy(each.procedure(procedure), samples=1)]
            raise ConfigError(
                f"privacy.budget: {self.defense.describe()} gives no guarantee that could be counted. Leave "
                f"the budget out, or use a defense with noise that gives one: {', '.join(others)}."
            )
        return None

    def _federation_plan(self) -> FederationPlan:
        return FederationPlan(
            clients={client.name: client.num_samples for client in self.clients},
            sampled=self.training.cohort is not None,
            steps=not isinstance(_server_optimizer(self.training), Averaging),
            seed=self._seed,
        )

    def _plan(self, round: int, sampled: Sequence[Client]) -> RoundPlan:
        schema = self.split.schema(UPDATE_KINDS[self.training.local.algorithm])
        in_order = sorted(sampled, key=lambda client: self._indexes[client.name])
        return RoundPlan(
            round=round,
            clients={client.name: client.num_samples for client in in_order},
            schema=replace(schema, private=frozenset()),  # a server does not know these names
            state=self.server.state,
        )

    def _cohort(self, round: int) -> tuple[list[Client], list[Client]]:
        """The sampled clients: those that are there, and those that have dropped out."""
        training, sampled = self.training, self.clients
        if training.cohort is not None:
            draws = rng.generator(self._seed, "cohort", round)
            order = torch.randperm(len(sampled), generator=draws)[: training.cohort]
            sampled = [self.clients[index] for index in sorted(order.tolist())]
        chance = torch.rand(len(sampled), generator=rng.generator(self._seed, "dropout", round))
        gone = (chance < training.dropout).tolist()
        present = [client for client, is_gone in zip(sampled, gone, strict=True) if not is_gone]
        dropped = [client for client, is_gone in zip(sampled, gone, strict=True) if is_gone]
        return present, dropped

    def _train(
        self, clients: Sequence[Client], state: NamedTensors, *, round: int, lr: float
    ) -> Iterator[tuple[Client, ClientResult | UpdateError]]:
        def task(worker: Worker, client: Client) -> ClientResult | UpdateError:
            try:
                return worker.train(client, state, round=round, lr=lr, transform=self._transformed)
            except UpdateError as error:  # one client's divergence is not the federation's
                return error

        return self._pool.map(task, clients)

    def _transformed(self, update: PublicUpdate, client: Sending) -> PublicUpdate:
        """What the defense makes of an update.

        Raises:
            TrainingError: The defense fails.
        """
        try:
            return self.defense.transform(update, client=client)
        except FedKLError:
            raise
        except Exception as error:  # of a defense from outside the package
            kind = type(self.defense)
            raise TrainingError(
                f"{kind.__module__}.{kind.__qualname__}.transform: {type(error).__name__} on an update of "
                f"kind '{update.kind}'. It gets weights under fedavg, a gradient under fedsgd, and buffers."
            ) from error

    def _aggregated(self, collected: RoundAggregation[PublicUpdate, dict[str, Tensor]], round: int) -> str:
        """Applies what a round gives; returns why it gives nothing, empty if it does."""
        try:
            self._apply(collected.result(), round)
        except RoundLostError as error:
            return str(error)
        return ""

    def _apply(self, average: NamedTensors, round: int) -> None:
        if self.training.local.algorithm == "fedavg":
            self.server.apply_weights(average)
        else:
            factor = self.training.schedule.factor(round, rounds=self.training.rounds)
            self.server.apply_gradient(average, lr_factor=factor)

    def _evaluation_due(self, round: int) -> bool:
        return self.is_last(round) or round % self.training.eval_every == self.training.eval_every - 1

    def evaluate(self) -> tuple[dict[str, float], dict[str, float]]:
        """Test accuracy of the global model by client, each with its own private state, in [0, 1].

        A client may count its norms' private statistics anew for it, and keep them; see `norm_statistics` of
        `FederatedTraining`.

        Returns:
            On the whole test set, and on a test set of each client's own class frequencies.
        """
        state, test = self.server.state, self._test
        evaluated = self.evaluated_clients()

        def by_class(model: nn.Module) -> Tensor:
            return class_accuracies(
                model,
                test.images,
                test.labels,
                classes=self.dataset.spec.classes,
                batch_size=_evaluation_batch(test.images),
            )

        if self.split.private_names:
            results = self._pool.map(lambda worker, client: worker.run(client, state, by_class), evaluated)
            recalls = {client.name: recall for client, recall in results}
        else:  # the clients' models are one and the same
            shared = self._pool.workers[0].run(evaluated[0], state, by_class)
            recalls = {client.name: shared for client in evaluated}
        whole = torch.bincount(test.labels, minlength=self.dataset.spec.classes).double()
        everywhere = {c.name: _weighted(recalls[c.name], whole) for c in evaluated}
        at_home = {c.name: _weighted(recalls[c.name], self._frequencies(c)) for c in evaluated}
        return _known(everywhere), _known(at_home)

    def use(self, client: Client) -> Split:
        """The first worker's model instance as this client uses the global model, in eval mode.

        Its norm statistics are of the global model's weights, if they are to be recalibrated.
        """
        worker = self._pool.workers[0]
        worker.prepare(client, self.server.state)
        worker.split.model.eval()
        return worker.split

    def evaluated_clients(self) -> list[Client]:
        """The first `eval_clients`, in an order drawn once, of those that have trained (else of all)."""
        order = torch.randperm(len(self.clients), generator=rng.generator(self._seed, "evaluation"))
        drawn = [self.clients[index] for index in order.tolist()]
        chosen = ([client for client in drawn if client.trained] or drawn)[: self.training.eval_clients]
        return sorted(chosen, key=lambda client: self._indexes[client.name])

    def _frequencies(self, client: Client) -> Tensor:
        return self.class_counts[self._indexes[client.name]].double()


def _clients(parts: Sequence[Tensor], defense: Defense, model: nn.Module) -> list[Client]:
    """One client for each part of the samples, all with secrets of their own.

    Their private states lie together, a block for each tensor: allocated one by one, 10,000 of them took
    twice their size.
    """
    split = defense.prepare(model)
    state = split.private_state()
    blocks = {name: tensor.new_empty((len(parts), *tensor.shape)) for name, tensor in state.items()}
    clients = []
    for index, part in enumerate(parts):
        split.redraw()
        room = {name: block[index] for name, block in blocks.items()}
        clients.append(Client(name=f"client-{index}", samples=part, split=split, room=room))
    return clients


def _refusal(
    collected: RoundAggregation[PublicUpdate, dict[str, Tensor]], client: Client, result: ClientResult
) -> UpdateError | None:
    """Why a client's update was not taken in; None if it was."""
    try:
        collected.offer(client.name, result.update)
    except UpdateError as error:
        return error
    return None


def _weighted(recalls: Tensor, weights: Tensor) -> float | None:
    """Accuracy on a test set with these class frequencies; classes without test samples do not count.

    None if none of the classes has any.
    """
    known = ~recalls.isnan()
    weights = weights[known]
    return float((recalls[known] * weights).sum() / weights.sum()) if weights.any() else None


def _known(accuracies: Mapping[str, float | None]) -> dict[str, float]:
    return {name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}


def _diverged(round: int, lr: float, failed: Mapping[str, str]) -> str:
    name, reason = next(iter(failed.items()))
    first = reason.splitlines()[1].strip(" -") if "\n" in reason else reason
    return (
        f"Round {round}: the training of all {len(failed)} clients diverged (learning rate {lr:g}; "
        f"{name}: {first}). Lower the learning rate."
    )


def _check_fedsgd(split: Split, training: FederatedTraining) -> None:
    if training.local.algorithm == "fedavg":
        return
    sent, trained = split.public_state(), split.public_parameters()
    statistics = [name for name, t in sent.items() if name not in trained and t.is_floating_point()]
    if statistics:
        raise ConfigError(
            f"fedsgd sends gradients only, but '{statistics[0]}' is a public buffer that nobody would "
            "learn. Use algorithm='fedavg', or a defense that keeps norm statistics private."
        )


def _check_tied(split: Split, training: FederatedTraining) -> None:
    """A weight under two names would be stepped under one of them and averaged under the other."""
    if isinstance(_server_optimizer(training), Averaging):
        return
    named = split.public_parameters()
    tensors = split.model.state_dict(keep_vars=True)
    tied = [n for n, t in tensors.items() if isinstance(t, nn.Parameter) and n not in named]
    if tied:
        raise ConfigError(
            f"'{tied[0]}' is another name of a tied weight, which only server averaging of weights handles. "
            "Use training.server of type 'averaging' with algorithm='fedavg', or untie the weight."
        )


def _check_server_knows(aggregation: Aggregation, training: FederatedTraining) -> None:
    """A server steps along what it can read; weights that it cannot are replaced as they are."""
    if aggregation.server_learns == "nothing" and not isinstance(_server_optimizer(training), Averaging):
        raise ConfigError(
            f"aggregation '{aggregation.type}' shows the server no average that an optimizer could step "
            "along. Use training.server of type 'averaging' with algorithm='fedavg', or another aggregation."
        )


def _evaluation_batch(images: Images) -> int:
    """512 images of 32×32 pixels, fewer of larger ones: activations grow with the pixels."""
    return max(1, 512 * 32 * 32 // max(32 * 32, images.shape[-2] * images.shape[-1]))


def _server_optimizer(training: FederatedTraining) -> AnyServerOptimizer:
    """What was asked for; averaged gradients need a step, which is then the one that a client would take."""
    local = training.local
    if local.algorithm == "fedavg" or not isinstance(training.server, Averaging):
        return training.server
    return ServerSGD(
        lr=local.lr,
        momentum=local.momentum,
        nesterov=local.momentum > 0,
        weight_decay=local.weight_decay,
    )


def _on(device: torch.device, images: Images) -> Images:
    """The images on the device where they can be moved; a store that streams delivers on the CPU."""
    return images.to(device) if hasattr(images, "to") else images


def _usable_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but PyTorch finds no GPU. Use device = 'cpu'.")
    return torch.device(name)
