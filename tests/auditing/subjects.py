"""Subjects small enough for audits in tests: images of 8 × 8 and networks that learned some like them."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from fedkl import Procedure, Subject

CLASSES, WORDS = 4, 30
EPOCH = Procedure(algorithm="fedavg", batch_size=4, lr=0.05)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(72, CLASSES),
    )  # fmt: skip


def transferred():
    """Only the head is trained, and the convolution before it."""
    network = convnet()
    network[:3].requires_grad_(False)
    return network


class Casting(nn.Sequential):
    """Computes in another precision than its images have."""

    def __init__(self, dtype=torch.float64):
        super().__init__(*mlp())
        self.dtype = dtype
        self.to(dtype)

    def forward(self, x):
        return super().forward(x.to(self.dtype))


class Silent(nn.Sequential):
    """Its norms stay in eval mode; `train` returns nothing, as one forgets easily."""

    def __init__(self):
        super().__init__(*convnet())

    def train(self, mode=True):
        super().train(mode)
        for module in self:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


class Words(nn.Module):
    """A classifier of tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.hidden = nn.Linear(16, 24)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, tokens):
        return self.fc(torch.relu(self.hidden(self.embedding(tokens))).mean(1))


def labels(count):
    return torch.arange(count) % CLASSES


@cache
def images(count=200, *, seed=0):
    """Noise around one image a class."""
    means = torch.rand(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed + 1))
    return 0.5 * means[labels(count)] + 0.5 * noise


@cache
def tokens(count=200, *, seed=0):
    """Every class has words of its own."""
    drawn = torch.randint(WORDS, (count, 12), generator=torch.Generator().manual_seed(seed + 1))
    own = drawn % (WORDS // CLASSES) + labels(count)[:, None] * (WORDS // CLASSES)
    return torch.where(torch.arange(12) < 6, own, drawn)


@cache
def trained(build, inputs=images):
    """A network that learned other images than those that are audited."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = build()
    x, y = inputs(100, seed=10), labels(100)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.state_dict()


def subject(build=mlp, *, count=200, inputs=images, **fields):
    usual = {
        "weights": trained(build, inputs),
        "procedure": EPOCH,
        "images_per_client": 8,
    }
    given = inputs(count)
    return Subject(model=build, images=given, labels=labels(count), **(usual | fields))


def trains(network, inputs, labels):
    """A training loop of somebody's own."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for batch in torch.randperm(len(inputs)).split(4):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs[batch]), labels[batch]).backward()
        optimizer.step()
