"""VGG-16, with and without BatchNorm."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from fedkl.models.initialization import kaiming_normal_

# Configuration D of the source: convolutions of each stage, and their channels.
_STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


class VGG(nn.Module):
    """Thirteen 3×3 convolutions in five stages, each ended by 2×2 max-pooling, and three linear layers.

    Parameter names and shapes are torchvision's, so its checkpoints load. Images of 224×224 have 7×7
    positions after the last stage; other sizes, from 32×32 on, are averaged or repeated to 7×7.

    Args:
        channels: Channels of the images.
        classes: Number of classes.
        batch_norm: Whether a BatchNorm follows every convolution, as in the locked network of
            arXiv 2305.04095.
        hidden: Features of the first two linear layers.
        dropout: Probability that a feature behind them is zero in train mode.

    Source:
        Simonyan and Zisserman 2015 (arXiv 1409.1556), table 1, configuration D; pooling to 7×7, BatchNorm and
        initialization as in torchvision. Deviation from it: ReLU does not work in place, so that hooks see
        what each module gave.

    >>> import torch
    >>> with torch.device("meta"):
    ...     model = VGG(channels=3, classes=1000)
    >>> sum(p.numel() for p in model.parameters())
    138357544
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        batch_norm: bool = False,
        hidden: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for count, outputs in _STAGES:
            for before, after in pairwise((inputs, *[outputs] * count)):
                layers.append(nn.Conv2d(before, after, 3, 1, 1))
                layers += [nn.BatchNorm2d(after), nn.ReLU()] if batch_norm else [nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(nn.Linear(inputs * 7 * 7, hidden), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(hidden, classes),
        )
        self._initialize()

    def _initialize(self) -> None:
        kaiming_normal_(self, mode="fan_out")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits for images in [0, 1]."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits
