"""The residual networks for 224×224 images: ResNet-18 and ResNet-34."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedkl.models.initialization import kaiming_normal_
from fedkl.models.residual import ResidualNet, projection


class ResNet(ResidualNet):
    """A 7×7 convolution of stride 2, max-pooling, four stages of 64 to 512 channels, one linear layer.

    Parameter names and shapes are torchvision's, so its checkpoints load. Images of 224×224 have 7×7
    positions in the last stage (14×14 without max-pooling); other sizes work too.

    Args:
        channels: Channels of the images.
        classes: Number of classes.
        blocks: Blocks of each stage: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34.
        max_pool: Whether 3×3 max-pooling of stride 2 follows the first activation. The locked networks of
            arXiv 2305.04095 have none.
        kaiming: N(0, 2 / fan-out) for convolutions, as in torchvision; False: PyTorch's own, as in the locked
            networks of arXiv 2305.04095.

    Source:
        He et al. 2015 (arXiv 1512.03385), section 4.1, table 1, with projections (option B) as in
        torchvision; its deviations are ours. Ours: ReLU does not work in place, see `BasicBlock`.

    >>> import torch
    >>> with torch.device("meta"):
    ...     model = ResNet(channels=3, classes=1000)
    >>> sum(p.numel() for p in model.parameters())
    11689512
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        blocks: Sequence[int] = (2, 2, 2, 2),
        max_pool: bool = True,
        kaiming: bool = True,
    ) -> None:
        super().__init__(
            stem=nn.Conv2d(channels, 64, 7, 2, 3, bias=False),
            pool=nn.MaxPool2d(3, 2, 1) if max_pool else nn.Identity(),
            widths=(64, 128, 256, 512),
            blocks=blocks,
            shortcut=projection,
            classes=classes,
        )
        if kaiming:
            kaiming_normal_(self, mode="fan_out")
