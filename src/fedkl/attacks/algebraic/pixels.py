"""Which layers get the image itself, and which of their inputs is which pixel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.attacks.probing import as_taken, probe_of
from fedkl.protocol import Observation

_EXACT = 1e-4  # of values about 1, in float32


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelLayer:
    """A linear layer or patch projection whose inputs are the pixels, each once.

    An input is scale × pixel + shift: they are the network's public normalization, wherever it stands.

    Attributes:
        name: The layer's qualified name.
        pixels: Place in the flattened image of each input, by patch; a linear layer on the whole image has
            one patch.
        scale: Of each input.
        shift: Of each input.
    """

    name: str
    pixels: Int64[Tensor, "patches inputs"] = field(repr=False)
    scale: Float[Tensor, "patches inputs"] = field(repr=False)
    shift: Float[Tensor, "patches inputs"] = field(repr=False)

    def values(self, inputs: Float[Tensor, "*many patches inputs"]) -> Float[Tensor, "*many values"]:
        """Flattened images, in [0, 1] where the inputs are of such."""
        values = torch.empty(*inputs.shape[:-2], self.pixels.numel(), dtype=inputs.dtype)
        values[..., self.pixels.flatten()] = ((inputs - self.shift) / self.scale).flatten(-2)
        return values


def pixel_layers(observation: Observation) -> list[PixelLayer]:
    """Layers that get every pixel once, in the order of the run; found by running blank and other images.

    Args:
        observation: Gives the network; only what stands before these layers plays a part.
    """
    size = math.prod(observation.image_shape)
    some = torch.rand(size, generator=torch.Generator().manual_seed(0))
    probes = [torch.zeros(size), torch.ones(size), (torch.arange(size) + 1) / size, some]
    blank, full, ramp, checked = _inputs(observation, torch.stack(probes))
    found = []
    for name, shift in blank.items():
        scale = full[name] - shift
        places = ((ramp[name] - shift) / scale * size).nan_to_num(0, 0, 0).round().long() - 1
        if not torch.equal(places.flatten().sort().values, torch.arange(size)):
            continue
        if bool((scale * some[places] + shift - checked[name]).abs().max() < _EXACT * scale.abs().max()):
            found.append(PixelLayer(name=name, pixels=places, scale=scale.double(), shift=shift.double()))
    return found


@torch.no_grad()
def _inputs(observation: Observation, probes: Tensor) -> list[dict[str, Tensor]]:
    """What layers get of each probe, by qualified name, shape ``(patches, inputs)``."""
    model, noted = probe_of(observation.model).cpu(), list[dict[str, Tensor]]()
    calls: dict[str, int] = {}

    def noting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            inputs = _patches(layer, args[0]) if args else None
            if inputs is not None and inputs.numel() == probes.shape[1]:
                noted[-1][name] = inputs.float()

        return note

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(noting(name))
    for probe in probes:
        noted.append({})
        model(as_taken(model, probe.reshape(1, *observation.image_shape)))
    once = [name for name in noted[0] if calls[name] == len(probes)]
    return [{name: each[name] for name in once} for each in noted]


def _patches(layer: nn.Module, inputs: Tensor) -> Tensor | None:
    """Inputs of one image by patch; None for a convolution that has other patches than side by side."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    if not isinstance(layer, nn.Conv2d) or layer.kernel_size != layer.stride or layer.groups > 1:
        return None
    return F.unfold(inputs, layer.kernel_size, stride=layer.kernel_size)[0].T
