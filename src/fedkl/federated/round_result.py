"""What came of one round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean


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
