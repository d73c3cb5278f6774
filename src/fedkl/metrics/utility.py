"""What a model is worth to its users: test accuracy, exact to the sample."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkl.errors import DataError
from fedkl.types import Images, Labels


def accuracy(logits: Float[Tensor, "batch classes"], labels: Labels) -> float:
    """Share of samples whose largest logit is the label's.

    Args:
        logits: Shape (batch, classes).
        labels: Shape (batch,), in 0 .. classes − 1.

    Returns:
        Correct samples / all samples, in [0, 1]. A row with NaN is wrong (its argmax would be an arbitrary
        class); among equal logits the first class counts as the prediction.

    Raises:
        DataError: There is no sample, or the shapes do not fit.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]]), torch.tensor([0, 1, 1]))
    0.6666666666666666
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise DataError(
            "accuracy: expected logits (batch, classes) and labels (batch,), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    if len(labels) == 0:
        raise DataError(
            "accuracy: expected at least one sample, got none. Check the test set or its partition."
        )
    return _correct(logits, labels) / len(labels)


def evaluate(model: nn.Module, images: Images, labels: Labels, *, batch_size: int = 512) -> float:
    """Accuracy of a model in evaluation mode, batch by batch.

    The count of correct samples is divided by the number of samples, so a smaller last batch weighs what it
    holds (the published implementation divides by the batch size). Each module gets its own training flag
    back, also where the model raises: a user may have frozen some norms in evaluation mode on purpose.

    Args:
        model: Called as `model(images)`; returns logits (batch, classes). Batches go to its device.
        images: Shape (samples, channels, height, width), in [0, 1].
        labels: Shape (samples,).
        batch_size: Samples per forward pass; it changes memory and speed, not the result.

    Returns:
        Correct samples / all samples, in [0, 1].

    Raises:
        DataError: There is no sample, counts differ, the batch size is below 1, or the model's output is not
            (batch, classes).

    >>> evaluate(nn.Flatten(), torch.eye(2).view(2, 2, 1, 1), torch.tensor([0, 0]), batch_size=1)
    0.5
    """
    if batch_size < 1:
        raise DataError(f"batch_size: expected at least 1, got {batch_size}.")
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(
            f"evaluate: expected as many labels as images and at least one, got {len(images)} images and "
            f"{len(labels)} labels."
        )
    flags = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), images.device)
    correct = 0
    try:
        model.eval()
        with torch.no_grad():
            for batch, target in zip(
                torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
            ):
                correct += _batch_correct(model(batch.to(device)), target)
    finally:
        for module, training in flags:
            module.training = training
    return correct / len(images)


def _batch_correct(logits: Tensor, labels: Tensor) -> int:
    if logits.ndim != 2 or len(logits) != len(labels):
        raise DataError(
            f"model: expected logits of shape ({len(labels)}, classes), got {tuple(logits.shape)}. Wrap the "
            "model so that it returns logits."
        )
    return _correct(logits, labels)


def _correct(logits: Tensor, labels: Tensor) -> int:
    usable = ~logits.isnan().any(1)
    hits = (logits.argmax(1) == labels.to(logits.device)) & usable
    return int(hits.sum())
