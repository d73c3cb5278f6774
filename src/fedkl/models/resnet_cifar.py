"""The residual networks for 32×32 images: ResNet-20, ResNet-32 and deeper ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.models.initialization import kaiming_normal_
from fedkl.models.residual import Features, Norm, ResidualNet, projection


class Subsample(nn.Module):
    """Option A of He et al. 2015, section 3.3: every stride-th position, new channels filled with zeros.

    It has no parameters. Shape ``(batch, inputs, height, width)`` to
    ``(batch, outputs, ⌈height/stride⌉, ⌈width/stride⌉)``.

    Source:
        The paper leaves open where the new channels are. As in the implementation that the literature uses
        (Idelbayev, ``pytorch_resnet_cifar10``), half of them come before the old ones and half after.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        before = (outputs - inputs) // 2
        self._channels = (before, outputs - inputs - before)
        self._stride = stride

    def forward(self, x: Features) -> Float[Tensor, "batch outputs h w"]:
        """The shortcut of x."""
        return F.pad(x[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, *self._channels))


def group_norm(channels: int) -> nn.Module:
    """A norm of each image by itself, over groups of 16 channels: a setting of Wu & He 2018, table 3."""
    return nn.GroupNorm(channels // 16, channels)


_NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": group_norm}


class CifarResNet(ResidualNet):
    """A 3×3 convolution of 16 channels, three stages of 16, 32 and 64 channels, one linear layer.

    With n blocks a stage, the depth is 6 n + 2 layers. Images of 32×32 have 8×8 positions in the last stage;
    other sizes work too.

    Args:
        channels: Channels of the images.
        classes: Number of classes.
        blocks: Blocks of each stage: (3, 3, 3) is ResNet-20, (5, 5, 5) ResNet-32.
        shortcut: ``"subsample"``, option A; or ``"projection"``, option B, which the locked networks of
            arXiv 2305.04095 have: 2,752 parameters more.
        norm: ``"batch"``, as in the source; or ``"group"``, which knows no other image of the batch, as
            DP-SGD demands.
        kaiming: N(0, 2 / fan-in) for convolutions and the linear layer, as in the source; False: PyTorch's
            own, as in the locked networks of arXiv 2305.04095.

    Source:
        He et al. 2015 (arXiv 1512.03385), section 4.2. Option A gives the counts of its table 6, 0.27 M and
        0.46 M. Deviation: biases of the linear layer start as PyTorch's do, which the source does not state.

    >>> sum(p.numel() for p in CifarResNet(channels=3, classes=10).parameters())
    269722
    >>> sum(p.numel() for p in CifarResNet(channels=3, classes=10, shortcut="projection").parameters())
    272474
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        blocks: Sequence[int] = (3, 3, 3),
        shortcut: Literal["subsample", "projection"] = "subsample",
        norm: Literal["batch", "group"] = "batch",
        kaiming: bool = True,
    ) -> None:
        build_norm = _NORMS[norm]
        super().__init__(
            stem=nn.Conv2d(channels, 16, 3, 1, 1, bias=False),
            pool=nn.Identity(),
            widths=(16, 32, 64),
            blocks=blocks,
            shortcut=Subsample if shortcut == "subsample" else partial(projection, norm=build_norm),
            classes=classes,
            norm=build_norm,
        )
        if kaiming:
            kaiming_normal_(self, mode="fan_in", kinds=(nn.Conv2d, nn.Linear))
