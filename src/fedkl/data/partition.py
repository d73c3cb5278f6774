"""Splits the training samples among clients: evenly, by shards of sorted labels, or by Dirichlet shares.

Every scheme is a frozen dataclass with a `type`, added to the union `AnyPartition`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from fedkl.errors import ConfigError, DataError

_REDRAWS = 1000

Parts = list[Int64[Tensor, " _"]]
"""Indexes of the samples of each client, on the CPU and without shared memory."""


@runtime_checkable
class Partition(Protocol):
    """A way to split samples among clients."""

    def split(self, labels: Int64[Tensor, " samples"], *, clients: int, generator: torch.Generator) -> Parts:
        """Gives every sample to exactly one client, and every client at least one sample.

        Args:
            labels: Class indexes of the samples, from 0.
            clients: Number of clients, at least 1.
            generator: The only source of randomness.

        Returns:
            One tensor of sample indexes per client.

        Raises:
            DataError: The samples do not suffice for that many clients.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class IID:
    """Deals the samples out at random and evenly: sizes differ by at most 1.

    >>> parts = IID().split(torch.zeros(10).long(), clients=3, generator=torch.Generator().manual_seed(0))
    >>> [len(part) for part in parts]
    [4, 3, 3]
    """

    type: Literal["iid"] = "iid"

    def split(self, labels: Int64[Tensor, " samples"], *, clients: int, generator: torch.Generator) -> Parts:
        """See `Partition.split`."""
        _check_count(self, samples=len(labels), clients=clients, each=1)
        order = _permutation(len(labels), generator)
        return [part.clone() for part in order.tensor_split(clients)]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Sorts the samples by label, cuts them into `clients × per_client` shards and deals these at random.

    Most clients see about `per_client` classes. Shards differ by at most one sample in size.

    Attributes:
        per_client: Shards of each client.

    Source:
        McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        section 3 (200 shards of 300 MNIST digits, two for each of 100 clients).

    Raises:
        ConfigError: `per_client` is below 1.

    >>> labels = torch.tensor([1, 0, 1, 0])
    >>> parts = Shards(per_client=1).split(labels, clients=2, generator=torch.Generator().manual_seed(0))
    >>> sorted(labels[part].tolist() for part in parts)
    [[0, 0], [1, 1]]
    """

    type: Literal["shards"] = "shards"
    per_client: int = 2

    def __post_init__(self) -> None:
        if self.per_client < 1:
            raise ConfigError(f"Shards: expected per_client ≥ 1, got per_client={self.per_client}.")

    def split(self, labels: Int64[Tensor, " samples"], *, clients: int, generator: torch.Generator) -> Parts:
        """See `Partition.split`."""
        _check_count(self, samples=len(labels), clients=clients, each=self.per_client)
        shards = labels.cpu().argsort(stable=True).tensor_split(clients * self.per_client)
        dealt = _permutation(len(shards), generator).view(clients, self.per_client)
        return [torch.cat([shards[shard] for shard in row]) for row in dealt.tolist()]


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Divides each class among the clients in shares drawn from Dir(alpha, …, alpha).

    The smaller `alpha`, the more the clients differ in classes and in size. The shares are drawn again until
    every client has `min_samples`.

    Attributes:
        alpha: Concentration, above 0.
        min_samples: The least samples of a client.

    Source:
        Li et al. 2022, "Federated Learning on Non-IID Data Silos", section 4.1 (label distribution skew,
        p_k ~ Dir_N(β)). Their code also stops giving to clients that have their fair share already; this one
        does not. Hsu et al. 2019 draw each client's class shares instead, at equal sizes.

    Raises:
        ConfigError: `alpha` is not a finite number above 0, or `min_samples` is below 1.

    >>> labels = torch.arange(100) % 10
    >>> parts = Dirichlet().split(labels, clients=4, generator=torch.Generator().manual_seed(0))
    >>> sum(len(part) for part in parts)
    100
    """

    type: Literal["dirichlet"] = "dirichlet"
    alpha: float = 0.5
    min_samples: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf or self.min_samples < 1:
            raise ConfigError(
                "Dirichlet: expected a finite alpha > 0 and min_samples ≥ 1, got "
                f"alpha={self.alpha}, min_samples={self.min_samples}."
            )

    def split(self, labels: Int64[Tensor, " samples"], *, clients: int, generator: torch.Generator) -> Parts:
        """See `Partition.split`."""
        _check_count(self, samples=len(labels), clients=clients, each=self.min_samples)
        labels = labels.cpu()
        sizes = labels.bincount()
        # torch's gamma sampler takes a generator only in private functions, so its seed goes to NumPy.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        ends = self._ends(sizes.numpy(), clients=clients, random=np.random.default_rng(seed))
        mine: list[list[Tensor]] = [[] for _ in range(clients)]
        for label, size in enumerate(sizes.tolist()):
            members = (labels == label).nonzero()[:, 0][_permutation(size, generator)]
            for client, piece in enumerate(members.tensor_split(ends[label, :-1])):
                mine[client].append(piece)
        return [torch.cat(pieces) for pieces in mine]

    def _ends(
        self, sizes: np.ndarray[tuple[int], np.dtype[np.int64]], *, clients: int, random: np.random.Generator
    ) -> Int64[Tensor, "classes clients"]:
        """Where each client's piece of each class ends."""
        for _ in range(_REDRAWS):
            shares = random.dirichlet(np.full(clients, self.alpha), size=len(sizes))
            ends = np.rint(shares.cumsum(1) * sizes[:, None]).astype(np.int64)
            ends[:, -1] = sizes
            if np.diff(ends, axis=1, prepend=0).sum(0).min() >= self.min_samples:
                return torch.from_numpy(ends)
        raise DataError(
            f"Dirichlet: expected at least {self.min_samples} samples for each of {clients} clients, but "
            f"none of {_REDRAWS} draws with alpha={self.alpha} gave that. Raise alpha, or lower min_samples "
            "or the number of clients."
        )


AnyPartition = IID | Shards | Dirichlet


def class_counts(
    labels: Int64[Tensor, " samples"], parts: Sequence[Int64[Tensor, " _"]], *, classes: int
) -> Int64[Tensor, "clients classes"]:
    """How many samples of each class each client has.

    Args:
        labels: Class indexes of all samples, in 0 .. classes − 1.
        parts: Sample indexes of each client.
        classes: Number of classes.

    >>> class_counts(torch.tensor([0, 1, 1]), [torch.tensor([0, 1]), torch.tensor([2])], classes=3)
    tensor([[1, 1, 0],
            [0, 1, 0]])
    """
    return torch.stack([labels[part].bincount(minlength=classes) for part in parts])


def _check_count(partition: Partition, *, samples: int, clients: int, each: int) -> None:
    if not 1 <= clients * each <= samples:
        raise DataError(
            f"{type(partition).__name__}: expected 1 to {samples // each} clients for {samples} samples, "
            f"got {clients}. Every client needs at least {each}: change clients or give more samples."
        )


def _permutation(count: int, generator: torch.Generator) -> Int64[Tensor, " {count}"]:
    return torch.randperm(count, generator=generator, device=generator.device).cpu()
