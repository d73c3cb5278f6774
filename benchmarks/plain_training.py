"""A round of FedAvg as an expert would write it for one machine: the bar for fedkl's own trainer.

Each client has a model, momentum and images of its own in memory, contiguous; no data loader, no checks, no
protection. The batches, the optimizer and the average are those of `fedkl.federated.Federation` without a
defense, so that the weights agree to rounding; `training_speed.py round` checks that they do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import rng
from fedkl.types import Images

Layout = Literal["one thread", "all cores", "client per thread"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to write it.

    Attributes:
        layout: Clients one after the other on one thread, the same with all cores for each operation, or as
            many clients at once as there are cores, each with one thread.
        fused: PyTorch's fused SGD, else its default for the CPU.
        channels_last: Memory format of images and weights.
    """

    layout: Layout
    fused: bool
    channels_last: bool

    def __str__(self) -> str:
        options = ["fused"] * self.fused + ["channels_last"] * self.channels_last
        return ", ".join([self.layout, *options])


VARIANTS = [
    Variant(layout=layout, fused=fused, channels_last=channels_last)
    for layout, fused, channels_last in product(
        ("one thread", "all cores", "client per thread"), (False, True), (False, True)
    )
]


class PlainTraining:
    """The clients and the global weights.

    Args:
        model: The initial model, without buffers; not changed.
        images: All training images, in [0, 1].
        labels: Class indexes.
        parts: Indexes of each client's samples; clients have equally many.
        seed: The federation's.
        variant: How it is done.
        cores: CPU cores to use.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        images: Images,
        labels: Tensor,
        parts: Sequence[Tensor],
        seed: int,
        variant: Variant,
        cores: int,
    ) -> None:
        memory = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.variant = variant
        self._seed = seed
        self._cores = cores
        self._data = [(images[part].contiguous(memory_format=memory), labels[part]) for part in parts]
        self._models = [copy.deepcopy(model).to(memory_format=memory).train() for _ in parts]
        self._weights = [[p.data for p in replica.parameters()] for replica in self._models]
        self._optimizers = [
            torch.optim.SGD(
                replica.parameters(),
                lr=0.01,
                momentum=0.9,
                nesterov=True,
                weight_decay=5e-4,
                fused=variant.fused or None,
            )
            for replica in self._models
        ]
        self._names = [name for name, _ in model.named_parameters()]
        self._average = [weight.clone() for weight in self._weights[0]]

    def state(self) -> dict[str, Tensor]:
        """The global weights by name."""
        return dict(zip(self._names, self._average, strict=True))

    def run_round(self, round: int) -> None:
        """Every client trains one epoch from the global weights; the mean replaces them."""
        clients = range(len(self._data))
        layout = self.variant.layout
        if layout == "client per thread":
            # OpenMP counts threads per calling thread: each has to be told.
            with ThreadPoolExecutor(
                self._cores, initializer=torch.set_num_threads, initargs=(1,)
            ) as executor:
                list(executor.map(lambda client: self._train(client, round), clients))
        else:
            torch.set_num_threads(self._cores if layout == "all cores" else 1)
            for client in clients:
                self._train(client, round)
        torch.set_num_threads(self._cores)
        torch._foreach_zero_(self._average)
        for weights in self._weights:
            torch._foreach_add_(self._average, weights, alpha=1 / len(self._data))

    def _train(self, client: int, round: int) -> None:
        (images, labels), model = self._data[client], self._models[client]
        optimizer = self._optimizers[client]
        torch._foreach_copy_(self._weights[client], self._average)
        generator = rng.generator(self._seed, "batches", f"client-{client}", round, 0)
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
