"""ResNet-20 with BatchNorm on CIFAR-10, and a client that sends the gradient of eight images."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

import fedkl
from fedkl.data import load


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Features of half the size where the stride is 2."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three blocks.

    Source: He et al. 2015, section 4.2, with 1x1 convolutions as shortcuts (option B).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths, strides = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64), (1, 1, 1, 2, 1, 1, 2, 1, 1)
        self.layers = nn.Sequential(*map(Block, widths[:-1], widths[1:], strides))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layers(x).mean((2, 3)))


def subject() -> fedkl.Subject:
    """What is audited, with images that the weights were never trained on."""
    cifar10 = load("cifar10")
    return fedkl.Subject(
        name="resnet",
        model=ResNet20,
        weights=Path(__file__).with_name("weights") / "resnet.safetensors",
        images=cifar10.test_images[:4000],
        labels=cifar10.test_labels[:4000],
        normalization=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        procedure=fedkl.Procedure(batch_size=8),
        images_per_client=8,
        norm_mode="train",
    )
