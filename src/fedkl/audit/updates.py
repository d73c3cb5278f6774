"""Clients' updates: one or several local steps, many batches at once, and what sent statistics add."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedkl.attacks import LocalSteps
from fedkl.locking import Split
from fedkl.types import ImageBatch, Labels


def local_update(
    model: nn.Module, images: ImageBatch, labels: Labels, *, train_mode: bool, local: LocalSteps
) -> dict[str, Tensor]:
    """The sum of the gradients of a client's local steps, for every parameter; the model is not changed."""
    return updated(copy.deepcopy(model), images, labels, train_mode=train_mode, local=local)


def updated(
    model: nn.Module, images: ImageBatch, labels: Labels, *, train_mode: bool, local: LocalSteps
) -> dict[str, Tensor]:
    """As `local_update`, but for the model's mode and its norms' running statistics."""
    if local.steps == 1:
        return full_gradient(model, images, labels, train_mode=train_mode)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    total: dict[str, Tensor] = {}
    for step in range(local.steps):
        batch = local.batch(step, len(images))
        gradient = full_gradient(model, images[batch], labels[batch], train_mode=train_mode)
        total = {name: total[name] + g if total else g for name, g in gradient.items()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(gradient[name], alpha=local.lr)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return total


def gradients(
    model: nn.Module, images: Tensor, labels: Tensor, *, names: Sequence[str], train_mode: bool
) -> dict[str, Tensor]:
    """Gradients of several batches, stacked; the model is changed."""
    try:
        return _gradients_at_once(model, images, labels, names=names, train_mode=train_mode)
    except RuntimeError:  # of what torch.func cannot trace, such as steps that depend on values
        each = [
            full_gradient(model, x, y, train_mode=train_mode) for x, y in zip(images, labels, strict=True)
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
        return F.cross_entropy(functional_call(model, parameters | wanted, (x,)), y)

    gradient = torch.func.grad(loss)
    wanted = {name: parameters[name] for name in names}
    found = torch.vmap(gradient, in_dims=(None, 0, 0), randomness="different")(wanted, images, labels)
    return dict(found)


def full_gradient(
    model: nn.Module, images: ImageBatch, labels: Labels, *, train_mode: bool = True
) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy with respect to every parameter."""
    parameters = dict(model.train(train_mode).named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def stacked(updates: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors of several updates, by name, the updates first."""
    return {name: torch.stack([update[name] for update in updates]) for name in names}


def mean_of(updates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Over clients; of a single one its update as it is."""
    if len(updates) == 1:
        return dict(updates[0])
    return {name: torch.stack([update[name] for update in updates]).mean(0) for name in updates[0]}


def sent_statistics(victim: Split, images: ImageBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """What a server solves for that sees a client's running statistics before and after one train-mode step.

    new = (1 − m) · old + m · batch, with the norm's momentum m. The running variance takes the unbiased one;
    how many values a channel has, the architecture says. Dividing by m amplifies float32's rounding.

    Args:
        victim: Not changed. Norms whose statistics are private, or never change (momentum 0), are left out.
        images: The client's batch.

    Returns:
        Mean and biased variance of the batch per channel, by the norm's qualified name.
    """
    before, client = victim.public_state(), copy.deepcopy(victim.model).train()
    norms = {
        name: norm
        for name, norm in client.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and f"{name}.running_var" in before
    }
    sizes: dict[nn.Module, int] = {}
    for norm in norms.values():
        norm.register_forward_pre_hook(
            lambda norm, args: sizes.update({norm: args[0].numel() // args[0].shape[1]})
        )
    if norms:
        with torch.no_grad():
            client(images)
    after = dict(client.named_buffers())
    found = {}
    for name, norm in norms.items():
        if norm not in sizes or norm.momentum == 0:  # it was not called, or gives nothing away
            continue
        count = after[f"{name}.num_batches_tracked"]
        share = 1 / float(count) if norm.momentum is None else norm.momentum
        mean, variance = (
            (after[tensor] - (1 - share) * before[tensor]) / share
            for tensor in (f"{name}.running_mean", f"{name}.running_var")
        )
        found[name] = (mean, (variance * (1 - 1 / sizes[norm])).clamp_min(0))
    return found
