"""What the residual networks share: the basic block, its projection, and the way through a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

Shortcut = Callable[[int, int, int], nn.Module]
"""Builds the shortcut of a block that changes its shape, from inputs, outputs and stride."""

Norm = Callable[[int], nn.Module]
"""Builds the norm of so many channels."""

Features = Float[Tensor, "batch features height width"]


def projection(inputs: int, outputs: int, stride: int, *, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """Option B of He et al. 2015, section 3.3: a strided 1×1 convolution with its own norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))


class BasicBlock(nn.Module):
    """ReLU(F(x) + shortcut(x)), where F is conv 3×3, norm, ReLU, conv 3×3, norm.

    Args:
        inputs: Channels of the input, shape ``(batch, inputs, height, width)``.
        outputs: Channels of the output, shape ``(batch, outputs, ⌈height/stride⌉, ⌈width/stride⌉)``.
        stride: Of the first convolution.
        shortcut: Builds the shortcut where the shapes differ; elsewhere it is the identity.
        norm: Builds the norms.

    Source:
        He et al. 2015 (arXiv 1512.03385), section 3. Modules have torchvision's names. Deviation: its ReLU
        works in place, this one does not, so that hooks see what each module gave.
    """

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, shortcut: Shortcut, norm: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        changes = stride != 1 or inputs != outputs
        self.downsample = shortcut(inputs, outputs, stride) if changes else nn.Identity()

    def forward(self, x: Features) -> Float[Tensor, "batch outputs h w"]:
        """Features for the next block."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu(y + self.downsample(x))
        return activated


class ResidualNet(nn.Module):
    """conv1, bn1, ReLU, pooling, stages of basic blocks, average over positions, linear layer.

    The first block of every stage but the first halves height and width. Parameters have torchvision's names.

    Args:
        stem: The first convolution, without bias.
        pool: What follows the first activation.
        widths: Channels of each stage.
        blocks: Number of blocks of each stage.
        shortcut: Of the blocks that change their shape.
        classes: Number of classes.
        norm: Builds the norms, whose names are torchvision's (``bn1`` …) whatever they are.
    """

    def __init__(
        self,
        *,
        stem: nn.Conv2d,
        pool: nn.Module,
        widths: Sequence[int],
        blocks: Sequence[int],
        shortcut: Shortcut,
        classes: int,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1 = stem
        self.bn1 = norm(stem.out_channels)
        self.relu = nn.ReLU()
        self.maxpool = pool
        self._stages = tuple(f"layer{number}" for number in range(1, len(widths) + 1))
        ends = pairwise((stem.out_channels, *widths))
        for name, (inputs, outputs), count in zip(self._stages, ends, blocks, strict=True):
            stride = 1 if name == "layer1" else 2
            first = BasicBlock(inputs, outputs, stride=stride, shortcut=shortcut, norm=norm)
            rest = (
                BasicBlock(outputs, outputs, stride=1, shortcut=shortcut, norm=norm) for _ in range(count - 1)
            )
            self.add_module(name, nn.Sequential(first, *rest))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits for images in [0, 1]."""
        y = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self._stages:
            y = getattr(self, name)(y)
        logits: Tensor = self.fc(self.avgpool(y).flatten(1))
        return logits
