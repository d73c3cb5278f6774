"""Gradients of batches, as a client's step takes them: of one, or of many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkl.attacks.memory import at_once, kept_for_backward, size_of
from fedkl.keys import Uniform, secure_uniform
from fedkl.protocol import Procedure, trained_parameters
from fedkl.protocol.differentiable import plain_attention
from fedkl.protocol.private_gradient import is_untraceable, private_gradient
from fedkl.protocol.procedure import loss_of
from fedkl.types import Inputs, Labels

_MOST_KEPT = 10_000  # bytes that a network keeps for a byte of an image, and copies, at most
_COPIES = 3  # at once, of what is kept and of what is sent


def gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    names: Sequence[str],
    train_mode: bool,
    local: Procedure | None = None,
    uniform: Uniform = secure_uniform,
) -> dict[str, Tensor]:
    """Gradients of several batches, stacked; the model is changed.

    Args:
        model: The network.
        images: Shape ``(updates, batch, …)``.
        labels: Theirs.
        names: Of the parameters.
        train_mode: Whether norms use the batch's statistics.
        local: What each client does, one gradient; a plain one if None.
        uniform: Where noise comes from, if there is any.
    """
    how = local or Procedure()
    if how.per_example is None:
        try:
            return _gradients_at_once(model, images, labels, names=names, train_mode=train_mode)
        except RuntimeError as error:
            if not is_untraceable(error):
                raise
    each = [
        step_gradient(*(model, x, y), train_mode=train_mode, local=how, samples=len(x), uniform=uniform)
        for x, y in zip(images, labels, strict=True)
    ]
    return stacked(each, names)


def _gradients_at_once(
    model: nn.Module, images: Tensor, labels: Tensor, *, names: Sequence[str], train_mode: bool
) -> dict[str, Tensor]:
    model.train(train_mode)
    if train_mode:  # running statistics would be updated in place, and are not looked at
        torch.func.replace_all_batch_norm_modules_(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(wanted: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(functional_call(model, parameters | wanted, (x,)), y)

    gradient = torch.func.grad(loss)
    wanted = {name: parameters[name] for name in names}
    with plain_attention():
        found = torch.vmap(
            gradient,
            in_dims=(None, 0, 0),
            randomness="different",
            chunk_size=_fitting(model, images, sent=size_of(wanted.values())),
        )(wanted, images, labels)
    return dict(found)


def _fitting(model: nn.Module, images: Tensor, *, sent: int) -> int | None:
    """How many batches at once, of which each sends so many bytes; None: all."""
    count, fit = len(images), partial(at_once, device=images.device)
    if count <= 1 or fit(_MOST_KEPT * images[0].nbytes + _COPIES * sent) >= count:
        return None
    most = fit(_COPIES * (kept_for_backward(model, images[0]) + sent))
    return most if most < count else None


def step_gradient(
    model: nn.Module,
    images: Inputs,
    labels: Labels,
    *,
    train_mode: bool,
    local: Procedure,
    samples: int,
    uniform: Uniform = secure_uniform,
) -> dict[str, Tensor]:
    """What a client's step takes for the gradient of one batch, by every parameter that is trained.

    Args:
        model: Its mode is changed.
        images: Of the batch.
        labels: Theirs.
        train_mode: Whether norms use the batch's statistics.
        local: What the client does.
        samples: How many images the client has.
        uniform: Where noise comes from, if there is any.
    """
    if local.per_example is None:
        return full_gradient(model, images, labels, train_mode=train_mode, precision=local.precision)
    model.train(train_mode)  # which may return nothing
    gradient, _ = private_gradient(
        model,
        images,
        labels,
        how=local.per_example,
        expected=samples * local.sampling_rate(samples),
        loss=loss_of,
        uniform=uniform,
        half=local.precision == "bfloat16",
    )
    return gradient


def full_gradient(
    model: nn.Module,
    images: Inputs,
    labels: Labels,
    *,
    train_mode: bool = True,
    precision: str = "float32",
) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy with respect to every parameter that is trained."""
    model.train(train_mode)  # which may return nothing
    parameters = trained_parameters(model)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        loss = loss_of(model(images), labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def stacked(updates: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors of several updates, by name, the updates first."""
    return {name: torch.stack([update[name] for update in updates]) for name in names}
