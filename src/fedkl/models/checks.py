"""Checks of a model's input that cost no tensor operation."""

from __future__ import annotations

from torch import Tensor

from fedkl.errors import DataError


def check_image_size(images: Tensor, size: int, *, model: str) -> None:
    """Refuses images that a model of fixed input size cannot take.

    Args:
        images: Shape ``(batch, channels, height, width)``.
        size: The height and width that the model was built for.
        model: Its name, for the message.

    Raises:
        DataError: Height or width differs.
    """
    height, width = images.shape[-2:]
    if height != size or width != size:
        raise DataError(
            f"{model}: expected images of {size}×{size}, got {height}×{width}. Resize the images "
            f"(data.size={size}), or use a model that takes any size, e.g. resnet20."
        )
