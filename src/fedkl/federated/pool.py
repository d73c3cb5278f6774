"""The workers of a federation, and who has which at what time."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.defenses import Defense
from fedkl.errors import ConfigError
from fedkl.federated.client import Client
from fedkl.federated.options import Execution, FederatedTraining
from fedkl.federated.worker import Samples, Worker
from fedkl.locking import copied

_Result = TypeVar("_Result")


class WorkerPool:
    """Runs tasks for clients on several workers at once, each on PyTorch threads of its own.

    A client's task gets the same number of threads whatever the others do: the last bits of a result may
    depend on it, and a resumed training must repeat them.

    Args:
        workers: At least one.
        threads: PyTorch's intra-op threads to share out.
    """

    def __init__(self, workers: Sequence[Worker], *, threads: int) -> None:
        self.workers = tuple(workers)
        self.threads = threads

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        defense: Defense,
        training: FederatedTraining,
        samples: Samples,
        probe: Tensor,
        seed: int,
        execution: Execution,
    ) -> WorkerPool:
        """As many workers as were asked for and can be used.

        Args:
            model: The plain architecture; not changed.
            defense: What every client does.
            training: How it trains.
            samples: The training samples of all clients, on the device.
            probe: A few training images, to see whether the model draws random numbers.
            seed: Of the batch orders.
            execution: On what it runs.
        """
        threads = torch.get_num_threads()
        wanted = execution.workers or (threads if execution.device == "cpu" else 1)
        first = defense.prepare(model)
        draws = draws_random_numbers(first.model, probe)
        if draws:
            wanted = 1  # threads would share one generator, and their turns would decide the result
        count = max(1, min(wanted, training.cohort_size, os.cpu_count() or 1))
        memory = torch.channels_last if execution.channels_last else torch.contiguous_format
        splits = [first, *(defense.prepare(model) for _ in range(count - 1))]
        local = defense.procedure(training.local)
        for split in splits:
            split.model.to(execution.device).to(memory_format=memory)  # type: ignore[call-overload]
        workers = [
            Worker(
                split,
                training=local,
                data=samples,
                seed=seed,
                draws=draws,
                recalibrates=training.norm_statistics == "recalibrated",
            )
            for split in splits
        ]
        return cls(workers, threads=threads)

    def map(
        self, task: Callable[[Worker, Client], _Result], clients: Sequence[Client]
    ) -> Iterator[tuple[Client, _Result]]:
        """Runs a task for every client; results come in an order that depends on the clients only.

        Args:
            task: Called with a worker that is free and the client.
            clients: Whom to run it for.
        """
        free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            free.put(worker)

        def run(client: Client) -> tuple[Client, _Result]:
            worker = free.get()
            try:
                return client, task(worker, client)
            finally:
                free.put(worker)

        largest_first = sorted(clients, key=lambda client: -client.num_samples)
        threads = max(1, self.threads // len(self.workers))
        before = torch.get_num_threads()
        try:
            if len(self.workers) == 1:
                torch.set_num_threads(threads)
                yield from map(run, largest_first)
                return
            with ThreadPoolExecutor(
                len(self.workers), initializer=torch.set_num_threads, initargs=(threads,)
            ) as executor:
                yield from executor.map(run, largest_first)
        finally:
            torch.set_num_threads(before)


def draws_random_numbers(model: nn.Module, images: Tensor) -> bool:
    """Whether a training step draws from a global generator, which all threads share: PyTorch's or others.

    Args:
        model: Not changed.
        images: At least two, for norms that need a batch.
    """
    probe = copied(model, subject="Federation", error=ConfigError)
    probe.train()
    with rng.seeded(0, device=images.device), torch.no_grad():
        before = _states(images.device)
        probe(images)
        return _states(images.device) != before


def _states(device: torch.device) -> list[Any]:
    """Of the global generators."""
    of_torch = [torch.get_rng_state()]
    if device.type == "cuda":
        of_torch.append(torch.cuda.get_rng_state(device))
    of_numpy = repr(np.random.get_state(legacy=False))  # noqa: NPY002
    return [*(each.tolist() for each in of_torch), random.getstate(), of_numpy]
