"""Plain averaging: the server has each client's update, and their sample-weighted average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedkl.aggregation.base import Aggregation, RoundAggregation, RoundPlan, Seen, SeenUpdate, ServerLearns
from fedkl.errors import ConfigError, UpdateError, gathered
from fedkl.update import PublicUpdate


class RunningAverage:
    """Averages the updates of one round as they come, weighted by their sample counts.

    It holds one sum, whatever the number of updates.

    Source:
        McMahan et al. 2017, algorithm 1 (FedAvg).
    """

    def __init__(self) -> None:
        self.count = 0
        self._samples = 0
        self._sums: dict[str, Tensor] = {}
        self._differ: set[str] = set()  # integers that are not the same in all updates
        self._first: PublicUpdate | None = None

    @property
    def update_bytes(self) -> int:
        """Size of the tensors of one update; 0 if there is none."""
        tensors = self._first.tensors.values() if self._first else ()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def add(self, update: PublicUpdate) -> None:
        """Takes one more update in.

        Raises:
            UpdateError: It does not belong to the others: another kind, round, name, shape, dtype or flag.
        """
        if self._first is not None:
            _check_belongs(self._first, update)
        for name, tensor in update.tensors.items():
            share = tensor.to(_sum_dtype(tensor)) * update.num_samples
            if name in self._sums:
                self._sums[name] += share
            else:
                self._sums[name] = share
        self._first = first = self._first or update
        integers = [name for name, tensor in update.tensors.items() if not _has_fractions(tensor)]
        self._differ |= {n for n in integers if not torch.equal(update.tensors[n], first.tensors[n])}
        self._samples += update.num_samples
        self.count += 1

    def result(self) -> dict[str, Tensor]:
        """The average by name, in each tensor's own dtype; that of integers (counts of batches) is rounded.

        Integers that are the same in all updates stay as they are, however large.

        Raises:
            UpdateError: There is no update, or a sum is too large for float64, in which averages are formed.
        """
        average, problems = {}, []
        for name, tensor in self._any().tensors.items():
            if name not in self._differ and not _has_fractions(tensor):
                average[name] = tensor.clone()
                continue
            mean = self._sums[name] / self._samples
            average[name] = (mean if _has_fractions(tensor) else mean.round()).to(tensor.dtype)
            problems += [] if _holds(mean, tensor) else [f"'{name}' has values too large to be averaged"]
        if problems:
            raise UpdateError(gathered("Aggregation refused.", problems, "Lower the clients' learning rate."))
        return average

    def _any(self) -> PublicUpdate:
        if self._first is None:
            raise UpdateError("RunningAverage: expected at least one update, got none.")
        return self._first


def weighted_average(updates: Iterable[PublicUpdate]) -> dict[str, Tensor]:
    """The sample-weighted average of the updates of one round, by name; see `RunningAverage`.

    Raises:
        UpdateError: There is no update, or they do not belong together.
    """
    average = RunningAverage()
    for update in updates:
        average.add(update)
    return average.result()


@dataclass(frozen=True, kw_only=True)
class PlainAggregation(Aggregation):
    """Updates come in the clear and are averaged as they come; see `RunningAverage`."""

    type: Literal["plain"] = "plain"

    @property
    def server_learns(self) -> ServerLearns:
        """Each client's update."""
        return "updates"

    def begin(self, plan: RoundPlan, *, record: bool = False) -> PlainRound:
        """Begins a round; without `record` it holds one sum, with it every update."""
        return PlainRound(plan, record=record)


class PlainRound(RoundAggregation[PublicUpdate, dict[str, Tensor]]):
    """One round of plain averaging.

    Args:
        plan: What is agreed.
        record: Whether every update is kept for `what_the_server_sees`.
    """

    def __init__(self, plan: RoundPlan, *, record: bool = False) -> None:
        super().__init__(plan.clients)
        self._plan = plan
        self._average = RunningAverage()
        self._seen: list[Seen] | None = [] if record else None

    @property
    def update_bytes(self) -> int:
        """Size of the tensors of one update; 0 if there is none."""
        return self._average.update_bytes

    def what_the_server_sees(self) -> tuple[Seen, ...]:
        """Each client's update as it sent it, in the order in which they came.

        Raises:
            ConfigError: The round was begun without `record`.
        """
        if self._seen is None:
            raise ConfigError(
                "PlainAggregation: this round kept no updates. Begin it with record=True to see them."
            )
        return tuple(self._seen)

    def _take(self, client: str, update: PublicUpdate) -> None:
        check_planned(self._plan, client, update)
        self._average.add(update)
        if self._seen is not None:
            self._seen.append(SeenUpdate(clients=(client,), update=update))

    def _result(self) -> dict[str, Tensor]:
        return self._average.result()


def check_planned(plan: RoundPlan, client: str, update: PublicUpdate) -> None:
    """The plan's own allow-list, so that the first update does not say how the others must look.

    Raises:
        UpdateError: The update is not one that the plan allows.
    """
    expected, got = (plan.schema.kind, plan.round), (update.kind, update.round)
    if got != expected:
        raise UpdateError(f"Aggregation: expected updates of (kind, round) {expected}, got {got}.")
    if update.schema.specs != plan.schema.specs:  # the update was checked against its own
        plan.schema.check(update.tensors, subject=f"The update of {client}")
    if update.num_samples > plan.clients[client]:
        raise UpdateError(
            f"The update of {client} refused: expected at most {plan.clients[client]} samples, "
            f"got {update.num_samples}."
        )


_EXACT = 2**53  # the integers up to here are all float64's own


def _has_fractions(tensor: Tensor) -> bool:
    """Whether a mean of such tensors is not to be rounded."""
    return tensor.is_floating_point() or tensor.is_complex()


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _holds(mean: Tensor, tensor: Tensor) -> bool:
    """Whether a mean in float64 is what the values of a tensor gave."""
    usable = mean.isfinite() if _has_fractions(tensor) else mean.abs() <= _EXACT
    return bool(usable.all())


def _check_belongs(first: PublicUpdate, update: PublicUpdate) -> None:
    if (update.kind, update.round) != (first.kind, first.round):
        expected, got = (first.kind, first.round), (update.kind, update.round)
        raise UpdateError(f"Aggregation: expected updates of (kind, round) {expected}, got {got}.")
    first.schema.check(update.tensors, subject="Aggregation")
    for name, tensor in first.tensors.items():
        if tensor.dtype == torch.bool and not torch.equal(tensor, update.tensors[name]):
            raise UpdateError(f"Aggregation: '{name}' ({tensor.dtype}) differs between clients.")
