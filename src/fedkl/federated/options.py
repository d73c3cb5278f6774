"""What a federated training is, as data: how a client trains, who takes part, on what it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from fedkl.aggregation import AnyAggregation, PlainAggregation
from fedkl.data import AUGMENTATIONS, IID, AnyPartition
from fedkl.errors import ConfigError, gathered
from fedkl.federated.schedules import AnySchedule, StepSchedule
from fedkl.federated.server import AnyServerOptimizer, Averaging, ServerSGD
from fedkl.privacy import PrivacyOptions
from fedkl.protocol import Procedure

NormStatistics = Literal["recalibrated", "kept"]
"""What clients do with their norms' private running statistics; see `FederatedTraining`."""


@dataclass(frozen=True, kw_only=True)
class LocalTraining(Procedure):
    """How a federation's client trains. Defaults: arXiv 2305.04095, section 5.

    With ``algorithm="fedsgd"`` one gradient of one batch is sent; the private parameters take a local step of
    their own.

    Attributes:
        keep_optimizer: Whether a client's optimizer state persists over the rounds, as published.
    """

    algorithm: Literal["fedavg", "fedsgd"] = "fedavg"
    batch_size: int | None = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    keep_optimizer: bool = True

    def sampling_rate(self, images: int) -> float:
        """As of `Procedure`; a gradient is of one batch here, too."""
        return min(1.0, (self.batch_size or images) / images)

    def _checks(self) -> dict[str, bool]:
        return super()._checks() | {
            f"augmentation: expected one of {', '.join(AUGMENTATIONS)}, got {self.augmentation!r}": (
                self.augmentation in AUGMENTATIONS
            ),
            f"steps: with algorithm='fedsgd' a client takes one, got {self.steps}": (
                self.algorithm == "fedavg" or self.steps in (None, 1)
            ),
        }


@dataclass(frozen=True, kw_only=True)
class FederatedTraining:
    """How a federation trains. Defaults: arXiv 2305.04095, section 5.

    Attributes:
        clients: Number of clients. 1 is centralized training.
        cohort: How many of them are sampled each round; None: all.
        dropout: Probability, in [0, 1), that a sampled client is gone before it trains.
        min_cohort: Updates that a round needs; with fewer the global model stays as it was, and clients that
            did train keep what they learned for themselves.
        rounds: Communication rounds.
        partition: How the training images are divided.
        schedule: Of the learning rate.
        server: What the server does with the average of the updates.
        aggregation: How the updates of a round are put together, and thus what the server sees of each.
        eval_every: Rounds between evaluations; the last round is always evaluated.
        eval_clients: At most so many clients are evaluated: the first, in an order drawn once, of those that
            have trained.
        norm_statistics: Whether a client counts its norms' private running statistics anew before it uses a
            global model (``"recalibrated"``; `fedkl.locking.recalibrate_norms_`), or uses those that its last
            training left, which are of the weights that it sent (``"kept"``). No effect on what is sent.
        local: How a client trains.
        privacy: What is accounted for, where the defense gives a guarantee.
    """

    clients: int = 3
    cohort: int | None = None
    dropout: float = 0.0
    min_cohort: int = 1
    rounds: int = 200
    partition: Annotated[AnyPartition, Field(discriminator="type")] = field(default_factory=IID)
    schedule: Annotated[AnySchedule, Field(discriminator="type")] = field(default_factory=StepSchedule)
    server: Annotated[AnyServerOptimizer, Field(discriminator="type")] = field(default_factory=Averaging)
    aggregation: Annotated[AnyAggregation, Field(discriminator="type")] = field(
        default_factory=PlainAggregation
    )
    eval_every: int = 1
    eval_clients: int = 20
    norm_statistics: NormStatistics = "recalibrated"
    local: LocalTraining = field(default_factory=LocalTraining)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)

    def __post_init__(self) -> None:
        cohort = self.cohort_size
        averages = isinstance(self.server, Averaging)
        checks = {
            f"{name}: expected at least 1, got {value}": value >= 1
            for name, value in (
                ("clients", self.clients),
                ("rounds", self.rounds),
                ("eval_every", self.eval_every),
                ("eval_clients", self.eval_clients),
            )
        }
        checks[f"cohort: expected 1 to {self.clients} (clients), got {cohort}"] = 1 <= cohort <= self.clients
        checks[f"min_cohort: expected 1 to {cohort} (cohort), got {self.min_cohort}"] = (
            1 <= self.min_cohort <= cohort
        )
        checks[
            "server: averaged gradients need a step, and only clients with SGD say which; with algorithm="
            "'fedsgd' and optimizer='adam' expected a server of type 'sgd' or 'adam', got averaging"
        ] = not (averages and self.local.algorithm == "fedsgd" and self.local.optimizer == "adam")
        checks[f"dropout: expected a probability in [0, 1), got {self.dropout}"] = 0 <= self.dropout < 1
        _check("FederatedTraining", checks)

    @property
    def cohort_size(self) -> int:
        """Clients sampled each round."""
        return self.clients if self.cohort is None else self.cohort

    @property
    def server_optimizer(self) -> AnyServerOptimizer:
        """What was asked for; averaged gradients need a step, which is the one that a client would take."""
        local = self.local
        if local.algorithm == "fedavg" or not isinstance(self.server, Averaging):
            return self.server
        return ServerSGD(
            lr=local.lr,
            momentum=local.momentum,
            nesterov=local.momentum > 0,
            weight_decay=local.weight_decay,
        )

    def lr_at(self, round: int) -> float:
        """The clients' learning rate in a round, from 0."""
        return self.local.lr * self.schedule.factor(round, rounds=self.rounds)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """On what a training runs. Without dropout, results depend on it in the last bits only.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        workers: Clients that train at once, each on a model instance and threads of its own; 0: as many as
            PyTorch has threads (``OMP_NUM_THREADS``), 1 on a GPU.
        channels_last: Memory format of the weights of convolutions; faster for ResNets.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    workers: int = 0
    channels_last: bool = False

    def __post_init__(self) -> None:
        _check(
            "Execution", {f"workers: expected 0 (automatic) or more, got {self.workers}": self.workers >= 0}
        )


def _check(subject: str, checks: dict[str, bool]) -> None:
    problems = [problem for problem, fine in checks.items() if not fine]
    if problems:
        raise ConfigError(gathered(f"{subject} is not usable.", problems, "Correct these fields."))
