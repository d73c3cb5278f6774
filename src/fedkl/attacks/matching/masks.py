"""Masks of dropout, which the gradient of a single image shows.

A layer's gradient for its weight is made of what goes in. Where dropout before it zeroed a feature of the
only image, all of that feature's weights have a gradient of zero. Of several images each has its own mask.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.attacks.probing import probe_of
from fedkl.protocol import Observation, rescales

_ELEMENTS = nn.Dropout
_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Mask(nn.Module):
    """In the place of a dropout module, what it did.

    Args:
        mask: What its input is multiplied by; shape of one image's, or to be broadcast to it.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", mask)

    def forward(self, features: Tensor) -> Tensor:
        """Multiplies each image's features by it."""
        return features * self.mask


def read_masks(observation: Observation) -> dict[str, Tensor]:
    """By the name of a dropout module, what it multiplied its input by: 0, or 1 / (1 − p).

    Of those only whose output goes straight into a fully connected layer, or as whole channels into a
    convolution, and only where an update is one step on one image and some feature was dropped. A feature
    that was zero anyway is called dropped: its gradients are the same. Noise leaves no zeros to be read.
    """
    local, once = observation.local, observation.batch_size == 1 and observation.cohort == 1
    unscaled = observation.transform is not None and not rescales(observation.transform)
    if not once or not observation.train_mode or unscaled or len(local.batches(1)) != 1:
        return {}
    found = {}
    for name, (dropout, shape, layer) in _followed(observation).items():
        gradient = observation.gradient.get(f"{layer}.weight")
        if gradient is None:
            continue
        dropped = (gradient == 0).transpose(0, 1).flatten(1).all(1)
        if dropped.any():
            found[name] = (~dropped).to(gradient).reshape(shape) / (1 - dropout.p)
    return found


def _followed(observation: Observation) -> dict[str, tuple[Any, tuple[int, ...], str]]:
    """Dropout modules by name, with their mask's shape and the name of the layer that takes their output."""
    model = probe_of(observation.model, train_mode=True)
    outputs: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}
    droppers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, (_ELEMENTS, *_CHANNELS)) and 0 < module.p < 1:
            droppers[name] = module
            module.register_forward_hook(_noted(outputs.setdefault(name, []), output=True))
        elif isinstance(module, nn.Linear) or (isinstance(module, _CONVOLUTIONS) and module.groups == 1):
            module.register_forward_hook(_noted(inputs.setdefault(name, []), output=False))
    if not droppers:
        return {}
    device = next(iter(observation.gradient.values())).device
    image = torch.zeros(1, *observation.image_shape, device=device)
    with suppress(Exception), rng.seeded(0, device=device), torch.no_grad():  # the network is the user's
        model(image)
    found = {}
    for name, sent in outputs.items():
        takers = [
            layer for layer, took in inputs.items() if len(took) == len(sent) == 1 and _same(sent[0], took[0])
        ]
        if len(takers) == 1 and (shape := _shape(droppers[name], model.get_submodule(takers[0]), sent[0])):
            found[name] = (droppers[name], shape, takers[0])
    return found


def _noted(calls: list[Tensor], *, output: bool) -> Callable[..., None]:
    """A forward hook."""

    def hook(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        calls.append(result if output else args[0])

    return hook


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same numbers, in whatever shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _shape(dropout: nn.Module, layer: nn.Module, output: Tensor) -> tuple[int, ...] | None:
    """Of a mask that a layer's gradient shows: one number for each of its inputs."""
    if isinstance(layer, nn.Linear):
        return tuple(output.shape[1:]) if output.numel() == layer.in_features else None
    channels = isinstance(dropout, _CHANNELS) and output.dim() > 2
    return (output.shape[1], *(1 for _ in output.shape[2:])) if channels else None
