"""Whole layers that stay with the client: a private classifier, or a private first layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fedkl.defenses.base import Defense
from fedkl.errors import LockError
from fedkl.keys import Key, secure_normal
from fedkl.locking import Split, withhold


class _OwnLayers(Split):
    """A split with private layers, which every client draws for itself."""

    def __init__(self, model: nn.Module, layers: tuple[nn.Module, ...]) -> None:
        super().__init__(model)
        for module in _parts(layers):
            withhold(module, tuple(name for name, _ in module.named_parameters(recurse=False)))
            withhold(module, tuple(name for name, _ in module.named_buffers(recurse=False)))
        own = [parameter for module in _parts(layers) for parameter in module.parameters(recurse=False)]
        with torch.no_grad():
            self._start = [(each, float(each.mean()), float(each.std(correction=0))) for each in own]

    def redraw(self) -> None:
        """Draws every private parameter from a normal of the mean and deviation that it started with.

        One that started constant, as the scale of a norm, starts so for every client.
        """
        with torch.no_grad():
            for parameter, mean, spread in self._start:
                parameter.copy_(mean + spread * secure_normal(*parameter.shape).to(parameter))


@dataclass(frozen=True, kw_only=True)
class PrivateLayers(Defense):
    """Clients keep whole layers to themselves, each with a start of its own; there is no lock.

    The server averages the rest. It cannot evaluate its model, nor read labels off a gradient without a head.

    Attributes:
        layers: ``"head"``: the last linear layer; ``"stem"``: the first convolution or linear layer; or names
            of modules.

    Source:
        A private head: Arivazhagan et al. 2019 (FedPer); a private stem: Liang et al. 2020 (LG-FedAvg). Both
        start from the server's weights, which it knows; here every client draws its own.
    """

    type: Literal["private-layers"] = "private-layers"
    layers: Literal["head", "stem"] | tuple[str, ...] = "head"

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """Withholds the layers of a copy of the model.

        Raises:
            LockError: A layer is unknown or has no parameters.
        """
        own = copy.deepcopy(model)
        split = _OwnLayers(own, tuple(own.get_submodule(name) for name in self._names(own)))
        split.redraw()
        return split

    def _names(self, model: nn.Module) -> tuple[str, ...]:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        if self.layers == "head":
            chosen: tuple[str, ...] = tuple(linear[-1:])
        elif self.layers == "stem":
            chosen = tuple(layers[:1])
        else:
            chosen = (self.layers,) if isinstance(self.layers, str) else self.layers
        known = {name: module for name, module in model.named_modules() if name}
        wrong = [repr(name) for name in chosen if name not in known or not list(known[name].parameters())]
        if wrong or not chosen or len(layers) < 2:
            raise LockError(
                f"PrivateLayers: expected modules with parameters, got {', '.join(wrong) or 'none'}. Choose "
                f"from {', '.join(layers)}."
            )
        return chosen


def _parts(layers: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    return (module for layer in layers for module in layer.modules())
