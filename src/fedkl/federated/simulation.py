"""Rounds of clients and server in one process."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.aggregation import Aggregation, FederationPlan, OnSeen, RoundAggregation, RoundPlan
from fedkl.data import Dataset, class_counts
from fedkl.defenses import Defense
from fedkl.errors import FedKLError, RoundLostError, TrainingError, UpdateError, problems_of
from fedkl.federated.accounting import ledger_of
from fedkl.federated.checks import (
    check_called,
    check_fedsgd,
    check_server_knows,
    check_tied,
    usable_device,
)
from fedkl.federated.client import Client, clients_of
from fedkl.federated.evaluation import TestSet, weighted
from fedkl.federated.options import Execution, FederatedTraining
from fedkl.federated.pool import WorkerPool
from fedkl.federated.round_result import RoundResult
from fedkl.federated.server import Averaging, Server
from fedkl.federated.worker import UPDATE_KINDS, ClientResult, Samples, Worker
from fedkl.locking import Split
from fedkl.protocol import Sending
from fedkl.types import Images, NamedTensors
from fedkl.update import PublicUpdate


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
        ConfigError: The options do not go together; or the model has numbers that are not finite.
        DataError: The samples cannot be divided among so many clients; or the model cannot be called with
            them, or returns no class scores.
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
        self._device = usable_device(execution.device)
        parts = training.partition.split(
            dataset.train_labels, clients=training.clients, generator=rng.generator(seed, "partition")
        )
        self.class_counts = class_counts(dataset.train_labels, parts, classes=dataset.spec.classes)
        probe = dataset.train_images[torch.arange(2) % len(dataset.train_images)]
        check_called(model, probe, classes=dataset.spec.classes)
        self.clients = clients_of(parts, defense, model)
        self._indexes = {client.name: index for index, client in enumerate(self.clients)}
        options = aggregation or training.aggregation
        check_server_knows(options, training)
        self.aggregation = options.for_federation(self._federation_plan())
        self._test = TestSet(
            images=_on(self._device, dataset.test_images),
            labels=dataset.test_labels,
            classes=dataset.spec.classes,
        )
        self._pool = WorkerPool.of(
            model,
            defense=defense,
            training=training,
            samples=Samples(
                images=_on(self._device, dataset.train_images), labels=dataset.train_labels.to(self._device)
            ),
            probe=probe,
            seed=seed,
            execution=execution,
        )
        self.split.check_finite(subject="Federation")
        check_tied(self.split, training)
        check_fedsgd(self.split, training)
        defense.check_sent(self.split.schema(UPDATE_KINDS[training.local.algorithm]))
        self.ledger = ledger_of(self.clients, defense=defense, training=training, model=self.split.model)
        self.server = Server(
            self.split.public_state(),
            trained=list(self.split.trained_parameters()),
            optimizer=training.server_optimizer,
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
            TrainingError: The training of all clients of a round diverged, or a step of the server's.
            ConfigError: The privacy budget does not suffice for one round, or the ledger does not know what
                rounds before `start` spent.
        """
        if self.ledger is not None:
            self.ledger.check_behind(start)
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
                federation has more than one; or the server's step overflows.
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
                losses += [result.loss] if isfinite(result.loss) else []  # under a guarantee nobody is told
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

    def _federation_plan(self) -> FederationPlan:
        return FederationPlan(
            clients={client.name: client.num_samples for client in self.clients},
            sampled=self.training.cohort is not None,
            steps=not isinstance(self.training.server_optimizer, Averaging),
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
                return worker.train(
                    client,
                    state,
                    round=round,
                    lr=lr,
                    transform=self._transformed,
                    guaranteed=self.ledger is not None,
                )
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
        except (Exception, SystemExit) as error:  # of a defense from outside the package
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
        state, recalls_of = self.server.state, self._test.recalls
        evaluated = self.evaluated_clients()
        if self.split.private_names:
            results = self._pool.map(lambda worker, client: worker.run(client, state, recalls_of), evaluated)
            recalls = {client.name: recall for client, recall in results}
        else:  # the clients' models are one and the same
            shared = self._pool.workers[0].run(evaluated[0], state, recalls_of)
            recalls = {client.name: shared for client in evaluated}
        own = {client.name: self.class_counts[self._indexes[client.name]].double() for client in evaluated}
        return self._test.accuracies(recalls), weighted(recalls, own)

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


def _refusal(
    collected: RoundAggregation[PublicUpdate, dict[str, Tensor]], client: Client, result: ClientResult
) -> UpdateError | None:
    """Why a client's update was not taken in; None if it was."""
    try:
        collected.offer(client.name, result.update)
    except UpdateError as error:
        return error
    return None


def _diverged(round: int, lr: float, failed: Mapping[str, str]) -> str:
    """Why a round gives nothing; only of numbers that are not finite the learning rate may be the cause."""
    name, reason = next(((n, r) for n, r in failed.items() if _NON_FINITE in r), next(iter(failed.items())))
    first, *_ = problems_of(reason) or [reason]
    if _NON_FINITE not in reason:
        remedy = reason.splitlines()[-1] if problems_of(reason) else ""
        refused = f"Round {round}: the updates of all {len(failed)} clients were refused ({name}: {first})."
        return f"{refused} {remedy}".rstrip()
    return (
        f"Round {round}: the training of all {len(failed)} clients diverged (learning rate {lr:g}; "
        f"{name}: {first}). Lower the learning rate."
    )


_NON_FINITE = "non-finite"


def _on(device: torch.device, images: Images) -> Images:
    """The images on the device where they can be moved; a store that streams delivers on the CPU."""
    return images.to(device) if hasattr(images, "to") else images
