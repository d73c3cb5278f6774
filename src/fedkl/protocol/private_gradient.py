"""The gradient of DP-SGD, as a client computes it.

Not imported by `fedkl.protocol` itself: it takes noise from `fedkl.keys`, which attacks do not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from fedkl.errors import TrainingError, gathered, shown
from fedkl.keys import Uniform, normal
from fedkl.norms import mixes_images
from fedkl.protocol.per_example import PerExample, clipped_sum
from fedkl.protocol.procedure import trained_parameters


def private_gradient(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    how: PerExample,
    expected: float,
    loss: Callable[[Tensor, Tensor], Tensor],
    uniform: Uniform,
    half: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """What takes the place of the mean loss's gradient: (Σ_i clipped g_i + z · C · N(0, 1)) / expected size.

    Args:
        model: In the mode in which it trains; not changed.
        images: Of the batch; there may be none, then it is noise.
        labels: Theirs.
        how: Clipping and noise.
        expected: Images that a batch has in the mean: the size that it happens to have tells who is in it.
        loss: Of predictions and labels.
        uniform: Where the noise comes from: a client's from `fedkl.keys.secure_uniform`.
        half: Whether forward passes run in bfloat16.

    Returns:
        By the name of every trainable parameter, and the mean of the losses; 0 of an empty batch.

    Raises:
        TrainingError: The model mixes images or cannot be called one image at a time.

    Source:
        Abadi et al. 2016, algorithm 1. The sum is divided by the batch's expected size, as in Opacus.
    """
    check_separate(model)
    parameters = {name: p.detach() for name, p in trained_parameters(model).items()}

    def of(part: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
            return loss(functional_call(model, part, (x,)), y)

    def one(x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        gradient, value = grad_and_value(of)(parameters, x, y)
        return gradient, value

    buffers = dict(model.named_buffers())
    try:
        total, losses = clipped_sum(one, images, labels, clip=how.clip, like=parameters)
    except RuntimeError as error:
        if not is_untraceable(error):
            raise
        raise TrainingError(_untraceable(f"one that it cannot ({type(error).__name__})")) from error
    assigned = [name for name, buffer in model.named_buffers() if buffer is not buffers[name]]
    if assigned:
        _put_back(model, buffers)
        raise TrainingError(_untraceable(f"one that assigns {', '.join(map(shown, assigned))}"))
    deviation = how.noise_multiplier * how.clip
    if deviation:
        total = {
            name: tensor + deviation * normal(uniform, *tensor.shape).to(tensor)
            for name, tensor in total.items()
        }
    return {name: tensor / expected for name, tensor in total.items()}, losses / max(1, len(images))


def _untraceable(got: str) -> str:
    return (
        "Clipping image by image: expected a model that torch.func.vmap can call one image at a time, got "
        f"{got}. Write to no buffer on the way forward, let nothing depend on values, or use a defense that "
        "clips whole updates."
    )


def _put_back(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        place, _, own = name.rpartition(".")
        setattr(model.get_submodule(place), own, buffer)


def check_separate(model: nn.Module) -> None:
    """Raises TrainingError where an image's gradient is not its own, or its statistics are kept and sent.

    Norms that are registered are known, and all of PyTorch's; another module that mixes the images of a batch
    sees one at a time.

    Args:
        model: In the mode in which it trains.
    """
    problems = [f"'{name}' ({type(m).__name__})" for name, m in model.named_modules() if mixes_images(m)]
    if problems:
        raise TrainingError(
            gathered(
                "Clipping image by image: expected norms of each image by itself, got norms that mix "
                "the images of a batch or keep running statistics, which nothing clips.",
                problems,
                "Replace them by nn.GroupNorm, or call the model in eval mode.",
            )
        )


def is_untraceable(error: RuntimeError) -> bool:
    """Whether torch.func says that it cannot trace a network, e.g. steps that depend on values.

    It has no exception of its own for that, only texts. Whatever else goes wrong, such as memory that does
    not suffice, would go wrong one by one too, later and with another message.
    """
    return not isinstance(error, torch.OutOfMemoryError) and any(word in str(error) for word in _TRACING)


_TRACING = ("vmap", "functorch", "torch.func", "unction transform", "grad (vjp, jvp", "atching rule")
