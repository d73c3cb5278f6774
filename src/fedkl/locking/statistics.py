"""Running statistics that stay with a client: counted anew for the weights that came back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedkl.errors import DataError
from fedkl.locking.split import Split
from fedkl.types import Images


def recalibrate_norms_(split: Split, images: Images, *, batch_size: int = 256) -> None:
    """Makes a client's private running statistics those of these images; all other tensors stay.

    After a round a client's statistics are of the weights that it sent, not of the average that came back.
    Before such a model is used, they are to be counted anew. No label is needed.

    Args:
        split: Its public tensors are those that the statistics are for; its model's modes stay.
        images: The client's own, in [0, 1], two at least.
        batch_size: Images at once.

    Raises:
        DataError: There are fewer than two images.

    Source: "precise batch normalization" of Wu and Johnson 2021 (arXiv 2105.07576), section 3; `update_bn` of
    PyTorch and `update_bn_stats` of fvcore do the same for all norms, this does it for private ones.
    """
    if len(images) < 2:
        raise DataError(f"Statistics are counted over at least 2 images, got {len(images)}. Take more.")
    parts = torch.arange(len(images)).tensor_split(math.ceil(len(images) / batch_size))
    with modes_kept(split.model):
        count_statistics(split, images, parts)


def count_statistics(split: Split, images: Images, parts: Sequence[Tensor]) -> None:
    """Private running statistics become those of all batches, each weighing as many images as it has.

    Training leaves them near those of the last batches, of earlier γ and β. The model is in eval mode
    afterwards, but for these norms.

    Args:
        split: Whose.
        images: All images.
        parts: Indexes of each batch.
    """
    private = split.private_names
    norms = [
        module
        for name, module in split.model.named_modules()
        if isinstance(module, _NormBase) and f"{name}.running_mean".removeprefix(".") in private
    ]
    usual = [norm.momentum for norm in norms]
    split.model.eval()
    for norm in norms:
        norm.train().reset_running_stats()
    seen = 0
    with torch.no_grad():
        for part in parts if norms else ():
            seen += len(part)
            for norm in norms:
                norm.momentum = len(part) / seen
            split.model(images[part])
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts every module back into the mode, train or eval, that it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
