"""Makes the weights of an example: ``python examples/audit/train.py quickstart``.

With another training seed, into another file: ``… quickstart --seed 1 --out other.safetensors``.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

import fedkl
from fedkl.data import Subset, load
from fedkl.types import Images

Labeled = tuple[Images, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained, with a learning rate that rises and falls once.

    Attributes:
        data: Gives the images to train on and, unless the subject's own are meant, others to test on.
        optimizer: Of its parameters.
        lr: The highest learning rate.
        batch: Images of a step.
        stages: One after the other: height and width of the images in pixels, and epochs.
    """

    data: Callable[[], tuple[Labeled, Labeled | None]]
    optimizer: Callable[..., Optimizer]
    lr: float
    batch: int
    stages: tuple[tuple[int, float], ...]


def cifar10() -> tuple[Labeled, Labeled]:
    """Its training images and its test images."""
    found = load("cifar10")
    return (found.train_images, found.train_labels), (found.test_images, found.test_labels)


def mnist() -> tuple[Labeled, Labeled]:
    """Its training images without those that are audited, and its test images."""
    unseen = importlib.import_module("vit").UNSEEN
    found = load("mnist", size=28, channels=1)
    training = Subset(found.train_images, slice(unseen, None)), found.train_labels[unseen:]
    return training, (found.test_images, found.test_labels)


def tiles() -> tuple[Labeled, None]:
    """One side of the picture; the other one is tested on."""
    return importlib.import_module("tiles").tiles(trained=True), None


_SGD = partial(SGD, momentum=0.9, weight_decay=5e-4)
RECIPES = {
    "quickstart": Recipe(data=cifar10, optimizer=_SGD, lr=0.02, batch=32, stages=((32, 8),)),
    # An epoch at half the size costs a quarter of one.
    "resnet": Recipe(data=cifar10, optimizer=_SGD, lr=0.2, batch=64, stages=((16, 2), (32, 0.4))),
    "vit": Recipe(data=mnist, optimizer=AdamW, lr=3e-3, batch=64, stages=((28, 1),)),
    "tiles": Recipe(data=tiles, optimizer=_SGD, lr=0.02, batch=8, stages=((24, 30),)),
}


def fit(network: nn.Module, subject: fedkl.Subject, recipe: Recipe, data: Labeled, *, seed: int) -> None:
    """Trains a network that `subject` called for, in place."""
    images, labels = data
    order = torch.Generator().manual_seed(seed)
    steps = [(side, int(epochs * len(labels)) // recipe.batch) for side, epochs in recipe.stages]
    total = sum(count for _, count in steps)
    optimizer = recipe.optimizer(network.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=total)
    network.train()
    for side, count in steps:
        for batch in batches(len(labels), recipe.batch, count, generator=order):
            inputs = subject.inputs(F.interpolate(images[batch], size=side, mode="area"))
            optimizer.zero_grad()
            F.cross_entropy(scores(network(inputs)), labels[batch]).backward()
            optimizer.step()
            schedule.step()


def batches(images: int, size: int, count: int, *, generator: torch.Generator) -> list[Tensor]:
    """Indexes of so many batches, each image as often as any other, give or take once."""
    epochs = -(-size * count // images)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(epochs)])
    return list(order[: size * count].split(size))


def scores(output: object) -> Tensor:
    """Class scores out of what a network returns."""
    return getattr(output, "logits", output)


@torch.no_grad()
def accuracy(network: nn.Module, subject: fedkl.Subject, data: Labeled) -> float:
    """The share of right answers, in [0, 1]."""
    images, labels = data
    network.eval()
    right = [
        scores(network(subject.inputs(images[part]))).argmax(1) == labels[part]
        for part in torch.arange(len(labels)).split(500)
    ]
    return float(torch.cat(right).float().mean())


def main(name: str, *, seed: int, out: str | None) -> None:
    """Trains, saves and tests."""
    subject = importlib.import_module(name).subject()
    training, test = RECIPES[name].data()
    torch.manual_seed(seed)
    network = subject.model()
    fit(network, subject, RECIPES[name], training, seed=seed)
    safetensors.torch.save_file(network.state_dict(), out or str(subject.weights))
    print(f"{name}: {accuracy(network, subject, test or (subject.images, subject.labels)):.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="file of the weights; the example's own if not given")
    given = parser.parse_args()
    main(given.name, seed=given.seed, out=given.out)
