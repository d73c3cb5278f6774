"""What a client does, in plain PyTorch. The batch order depends on seed, client and round only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import data, models, rng


def net() -> nn.Module:
    """The plain model, with the same initial weights everywhere."""
    return models.build_model("lenet", channels=3, classes=10, seed=0, initialization="uniform")


def load(name: str, *, images: int) -> data.Dataset:
    """The first `images` training images of a dataset (0: all), and all its test images."""
    full = data.load(name)
    if not images:
        return full
    return data.Dataset(
        full.spec,
        train_images=full.train_images[:images],
        train_labels=full.train_labels[:images],
        test_images=full.test_images,
        test_labels=full.test_labels,
    )


def samples(dataset: data.Dataset, *, client: int, clients: int, seed: int) -> Tensor:
    """Indexes of a client's training images."""
    draws = rng.generator(seed, "partition")
    return data.IID().split(dataset.train_labels, clients=clients, generator=draws)[client]


def train(
    model: nn.Module,
    memory: dict[str, Tensor],
    dataset: data.Dataset,
    index: Tensor,
    *,
    config: Mapping[str, object],
    place: tuple[str, int],
) -> float:
    """One local epoch; the momentum lives in the client's memory.

    Args:
        model: Trained in place.
        memory: Holds the momentum from round to round.
        dataset: All images.
        index: The client's own.
        config: ``batch-size``, ``lr`` and ``seed``.
        place: Name of the client and round from 0.

    Returns:
        Mean loss over the batches.
    """
    model.train()
    named = dict(model.named_parameters())
    optimizer = _optimizer(model, lr=float(config["lr"]))
    for name, momentum in memory.items():
        optimizer.state[named[name]]["momentum_buffer"] = momentum
    order = torch.randperm(len(index), generator=rng.generator(int(config["seed"]), "batches", *place, 0))
    losses = []
    for batch in index[order].split(int(config["batch-size"])):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(dataset.train_images[batch]), dataset.train_labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    memory.update({name: optimizer.state[p]["momentum_buffer"] for name, p in named.items()})
    return float(torch.stack(losses).mean())


def _optimizer(model: nn.Module, *, lr: float) -> torch.optim.Optimizer:
    decay, momentum = 5e-4, 0.9
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, nesterov=True, weight_decay=decay, fused=True
    )


@torch.inference_mode()
def accuracy(model: nn.Module, dataset: data.Dataset) -> float:
    """On all test images, in [0, 1]."""
    model.eval()
    chunks = torch.arange(len(dataset.test_labels)).split(512)
    right = sum(
        int((model(dataset.test_images[i]).argmax(1) == dataset.test_labels[i]).sum()) for i in chunks
    )
    return right / len(dataset.test_labels)
