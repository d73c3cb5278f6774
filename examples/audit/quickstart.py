"""The network of Flower's PyTorch quickstart on CIFAR-10, and a client that trains an epoch of SGD."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fedkl
from fedkl.data import load


class Net(nn.Module):
    """Two convolutions with pooling, three linear layers.

    Source: Flower's ``quickstart-pytorch``, after PyTorch's "Training a Classifier".
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def train(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """What a client does in a round."""
    network.train()
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for batch, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(network(batch), targets).backward()
        optimizer.step()


def subject() -> fedkl.Subject:
    """What is audited, with images that the weights were never trained on."""
    cifar10 = load("cifar10")
    return fedkl.Subject(
        name="quickstart",
        model=Net,
        weights=Path(__file__).with_name("weights") / "quickstart.safetensors",
        images=cifar10.test_images[:4000],
        labels=cifar10.test_labels[:4000],
        normalization=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        procedure=train,
        images_per_client=300,
    )


def described() -> fedkl.Subject:
    """The same round in words: attackers can then replay it, and defenses such as DP-SGD change it."""
    epoch = fedkl.Procedure(algorithm="fedavg", batch_size=32, lr=0.01, momentum=0.9)
    return replace(subject(), procedure=epoch)
