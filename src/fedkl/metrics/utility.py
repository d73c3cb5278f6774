"""What a model is worth to its users: test accuracy, exact to the sample."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64
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
    return int(_correct(logits, labels).sum()) / len(labels)


def evaluate(model: nn.Module, images: Images, labels: Labels, *, batch_size: int = 512) -> float:
    """Accuracy of a model in evaluation mode, batch by batch.

    The count of correct samples is divided by the number of samples, so a smaller last batch weighs what it
    holds (the published implementation divides by the batch size). Each module gets its own training flag
    back, also where the model raises: a user may have frozen some norms in evaluation mode on purpose.

    Args:
        model: Called as `model(images)`; returns logits (batch, classes). Batches go to its device.
        images: A tensor (samples, channels, height, width) in [0, 1], or a store that delivers such batches.
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
    hits = _hits(model, images, labels, batch_size=batch_size)
    return int(hits.sum()) / len(hits)


def class_accuracies(
    model: nn.Module, images: Images, labels: Labels, *, classes: int, batch_size: int = 512
) -> Float64[Tensor, " classes"]:
    """Accuracy of a model in evaluation mode on the samples of each class; see `evaluate`.

    Any mixture of classes can be had from it: weights by class frequencies give the accuracy on such a set.

    Args:
        model: As for `evaluate`.
        images: As for `evaluate`.
        labels: In 0 .. classes − 1.
        classes: Number of classes.
        batch_size: As for `evaluate`.

    Returns:
        Shape (classes,), in [0, 1]; NaN where a class has no sample.

    Raises:
        DataError: See `evaluate`.

    >>> identity, images = nn.Flatten(), torch.eye(2).view(2, 2, 1, 1)
    >>> class_accuracies(identity, images, torch.tensor([0, 0]), classes=2).tolist()
    [0.5, nan]
    """
    hits = _hits(model, images, labels, batch_size=batch_size)
    labels = labels.cpu()
    correct = torch.bincount(labels, weights=hits.double(), minlength=classes)
    return correct / torch.bincount(labels, minlength=classes)


def _hits(model: nn.Module, images: Images, labels: Labels, *, batch_size: int) -> Bool[Tensor, " samples"]:
    """Whether each sample is classified correctly, on the CPU."""
    if batch_size < 1:
        raise DataError(f"batch_size: expected at least 1, got {batch_size}.")
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(
            f"evaluate: expected as many labels as images and at least one, got {len(images)} images and "
            f"{len(labels)} labels."
        )
    flags = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), None)
    hits = []
    try:
        model.eval()
        with torch.no_grad():
            for start in range(0, len(images), batch_size):
                part = slice(start, start + batch_size)
                hits.append(_batch_hits(model(images[part].to(device)), labels[part]))
    finally:
        for module, training in flags:
            module.training = training
    return torch.cat(hits).cpu()


def _batch_hits(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.ndim != 2 or len(logits) != len(labels):
        raise DataError(
            f"model: expected logits of shape ({len(labels)}, classes), got {tuple(logits.shape)}. Wrap the "
            "model so that it returns logits."
        )
    return _correct(logits, labels)


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    usable = ~logits.isnan().any(1)
    return (logits.argmax(1) == labels.to(logits.device)) & usable
