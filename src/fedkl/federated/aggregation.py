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
        The average by name, in each tensor's own dtype; tensors of integers must agree and are kept.

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
        if tensor.is_floating_point() or tensor.is_complex():
            weighted = sum(
                t.double() * (u.num_samples / total) for t, u in zip(stacked, updates, strict=True)
            )
            average[name] = torch.as_tensor(weighted).to(tensor.dtype)
        elif all(torch.equal(tensor, other) for other in stacked):
            average[name] = tensor.clone()
        else:
            raise UpdateError(f"weighted_average: '{name}' ({tensor.dtype}) differs between clients.")
    return average
