"""The sample-weighted average of updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkl.errors import UpdateError
from fedkl.update import PublicUpdate


def weighted_average(updates: Sequence[PublicUpdate]) -> dict[str, Tensor]:
    """Averages updates of one round, weighted by their sample counts.

    Args:
        updates: At least one; all of the same kind, round, names and shapes.

    Returns:
        The average by name, in each tensor's own dtype; that of integers (a norm's count of batches) is
        rounded.

    Raises:
        UpdateError: There is no update, or they do not belong together.

    Source:
        McMahan et al. 2017, algorithm 1 (FedAvg).
    """
    if not updates:
        raise UpdateError("weighted_average: expected at least one update, got none.")
    first = updates[0]
    for update in updates[1:]:
        if (update.kind, update.round) != (first.kind, first.round):
            expected, got = (first.kind, first.round), (update.kind, update.round)
            raise UpdateError(f"weighted_average: expected updates of (kind, round) {expected}, got {got}.")
        first.schema.check(update.tensors, subject="weighted_average")
    total = sum(update.num_samples for update in updates)
    average = {}
    for name, tensor in first.tensors.items():
        stacked = [update.tensors[name] for update in updates]
        if tensor.dtype == torch.bool and not all(torch.equal(tensor, other) for other in stacked):
            raise UpdateError(f"weighted_average: '{name}' ({tensor.dtype}) differs between clients.")
        shares = [update.num_samples / total for update in updates]
        mean = torch.stack([t.double() * share for t, share in zip(stacked, shares, strict=True)]).sum(0)
        average[name] = (mean if tensor.is_floating_point() else mean.round()).to(tensor.dtype)
    return average
