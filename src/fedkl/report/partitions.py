"""How the training images were divided among the clients, as each training recorded it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from fedkl.data import IID, AnyPartition, Shards
from fedkl.report.collect import TrainRun

MAX_CLIENTS = 100

Counts = Int64[np.ndarray[Any, Any], "clients classes"]
"""How many samples of each class each client has."""


class Division(NamedTuple):
    """One division, and the runs that share it: runs with the same seed and partition do.

    Attributes:
        runs: Names of the runs.
        scheme: How the samples were divided, in words.
        counts: Of all clients.
    """

    runs: list[str]
    scheme: str
    counts: Counts

    @property
    def shown(self) -> Counts:
        """The clients that the figure shows."""
        return self.counts[:MAX_CLIENTS]

    @property
    def caption(self) -> str:
        """What the figure is."""
        text = f"Training images of each class at each client ({self.scheme}) in {', '.join(self.runs)}."
        if len(self.counts) > MAX_CLIENTS:
            text += f" The first {MAX_CLIENTS} of {len(self.counts)} clients are shown."
        return text

    @property
    def alt(self) -> str:
        """The figure in words."""
        clients, classes = self.counts.shape
        samples, present = _range(self.counts.sum(1)), _range((self.counts > 0).sum(1))
        return (
            f"Heat map of training images, clients by classes, and bars of their sums: each of {clients} "
            f"clients has {samples} images, of {present} of {classes} classes ({self.scheme})."
        )


def divisions(trains: Sequence[TrainRun]) -> list[Division]:
    """Every distinct division among several clients; runs that did not record theirs are left out."""
    found: dict[str, Division] = {}
    for run in trains:
        recorded = (r["class_counts"] for r in run.records if r["event"] == "partition")
        counts: list[list[int]] = next(recorded, [])
        if len(counts) > 1:
            scheme = _scheme(run.config.training.partition)
            division = Division([], scheme, np.array(counts, dtype=np.int64))
            found.setdefault(str(counts), division).runs.append(run.name)
    return list(found.values())


def _scheme(partition: AnyPartition) -> str:
    if isinstance(partition, IID):
        return "IID"
    if isinstance(partition, Shards):
        return f"shards, {partition.per_client} a client"
    return f"Dirichlet, α = {partition.alpha:g}"


def _range(values: Int64[np.ndarray[Any, Any], " clients"]) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
