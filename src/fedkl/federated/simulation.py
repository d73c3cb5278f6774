"""Rounds of clients and server in one process; one model instance serves all clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from time import perf_counter
from typing import Literal

from torch import nn

from fedkl import rng
from fedkl.data import Dataset, partition_iid
from fedkl.defenses import Defense
from fedkl.errors import ConfigError
from fedkl.federated.client import Client, LocalTraining
from fedkl.federated.server import Server
from fedkl.metrics import evaluate


@dataclass(frozen=True, kw_only=True)
class FederatedTraining:
    """How a federation trains. Defaults: arXiv 2305.04095, section 5.

    Attributes:
        clients: Number of clients; all take part in every round. 1 is centralized training.
        rounds: Communication rounds.
        partition: How the training images are divided.
        eval_every: Rounds between evaluations; the last round is always evaluated.
        local: How a client trains.
    """

    clients: int = 3
    rounds: int = 200
    partition: Literal["iid"] = "iid"
    eval_every: int = 1
    local: LocalTraining = field(default_factory=LocalTraining)

    def __post_init__(self) -> None:
        if self.clients < 1 or self.rounds < 1 or self.eval_every < 1:
            got = f"clients={self.clients}, rounds={self.rounds}, eval_every={self.eval_every}"
            raise ConfigError(f"FederatedTraining: expected all of these ≥ 1, got {got}.")


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """One round.

    Attributes:
        round: From 0.
        seconds: Wall time of the clients' training and the aggregation, without evaluation.
        accuracies: Test accuracy of the new global model by client, each with its own private state, in
            [0, 1]; empty where the round was not evaluated.
        update_bytes: Size of one client's update as sent.
    """

    round: int
    seconds: float
    accuracies: dict[str, float]
    update_bytes: int

    @property
    def accuracy(self) -> float | None:
        """Mean over clients."""
        return fmean(self.accuracies.values()) if self.accuracies else None


class Federation:
    """A server and its clients over one dataset.

    Args:
        model: The plain architecture with its initial weights; not changed.
        defense: What every client does.
        dataset: Training images are divided among the clients; test images evaluate them.
        training: How it trains.
        seed: Of the partition and the batch orders. Keys and lock layers come from the operating system.
    """

    def __init__(
        self, model: nn.Module, *, defense: Defense, dataset: Dataset, training: FederatedTraining, seed: int
    ) -> None:
        self.defense = defense
        self.training = training
        self._dataset = dataset
        parts = partition_iid(
            len(dataset.train_images), clients=training.clients, generator=rng.generator(seed, "partition")
        )
        splits = [defense.prepare(model) for _ in parts]
        # One instance trains for all: clients differ in key, private state and optimizer only.
        self.split = splits[0]
        self.clients = [
            Client(
                name=f"client-{index}",
                images=dataset.train_images[part],
                labels=dataset.train_labels[part],
                split=split,
                training=training.local,
                seed=seed,
            )
            for index, (part, split) in enumerate(zip(parts, splits, strict=True))
        ]
        local = training.local
        self.server = Server(
            self.split.public_state(), momentum=local.momentum, weight_decay=local.weight_decay
        )

    def run(self) -> Iterator[RoundResult]:
        """Trains all rounds, yielding each as it is done."""
        for round in range(self.training.rounds):
            yield self.run_round(round)

    def run_round(self, round: int) -> RoundResult:
        """One round: every client trains on the server's state, the server averages."""
        start = perf_counter()
        state = self.server.state
        updates = [
            self.defense.transform(client.update(self.split, state, round=round)) for client in self.clients
        ]
        self.server.aggregate(updates, lr=self.training.local.lr_at(round))
        seconds = perf_counter() - start
        last = round == self.training.rounds - 1
        due = last or round % self.training.eval_every == self.training.eval_every - 1
        return RoundResult(
            round=round,
            seconds=seconds,
            accuracies=self.evaluate() if due else {},
            update_bytes=sum(t.numel() * t.element_size() for t in updates[0].tensors.values()),
        )

    def evaluate(self) -> dict[str, float]:
        """Test accuracy in [0, 1] of the global model by client, each with its own private state."""
        state = self.server.state
        result: dict[str, float] = {}
        for client in self._distinct_clients():
            client.enter(self.split, state)
            result[client.name] = evaluate(
                self.split.model, self._dataset.test_images, self._dataset.test_labels
            )
        return result

    def _distinct_clients(self) -> Sequence[Client]:
        """Without private tensors the clients' models are one and the same."""
        return self.clients if self.split.private_names else self.clients[:1]
