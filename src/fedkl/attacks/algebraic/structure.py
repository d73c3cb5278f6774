"""What a gradient gives away without any optimization, whatever the network below its linear head.

1. Label and head input. With cross-entropy the head's gradient at batch size 1 is ∂L/∂b = p − y and
   ∂L/∂W = (p − y) hᵀ. Every row of the second, divided by its entry of the first, is h; least squares over
   the rows, h = ∂L/∂Wᵀ (p − y) / ‖p − y‖², is exact but for rounding. Nothing below the head plays a part: h
   may come from shortcuts, a ReLU or a global average. Without a bias h is known up to its factor only, and
   is not read. A batch gives Σ (pᵢ − yᵢ) hᵢᵀ, which is not taken apart here.
2. Dead channels. A norm per channel sends δ_u = γ/σ · (…) down to the layer before it. With γ_c = 0 that is
   exactly zero, and so is row c of the layer's ∂L/∂W: the support of γ is public, whatever the key. A row is
   zero also where a whole channel is cut off above: where a ReLU gets no positive value, at any position.
   Right behind a norm with statistics of the one image β ≥ 0, as ReLU keys make it, rules that out: x̂ has
   mean 0.

Source:
    Head division: Geiping et al. 2020, proposition 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedkl.attacks.labels import head_names, infer_label
from fedkl.attacks.probing import as_taken, probe_of
from fedkl.errors import AttackError
from fedkl.protocol import Observation
from fedkl.types import Labels

_LAYERS = (F.conv1d, F.conv2d, F.conv3d, F.linear)
_NORMS = (F.batch_norm, F.instance_norm)  # the others mix channels, so that none is cut off by its γ alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """What is read off a gradient. All of it is public: it follows from what was sent.

    Attributes:
        label: Of the one image, shape ``(1,)``; None for a batch or where the head's gradient is not seen.
        head_input: What the linear head got, shape ``(features,)``; None likewise, or without a bias.
        dead: By a layer's qualified name, which of its outputs have an all-zero row in ∂L/∂W. Empty where the
            update was transformed, which may make such rows.
        scales: By a layer's qualified name, the name of γ of the batch or instance norm right behind it.
    """

    label: Labels | None
    head_input: Float[Tensor, " features"] | None = field(repr=False)
    dead: Mapping[str, Bool[Tensor, " outputs"]] = field(repr=False)
    scales: Mapping[str, str]

    @property
    def support(self) -> dict[str, Bool[Tensor, " channels"]]:
        """By the name of every γ that has a layer right before it: where it is not zero."""
        return {scale: ~self.dead[layer] for layer, scale in self.scales.items() if layer in self.dead}


def read_structure(observation: Observation) -> Structure:
    """Reads a gradient; values of γ and β in `Observation.model` play no part.

    Args:
        observation: Of any network with a linear head. Several local steps, weights or an update that was
            changed otherwise than by a factor blur the head, so that it is not read there.
    """
    observation = observation.as_gradient().unaltered()
    plain = observation.local.is_gradient and observation.up_to_a_factor
    single = observation.batch_size == 1 and plain
    exact = observation.local.algorithm == "fedsgd"  # weights hide what is below their last digit
    return Structure(
        label=_label(observation) if single else None,
        head_input=_head_input(observation) if single else None,
        dead=_dead(observation) if observation.up_to_a_factor and exact else {},
        scales=_scales(observation),
    )


def _label(observation: Observation) -> Labels | None:
    try:
        return infer_label(observation)
    except AttackError:  # the head's gradient is not seen
        return None


def _head_input(observation: Observation) -> Tensor | None:
    weight, bias = (observation.gradient.get(name) for name in head_names(observation))
    if weight is None or bias is None or not bool(bias.any()):
        return None
    slope = bias.double()
    return (weight.double().T @ slope / slope.square().sum()).to(weight.dtype)


def _dead(observation: Observation) -> dict[str, Tensor]:
    dead = {}
    for name, module in observation.model.named_modules():
        gradient = observation.gradient.get(f"{name}.weight")
        by_output = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if by_output and gradient is not None:
            dead[name] = ~gradient.flatten(1).any(1)
    return dead


def _scales(observation: Observation) -> dict[str, str]:
    """Which γ stands right behind which layer, from one run on a blank image; values play no part."""
    model = probe_of(observation.model)  # any mode: no statistics of one blank image are needed
    reader = _Reader(model)
    blank = as_taken(model, torch.zeros(1, *observation.image_shape))
    with torch.no_grad(), reader:
        model(blank)
    return reader.scales


class _Reader(TorchFunctionMode):
    """Notes which norm takes which layer's output, whether modules, functions or hooks call them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scales: dict[str, str] = {}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._outputs: list[tuple[Tensor, str]] = []  # kept, so that no id is used twice

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        used = [self._names.get(id(value), "") for value in (*args, *kwargs.values())]
        scale = next((name for name in used if name.endswith("weight")), "")
        if func in _LAYERS and scale:
            self._outputs.append((result, scale.rpartition(".")[0]))
        elif func in _NORMS and scale:
            self.scales |= {layer: scale for output, layer in self._outputs if output is args[0]}
        return result
