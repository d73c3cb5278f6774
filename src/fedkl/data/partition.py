"""Splits the training samples among clients.

Every scheme is a function of its own that returns one index tensor per client.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from fedkl.errors import DataError


def partition_iid(
    num_samples: int, *, clients: int, generator: torch.Generator
) -> list[Int64[Tensor, " samples"]]:
    """Deals the samples out at random and evenly.

    Args:
        num_samples: Number of samples to split.
        clients: Number of clients, in 1 .. num_samples.
        generator: Source of the random order.

    Returns:
        One tensor of indexes in 0 .. num_samples − 1 per client, on the CPU and without shared memory;
        every sample belongs to exactly one client, and sizes differ by at most 1.

    Raises:
        DataError: `clients` is below 1 or above `num_samples`.

    >>> parts = partition_iid(10, clients=3, generator=torch.Generator().manual_seed(0))
    >>> [len(part) for part in parts]
    [4, 3, 3]
    """
    if not 1 <= clients <= num_samples:
        raise DataError(
            f"partition_iid.clients: expected 1 to {num_samples} clients for {num_samples} samples, "
            f"got {clients}. Every client needs at least one sample: change clients or give more samples."
        )
    order = torch.randperm(num_samples, generator=generator, device=generator.device).cpu()
    return [part.clone() for part in order.tensor_split(clients)]
