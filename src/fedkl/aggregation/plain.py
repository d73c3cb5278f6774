"""The sample-weighted average of updates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedkl.errors import UpdateError, gathered
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
            share = tensor.double() * update.num_samples
            if name in self._sums:
                self._sums[name] += share
            else:
                self._sums[name] = share
        self._first = self._first or update
        self._samples += update.num_samples
        self.count += 1

    def result(self) -> dict[str, Tensor]:
        """The average by name, in each tensor's own dtype; that of integers (counts of batches) is rounded.

        Raises:
            UpdateError: There is no update, or a sum is too large for float64, in which averages are formed.
        """
        average, problems = {}, []
        for name, tensor in self._any().tensors.items():
            mean = self._sums[name] / self._samples
            average[name] = (mean if tensor.is_floating_point() else mean.round()).to(tensor.dtype)
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


_EXACT = 2**53  # the integers up to here are all float64's own


def _holds(mean: Tensor, tensor: Tensor) -> bool:
    """Whether a mean in float64 is what the values of a tensor gave."""
    usable = mean.isfinite() if tensor.is_floating_point() else mean.abs() <= _EXACT
    return bool(usable.all())


def _check_belongs(first: PublicUpdate, update: PublicUpdate) -> None:
    if (update.kind, update.round) != (first.kind, first.round):
        expected, got = (first.kind, first.round), (update.kind, update.round)
        raise UpdateError(f"Aggregation: expected updates of (kind, round) {expected}, got {got}.")
    first.schema.check(update.tensors, subject="Aggregation")
    for name, tensor in first.tensors.items():
        if tensor.dtype == torch.bool and not torch.equal(tensor, update.tensors[name]):
            raise UpdateError(f"Aggregation: '{name}' ({tensor.dtype}) differs between clients.")
