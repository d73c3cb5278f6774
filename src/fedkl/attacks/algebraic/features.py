"""What convolutions of a network got, read off a gradient: which of them can be read, and what is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from fedkl.attacks.algebraic.convolution import reads_of
from fedkl.attacks.algebraic.subspace import blind_inputs, channels_needed
from fedkl.attacks.matching.objectives import differentiable
from fedkl.attacks.probing import as_taken, probe_of
from fedkl.protocol import Observation
from fedkl.types import NamedTensors

_SURE = 0.1  # largest gap with which a blind input is taken for what it says


@dataclass(frozen=True, kw_only=True, eq=False)
class Readable:
    """A convolution whose input its gradient may tell.

    Attributes:
        name: The module's qualified name.
        reads: See `blind_inputs`.
        places: Positions of its input.
    """

    name: str
    reads: Int64[Tensor, "kernel positions"] = field(repr=False)
    places: int


def readable_convolutions(observation: Observation) -> list[Readable]:
    """Those whose shape and the batch's size allow it, with an observed gradient, in the order of the run.

    Convolutions with a stride are left out: too many of their input's places are read once only, so that
    patches are not tied to each other. So are those that are run twice, in groups, or with padding that is
    not of zeros or is given by name.

    Args:
        observation: Values of the model's tensors play no part.
    """
    images = observation.batch_size
    model = probe_of(observation.model)
    calls: list[tuple[nn.Conv2d, tuple[int, ...]]] = []
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for module in names:
        module.register_forward_pre_hook(lambda conv, args: calls.append((conv, tuple(args[0].shape[2:]))))
    with torch.no_grad():
        model(as_taken(model, torch.zeros(1, *observation.image_shape)))
    once = [conv for conv, _ in calls]
    found = []
    for conv, shape in calls:
        padding = conv.padding
        if isinstance(padding, str) or conv.padding_mode != "zeros" or conv.groups > 1:
            continue
        observed = f"{names[conv]}.weight" in observation.gradient
        if once.count(conv) > 1 or set(conv.stride) != {1} or not observed:
            continue
        places = shape[0] * shape[1]
        reads = reads_of(
            conv.kernel_size, places=shape, stride=conv.stride, padding=padding, dilation=conv.dilation
        )
        reads = torch.where(reads < 0, places, reads)
        sizes = {"inputs": conv.in_channels, "places": places, "images": images}
        if channels_needed(conv.out_channels, reads=reads, **sizes):
            found.append(Readable(name=names[conv], reads=reads, places=places))
    return found


def read_features(observation: Observation, *, most: int) -> dict[str, Float[Tensor, "images values"]]:
    """Inputs of convolutions by qualified name, those next to the image first; each image's up to its factor.

    The images of a batch are in no order, and in another one for every convolution.

    Args:
        observation: Of one step.
        most: At most so many.
    """
    found: dict[str, Tensor] = {}
    for one in readable_convolutions(observation):
        gradient = observation.gradient[f"{one.name}.weight"].detach().cpu().double().flatten(2)
        got = blind_inputs(gradient, reads=one.reads, places=one.places, images=observation.batch_size)
        if got is not None and got.gap < _SURE:
            found[one.name] = got.inputs.flatten(1).float()
        if len(found) == most:
            break
    return found


class Forward:
    """The network up to some layers' inputs, on the CPU, for batches with private parameters of their own.

    Args:
        observation: Gives the network.
        names: The layers, by qualified name.
    """

    def __init__(self, observation: Observation, names: Sequence[str]) -> None:
        self.image_shape = observation.image_shape
        self._model = differentiable(observation, torch.float32).cpu()
        self._state = {name: tensor.detach() for name, tensor in self._model.named_parameters()}
        self._state |= dict(self._model.named_buffers())
        self._names, self._noted = tuple(names), dict[str, Tensor]()
        for module in self._model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()  # which values a client dropped nobody knows
        for name in names:
            self._model.get_submodule(name).register_forward_pre_hook(self._noting(name))

    def _noting(self, name: str) -> Callable[[object, tuple[Tensor, ...]], None]:
        def note(module: object, args: tuple[Tensor, ...]) -> None:
            self._noted[name] = args[0].flatten(1)

        return note

    def one(self, secrets: NamedTensors, images: Float[Tensor, "images ..."]) -> dict[str, Tensor]:
        """Features of one batch, by layer, shape ``(images, values)``; usable under `torch.func`.

        Args:
            secrets: What to put in place of the network's own parameters, by name.
            images: Of any shape behind the first dimension that holds their values.
        """
        functional_call(self._model, {**self._state, **secrets}, (images.view(-1, *self.image_shape),))
        noted = {name: self._noted[name] for name in self._names}
        self._noted.clear()
        return noted

    def __call__(self, secrets: NamedTensors, images: Tensor) -> dict[str, Tensor]:
        """Features of several batches by layer, shape ``(batches, images, values)``; secrets likewise."""
        return dict(vmap(self.one)(secrets, images))

    def misfit(self, secrets: NamedTensors, images: Tensor, target: NamedTensors) -> Tensor:
        """1 − |cos| between a batch's features and others of length 1, averaged over images and layers."""
        each = []
        for name, values in self.one(secrets, images).items():
            own = F.normalize(values, dim=1, eps=1e-30)
            sign = torch.where((own * target[name]).sum(1, keepdim=True) < 0, -1.0, 1.0)
            each.append((sign * own - target[name]).square().sum(1).mean() / 2)
        return torch.stack(each).mean()
