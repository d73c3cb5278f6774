"""The sigmoid LeNet of the gradient-inversion literature."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from fedkl.models.checks import check_image_size


class LeNet(nn.Module):
    """Three 5×5 convolutions of 12 channels (strides 2, 2, 1; padding 2), sigmoid, one linear layer.

    For images of 32×32: 768 features before the linear layer.

    Source:
        Zhu et al. 2019 (DLG); arXiv 2305.04095, section 5.

    >>> sum(parameter.numel() for parameter in LeNet(channels=3, classes=10).parameters())
    15826
    """

    def __init__(self, *, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 12, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(12, 12, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(12, 12, 5, stride=1, padding=2)
        self.act = nn.Sigmoid()
        self.fc = nn.Linear(12 * 8 * 8, classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits for images in [0, 1], of 32×32.

        Raises:
            DataError: The images are of another size.
        """
        check_image_size(x, 32, model=type(self).__name__)
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.act(conv(x))
        logits: Tensor = self.fc(x.flatten(1))
        return logits
