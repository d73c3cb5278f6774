"""Clients' updates: what a procedure sends, and what sent statistics add."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.attacking.gradients import step_gradient
from fedkl.attacks.probing import probe_of
from fedkl.keys import Uniform, secure_uniform
from fedkl.locking import Split
from fedkl.protocol import Procedure, trained_parameters
from fedkl.protocol.local_training import LocalTrainer, batches_of
from fedkl.types import ImageBatch, Inputs, Labels


def local_update(
    model: nn.Module,
    images: Inputs,
    labels: Labels,
    *,
    train_mode: bool,
    local: Procedure,
    private: Collection[str] = (),
    generator: torch.Generator | None = None,
    uniform: Uniform = secure_uniform,
) -> dict[str, Tensor]:
    """What a client's procedure does to every parameter that is trained; the model is not changed.

    Args:
        model: As the client received it.
        images: The client's.
        labels: Theirs.
        train_mode: Whether its norms use the batch's statistics.
        local: What the client does.
        private: Names of the parameters that it does not send.
        generator: Of the augmentation; one that is always the same if None.
        uniform: Where noise comes from, if the procedure adds any: a real client's from the operating system.

    Returns:
        The gradient, or the sum of those of several steps; where weights are sent, (before − after) / lr.
    """
    return updated(
        copy.deepcopy(model),
        images,
        labels,
        train_mode=train_mode,
        local=local,
        private=private,
        generator=generator,
        uniform=uniform,
    )


def updated(
    model: nn.Module,
    images: Inputs,
    labels: Labels,
    *,
    train_mode: bool,
    local: Procedure,
    private: Collection[str] = (),
    generator: torch.Generator | None = None,
    uniform: Uniform = secure_uniform,
) -> dict[str, Tensor]:
    """As `local_update`, but for the model's mode and its norms' running statistics."""
    before = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
    batches = _batches(images, labels, local, generator)
    if local.algorithm == "fedavg":
        samples = len(images)
        _train(
            *(model, batches),
            train_mode=train_mode,
            local=local,
            private=private,
            samples=samples,
            uniform=uniform,
        )
        total = difference(before, dict(model.named_parameters()), lr=local.lr)
    else:
        total = {}
        for x, y in batches:
            gradient = step_gradient(
                *(model, x, y), train_mode=train_mode, local=local, samples=len(images), uniform=uniform
            )
            total = {name: total[name] + g if total else g for name, g in gradient.items()}
            if local.is_gradient:
                return total
            with torch.no_grad():
                for name, parameter in trained_parameters(model).items():
                    parameter.sub_(gradient[name], alpha=local.lr)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(before[name])
    return total


def trained_tensors(
    model: nn.Module,
    images: Inputs,
    labels: Labels,
    *,
    train_mode: bool,
    local: Procedure,
    private: Collection[str],
    generator: torch.Generator | None = None,
    uniform: Uniform = secure_uniform,
) -> dict[str, Tensor]:
    """All tensors after a client's training, by all their names; arguments as of `local_update`."""
    client = copy.deepcopy(model)
    batches = _batches(images, labels, local, generator)
    _train(
        *(client, batches),
        train_mode=train_mode,
        local=local,
        private=private,
        samples=len(images),
        uniform=uniform,
    )
    found = dict(client.named_parameters()) | dict(client.named_buffers()) | client.state_dict()
    return {name: tensor.detach() for name, tensor in found.items()}


def difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, lr: float) -> dict[str, Tensor]:
    """What a server takes for the gradient where weights are sent: (before − after) / lr, in their digits."""
    return {name: (tensor.detach() - after[name].detach()) / lr for name, tensor in before.items()}


def _batches(
    images: Inputs, labels: Labels, local: Procedure, generator: torch.Generator | None
) -> Iterable[tuple[Tensor, Tensor]]:
    if local.is_gradient and local.augmentation == "none":
        return [(images, labels)]
    return batches_of(
        images,
        labels,
        local.batches(len(images)),
        augmentation=local.augmentation,
        generator=generator or rng.generator(0, "audited-augmentation"),
    )


def _train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    train_mode: bool,
    local: Procedure,
    private: Collection[str],
    samples: int,
    uniform: Uniform,
) -> None:
    """Trains as a federation does, with a new optimizer."""
    model.train(train_mode)  # which may return nothing
    named = dict(model.named_parameters())
    trainer = LocalTrainer(
        model,
        procedure=local,
        public={name: parameter for name, parameter in named.items() if name not in private},
        private={name: parameter for name, parameter in named.items() if name in private},
        uniform=uniform,
    )
    trainer.train(batches, samples=samples)
    trainer.optimizer.zero_grad()


def mean_of(updates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Over clients; of a single one its update as it is."""
    if len(updates) == 1:
        return dict(updates[0])
    return {name: torch.stack([update[name] for update in updates]).mean(0) for name in updates[0]}


def sent_statistics(
    victim: Split, images: ImageBatch, *, sent: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """What a server solves for that sees a client's running statistics before and after one train-mode step.

    new = (1 − m) · old + m · batch, with the norm's momentum m. The running variance takes the unbiased one;
    how many values a channel has, the architecture says. Dividing by m amplifies float32's rounding.

    Args:
        victim: Not changed. Norms whose statistics are private, or never change (momentum 0), are left out.
        images: The client's batch.
        sent: Buffers as a defense has them sent; norms whose statistics it changed by more than their last
            digits are left out. None: they are sent as they are.

    Returns:
        Mean and biased variance of the batch per channel, by the norm's qualified name.
    """
    before, client = victim.public_state(), probe_of(victim.model, train_mode=True)
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
    if sent is not None:
        norms = {name: norm for name, norm in norms.items() if _is_as_it_was(name, sent, after)}
        after |= sent
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


def _is_as_it_was(norm: str, sent: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether a norm's statistics were sent as they are, but for the rounding of before + change."""
    names = (f"{norm}.running_mean", f"{norm}.running_var")
    return all(torch.allclose(sent[name], after[name], rtol=1e-6, atol=1e-7) for name in names)
