"""What goes into and comes back out of a network's layers: the rows that their gradients are made of.

The gradient of a linear layer's weight, and of a convolution's over its patches, is a sum of outer products
δ aᵀ: a is what went in at one place of one image, δ what the loss sent back there. A bias is a weight of an
input that is always 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.attacks.memory import at_once, kept_for_backward, size_of
from fedkl.protocol.procedure import loss_of

_WIDEST = 4096  # inputs of a layer, whose second moments are inverted
_COPIES = 3  # of an image's rows, and of its largest gradient, at once
_ASKED = 2  # images: some networks do not take one
_ENOUGH = 4 * 2**30  # bytes: a chunk of more is no faster


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer or convolution whose weight was observed.

    Attributes:
        name: Its qualified name.
        bias: Whether its bias was observed too.
        inputs: Numbers that go in at one place, 1 for a bias included.
        outputs: Numbers that come out.
    """

    name: str
    bias: bool
    inputs: int
    outputs: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its part of an update."""
        return (f"{self.name}.weight", f"{self.name}.bias") if self.bias else (f"{self.name}.weight",)

    def matrix(self, update: Mapping[str, Tensor]) -> Tensor:
        """The layer's part of an update; shape ``(outputs, inputs)``."""
        weight = update[f"{self.name}.weight"].flatten(1)
        if not self.bias:
            return weight
        return torch.cat([weight, update[f"{self.name}.bias"][:, None]], 1)


def layers_of(model: nn.Module, observed: Mapping[str, Tensor]) -> list[Layer]:
    """The layers that presence can be looked for in, in the network's order.

    Left out: grouped convolutions, and layers of more than 4,096 inputs.
    """
    found = []
    for name, module in model.named_modules():
        fits = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if fits and f"{name}.weight" in observed:
            outputs, inputs = module.weight.flatten(1).shape
            bias = f"{name}.bias" in observed
            if inputs + bias <= _WIDEST:
                found.append(Layer(name=name, bias=bias, inputs=inputs + bias, outputs=outputs))
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Of some images, at one layer.

    Attributes:
        inputs: a, shape ``(images, places, inputs)``.
        outputs: δ of each image's own loss, shape ``(images, places, outputs)``.
    """

    inputs: Tensor = field(repr=False)
    outputs: Tensor = field(repr=False)


def looked_at(layers: Iterable[Layer], update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What some layers read of an update."""
    return {name: update[name] for layer in layers for name in layer.tensors}


def rows_of(
    model: nn.Module, images: Tensor, labels: Tensor, *, layers: list[Layer], chunk: int = 64
) -> Iterator[dict[str, Rows]]:
    """Rows of images in eval mode, a chunk of images after the other; the model is left as it was.

    Args:
        model: The classifier.
        images: As it is called with.
        labels: Shape ``(images,)``.
        layers: Of `layers_of`. Not in the result is one that the model does not call, that nothing before or
            in it is trained of, or that is not called with the images first.
        chunk: Images at once, at most; fewer where the memory does not suffice.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        if len(images) > _ASKED:
            each = _bytes_of_one(model, images[:_ASKED].clone(), labels[:_ASKED], layers)
            chunk = min(chunk, at_once(each), max(1, _ENOUGH // max(1, each)))
        for part in torch.split(torch.arange(len(images)), chunk):
            yield _rows(model, images[part], labels[part], layers)
    finally:
        for module, mode in training.items():
            module.training = mode


def _bytes_of_one(model: nn.Module, images: Tensor, labels: Tensor, layers: list[Layer]) -> int:
    """Of one of some images, about: what the network keeps, its rows, and what is made of them."""
    each = 0
    with suppress(Exception), torch.random.fork_rng(devices=[]):  # what it draws is not to depend on this
        rows = _rows(model, images, labels, layers)
        each = sum(size_of((found.inputs, found.outputs)) for found in rows.values())
    largest = max((4 * layer.inputs * layer.outputs for layer in layers), default=0)
    return (kept_for_backward(model, images) + _COPIES * each) // len(images) + _COPIES * largest


def _rows(model: nn.Module, images: Tensor, labels: Tensor, layers: list[Layer]) -> dict[str, Rows]:
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        model.get_submodule(layer.name).register_forward_hook(
            _noting(calls.setdefault(layer.name, []), len(images))
        )
        for layer in layers
    ]
    try:
        with torch.enable_grad():
            # Each image's own loss: the mean over this chunk times its size is their sum.
            loss = loss_of(model(images), labels) * len(images)
            seen = [output for each in calls.values() for _, output in each]
            # Zeros where the loss does not look, e.g. at the scores of an auxiliary head.
            back = torch.autograd.grad(loss, seen, materialize_grads=True) if seen else ()
            sent = dict(zip(map(id, seen), back, strict=True))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for layer in layers:
        module, noted = model.get_submodule(layer.name), calls[layer.name]
        if noted:
            inputs = _joined([_places(module, given) for given, _ in noted])
            outputs = _joined([_sent(module, sent[id(output)]) for _, output in noted])
            found[layer.name] = Rows(inputs=_with_one(inputs) if layer.bias else inputs, outputs=outputs)
    return found


def _noting(
    calls: list[tuple[Tensor, Tensor]], images: int
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if len(args[0]) == images and output.requires_grad:
            calls.append((args[0].detach(), output))
        return output.clone()  # what comes next may write into it

    return note


def _places(module: nn.Module, given: Tensor) -> Tensor:
    """What goes in, at every place; shape ``(images, places, inputs)``."""
    if isinstance(module, nn.Conv2d):
        padded, padding = given, module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            padded, padding = F.pad(given, module._reversed_padding_repeated_twice, mode=mode), (0, 0)
        patches = F.unfold(
            padded, module.kernel_size, dilation=module.dilation, padding=padding, stride=module.stride
        )
        return patches.transpose(1, 2)
    return given.reshape(len(given), -1, given.shape[-1])


def _sent(module: nn.Module, gradient: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return gradient.flatten(2).transpose(1, 2)
    return gradient.reshape(len(gradient), -1, gradient.shape[-1])


def _joined(parts: list[Tensor]) -> Tensor:
    """Of a layer that is called several times; most are called once, and large."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _with_one(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
