"""Running statistics that stay with a client: counted anew for the weights that came back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedkl import rng
from fedkl.errors import ConfigError, DataError, TrainingError, gathered
from fedkl.locking.split import Split
from fedkl.types import Images

MOST_IMAGES = 1024
"""More do not make a model better: means and variances are over all of a feature map's positions, too."""

_NUMBERS = 512 * 3 * 32 * 32  # of the images of a batch: what activations take grows with them


def recalibrate_norms_(
    split: Split, images: Images, *, most: int = MOST_IMAGES, batch_size: int | None = None
) -> None:
    """Makes a client's private running statistics those of its images; all other tensors stay.

    So do the statistics of frozen norms, which stay in eval mode where the model trains: training uses them.

    After a round a client's statistics are of the weights that it sent, not of the average that came back.
    Before such a model is used, they are to be counted anew. It takes one forward pass, and no label.

    Args:
        split: Its public tensors are those that the statistics are for; its model's modes stay.
        images: The client's own training images, in [0, 1], two at least.
        most: At most so many of them, drawn at random; always the same ones.
        batch_size: Images at once, two at least; None: 256, fewer of images larger than 3 × 45 × 45.

    Raises:
        ConfigError: The batch size is too small.
        DataError: There are fewer than two images.
        TrainingError: The statistics of these weights are not finite. They stay as they were.

    Source: "PreciseBN" of Wu and Johnson 2021 (arXiv 2105.07576), section 3, over all batches. `update_bn` of
    PyTorch and `update_bn_stats` of fvcore do so for all norms; here public ones stay as the server has them.
    """
    if len(images) < 2:
        raise DataError(f"Statistics are counted over at least 2 images, got {len(images)}. Take more.")
    if batch_size is not None and batch_size < 2:
        raise ConfigError(f"batch_size: expected at least 2, a norm's variance takes two, got {batch_size}.")
    if batch_size is None:
        batch_size = max(8, min(256, _NUMBERS // math.prod(images.shape[1:])))
    # Images often lie sorted by class: the first ones, and each batch, would be of one.
    order = torch.randperm(len(images), generator=rng.generator(0, "norm statistics"))[: max(2, most)]
    parts, before = order.tensor_split(math.ceil(len(order) / batch_size)), split.private_state()
    with modes_kept(split.model):
        try:
            count_statistics(split, images, parts)
            _check_finite(split)
        except BaseException:
            split.load_private_state(before)
            raise


def private_norms(split: Split) -> list[_NormBase]:
    """The norms whose running statistics stay with the client, and are of its batches where it trains."""
    private = split.private_names
    with modes_kept(split.model):
        split.model.train()
        return [
            module
            for name, module in split.model.named_modules()
            if isinstance(module, _NormBase)
            and f"{name}.running_mean".removeprefix(".") in private
            and module.training  # a model's own `train` may keep pretrained norms frozen
        ]


def count_statistics(split: Split, images: Images, parts: Sequence[Tensor]) -> None:
    """Private running statistics become those of all batches, each weighing as many images as it has.

    Training leaves them near those of the last batches, of earlier γ and β. A norm that several places of the
    network share has those of all its calls; one that these images do not reach has what it had. The model is
    in eval mode afterwards, but for these norms.

    Args:
        split: Whose.
        images: All images.
        parts: Indexes of each batch.
    """
    norms = private_norms(split)
    usual = [norm.momentum for norm in norms]
    split.model.eval()
    images_of: dict[nn.Module, int] = {}

    def count(norm: _NormBase, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        part = args[0] if args else named["input"]
        if norm not in images_of:
            norm.reset_running_stats()
        seen = images_of[norm] = images_of.get(norm, 0) + len(part)
        norm.momentum = len(part) / seen

    for norm in norms:
        norm.train()
    hooks = [norm.register_forward_pre_hook(count, with_kwargs=True) for norm in norms]
    device = next(iter(split.model.parameters())).device
    try:
        with torch.no_grad():
            for part in parts if norms else ():
                split.model(images[part].to(device))
    finally:
        for norm, momentum, hook in zip(norms, usual, hooks, strict=True):
            hook.remove()
            norm.momentum = momentum


def _check_finite(split: Split) -> None:
    """Weights that are finite themselves may make variances that are not."""
    tensors = split.private_state().items()
    problems = [f"'{name}' has non-finite values" for name, tensor in tensors if not tensor.isfinite().all()]
    if problems:
        subject = "The statistics of these weights cannot be used."
        raise TrainingError(gathered(subject, problems, "The training diverged: lower the learning rate."))


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts every module back into the mode, train or eval, that it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
