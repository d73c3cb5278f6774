"""A client's procedure as a differentiable function of its images: the twin of local_training.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedkl.errors import AttackError
from fedkl.protocol.procedure import Procedure

Gradient = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
"""The gradient by name at trained tensors, of the images with these indexes."""


def plain_attention() -> AbstractContextManager[None]:
    """PyTorch's plain attention in place of the fused one.

    The fused one has neither second nor forward derivatives, and is called image by image in `torch.vmap`.
    """
    return sdpa_kernel(SDPBackend.MATH)


def check_differentiable(procedure: Procedure, *, attack: str) -> None:
    """Raises AttackError where what is sent cannot be differentiated.

    Args:
        procedure: What the client does.
        attack: Who asks, for the message.
    """
    if procedure.obstacle is not None:
        raise AttackError(
            f"{attack}: expected a client whose update can be differentiated, got {procedure.obstacle}. Use "
            "the attack learned, which only simulates clients."
        )


def differentiable_update(
    procedure: Procedure,
    *,
    batches: Sequence[Tensor],
    trained: Mapping[str, Tensor],
    observed: Collection[str],
    private: Collection[str],
    gradient: Gradient,
) -> dict[str, Tensor]:
    """What a server sees of a client: the gradient, or (before − after) / lr of the weights.

    The latter is summed up from the steps, and not taken from weights, whose float32 digits it would lose.

    Args:
        procedure: What the client does; it must be `Procedure.differentiable`.
        batches: `Procedure.batches`; made beforehand, since `torch.func.vmap` lets nothing be shuffled.
        trained: What the steps change, by name, as it was received; for one gradient, what it is of.
        observed: Names of what is seen.
        private: Names of parameters with the private ones' weight decay, and without FedProx's pull.
        gradient: Of the loss.

    Returns:
        By the observed names.
    """
    if procedure.is_gradient:
        return gradient(dict(trained), batches[0])
    step = _Step(procedure, trained, frozenset(private))
    now = dict(trained)
    total = {name: torch.zeros_like(now[name]) for name in observed}
    for batch in batches:
        directions = step.directions(now, gradient(now, batch))
        total = {name: total[name] + directions[name] for name in observed}
        now = {name: tensor - procedure.lr * directions[name] for name, tensor in now.items()}
    return total


def transformed(
    update: Mapping[str, Tensor],
    transform: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    *,
    procedure: Procedure,
) -> dict[str, Tensor]:
    """What a server sees of an update after what a defense does to it, in the units of the update.

    Args:
        update: The gradient, or (before − after) / lr of the weights, by name; several may be stacked.
        transform: What is done to the change, by name.
        procedure: What the client does.
    """
    changed = transform(change_of(update, procedure=procedure))
    if procedure.algorithm != "fedavg":
        return dict(changed)
    return {name: -tensor / procedure.lr for name, tensor in changed.items()}


def change_of(update: Mapping[str, Tensor], *, procedure: Procedure) -> dict[str, Tensor]:
    """The change that is sent: of a gradient itself, of (before − after) / lr the weights after − before."""
    if procedure.algorithm != "fedavg":
        return dict(update)
    return {name: -procedure.lr * tensor for name, tensor in update.items()}


class _Step:
    """`torch.optim.SGD` with FedProx's pull, in which nothing is written in place."""

    def __init__(self, procedure: Procedure, received: Mapping[str, Tensor], private: frozenset[str]) -> None:
        sends_weights = procedure.algorithm == "fedavg"  # where gradients are sent, steps are plain ones
        self._momentum = procedure.momentum if sends_weights else 0.0
        self._pull = procedure.proximal if sends_weights else 0.0
        self._decays = {
            name: procedure.decay(private=name in private) if sends_weights else 0.0 for name in received
        }
        self._received, self._private = received, private
        self._velocity: dict[str, Tensor] = {}

    def directions(self, now: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is subtracted, over the learning rate."""
        return {name: self._direction(name, tensor, gradient[name]) for name, tensor in now.items()}

    def _direction(self, name: str, tensor: Tensor, gradient: Tensor) -> Tensor:
        if self._pull and name not in self._private:
            gradient = gradient + self._pull * (tensor - self._received[name])
        if self._decays[name]:
            gradient = gradient + self._decays[name] * tensor
        if not self._momentum:
            return gradient
        before = self._velocity.get(name)
        velocity = gradient if before is None else self._momentum * before + gradient
        self._velocity[name] = velocity
        return gradient + self._momentum * velocity
