"""What goes into and comes back out of a network's layers: the rows that their gradients are made of.

The gradient of a linear layer's weight, and of a convolution's over its patches, is a sum of outer products
δ aᵀ: a is what went in at one place of one image, δ what the loss sent back there. A bias is a weight of an
input that is always 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.attacks.memory import at_once, kept_for_backward, size_of
from fedkl.protocol.procedure import loss_of

_WIDEST = 4096  # inputs of a layer, whose second moments are inverted
_COPIES = 3  # of an image's rows, and of its largest gradient, at once
_ASKED = 2  # images: some networks do not take one
_SIZES = (2, 3, 4)  # of batches that say which dimension is that of images
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
        """The layer's part of an update; float32, shape ``(outputs, inputs)``."""
        weight = update[f"{self.name}.weight"].flatten(1).float()
        if not self.bias:
            return weight
        return torch.cat([weight, update[f"{self.name}.bias"][:, None].float()], 1)


def layers_of(model: nn.Module, observed: Mapping[str, Tensor]) -> list[Layer]:
    """The layers that presence can be looked for in, in the network's order.

    Left out: grouped convolutions, layers of more than 4,096 inputs, and those of complex numbers.
    """
    found = []
    for name, module in model.named_modules():
        fits = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if fits and f"{name}.weight" in observed and module.weight.is_floating_point():
            outputs, inputs = module.weight.flatten(1).shape
            bias = f"{name}.bias" in observed
            if inputs + bias <= _WIDEST:
                found.append(Layer(name=name, bias=bias, inputs=inputs + bias, outputs=outputs))
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Of some images, at one layer; float32, whatever the network computes in.

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
            in it is trained of, or of whose inputs no dimension, or more than one, is that of the images. It
            need not be the first: sequences may come before images. Of a chunk in which a layer is not called
            so, it is not in the result either.
        chunk: Images at once, at most; fewer where the memory does not suffice.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        where = _where_images_are(model, images, layers, most=min(chunk, len(images)))
        if len(images) > _ASKED:
            each = _bytes_of_one(model, images[:_ASKED].clone(), labels[:_ASKED], layers, where)
            chunk = min(chunk, at_once(each), max(1, _ENOUGH // max(1, each)))
        for part in torch.split(torch.arange(len(images)), chunk):
            yield _rows(model, images[part], labels[part], layers, where)
    finally:
        for module, mode in training.items():
            module.training = mode


_Where = Mapping[str, "Sequence[int | None]"]
"""Which dimension of what a layer is called with is that of the images, call by call."""


def _where_images_are(model: nn.Module, images: Tensor, layers: list[Layer], *, most: int) -> _Where | None:
    """Found with batches of two sizes: it is the dimension that has the one, and then the other.

    None of a network that does not take batches of two sizes: nobody knows.

    Args:
        model: In eval mode.
        images: Some of them are taken, in turn if there are few.
        layers: Which.
        most: Images that it is called with at once.
    """
    seen: dict[int, dict[str, list[tuple[int, ...]]]] = {}
    for size in dict.fromkeys((*_SIZES, most - 1, most)):
        if size > 1 and len(seen) < 2:
            part = images[torch.arange(size) % len(images)]
            with suppress(Exception), torch.random.fork_rng(devices=[]):  # as of `_bytes_of_one`
                seen[size] = _shapes(model, part, layers)
    if len(seen) < 2:
        return None
    (one, before), (other, after) = seen.items()
    return {
        name: [_changed(shapes, one, other) for shapes in zip(calls, after[name], strict=True)]
        for name, calls in before.items()
        if len(calls) == len(after[name])
    }


def _shapes(model: nn.Module, images: Tensor, layers: list[Layer]) -> dict[str, list[tuple[int, ...]]]:
    """Of what each layer is called with."""
    found: dict[str, list[tuple[int, ...]]] = {layer.name: [] for layer in layers}

    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, named: found[name].append(tuple(_given(args, named).shape))

    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(noting(layer.name), with_kwargs=True)
        for layer in layers
    ]
    try:
        with torch.enable_grad():  # without, encoders of PyTorch pass their layers by
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _given(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """What a layer is called with, also by name."""
    given: Tensor = args[0] if args else named["input"]
    return given


def _changed(shapes: tuple[tuple[int, ...], ...], one: int, other: int) -> int | None:
    """The only dimension that is not the same, where it is of one size and then of the other."""
    before, after = shapes
    if len(before) != len(after):
        return None
    differing = [place for place, size in enumerate(before) if size != after[place]]
    fits = [place for place in differing if (before[place], after[place]) == (one, other)]
    return fits[0] if len(differing) == len(fits) == 1 else None


def _bytes_of_one(
    model: nn.Module, images: Tensor, labels: Tensor, layers: list[Layer], where: _Where | None
) -> int:
    """Of one of some images, about: what the network keeps, its rows, and what is made of them."""
    each = 0
    with suppress(Exception), torch.random.fork_rng(devices=[]):  # what it draws is not to depend on this
        rows = _rows(model, images, labels, layers, where)
        each = sum(size_of((found.inputs, found.outputs)) for found in rows.values())
    largest = max((4 * layer.inputs * layer.outputs for layer in layers), default=0)
    return (kept_for_backward(model, images) + _COPIES * each) // len(images) + _COPIES * largest


def _rows(
    model: nn.Module, images: Tensor, labels: Tensor, layers: list[Layer], where: _Where | None
) -> dict[str, Rows]:
    calls = {
        layer.name: _Calls(
            model.get_submodule(layer.name),
            where=None if where is None else where.get(layer.name, ()),
            images=len(images),
        )
        for layer in layers
    }
    try:
        with torch.enable_grad():
            # Each image's own loss: the mean over this chunk times its size is their sum.
            loss = loss_of(model(images), labels) * len(images)
            seen = [output for each in calls.values() for _, output, _ in each.noted]
            # Zeros where the loss does not look, e.g. at the scores of an auxiliary head.
            back = torch.autograd.grad(loss, seen, materialize_grads=True) if seen else ()
            sent = dict(zip(map(id, seen), back, strict=True))
    finally:
        for each in calls.values():
            each.handle.remove()
    found = {}
    for layer in layers:
        module, noted = model.get_submodule(layer.name), calls[layer.name].noted
        if noted:
            inputs = _joined([_places(module, given.movedim(place, 0)) for given, _, place in noted])
            outputs = _joined([_sent(module, sent[id(out)].movedim(place, 0)) for _, out, place in noted])
            inputs, outputs = inputs.float(), outputs.float()
            found[layer.name] = Rows(inputs=_with_one(inputs) if layer.bias else inputs, outputs=outputs)
    return found


class _Calls:
    """Notes what goes into a layer, what comes out, and which dimension of both is that of the images.

    Args:
        layer: Linear, or a convolution.
        where: That dimension, call by call; None: the first.
        images: How many there are.
    """

    def __init__(self, layer: nn.Module, *, where: Sequence[int | None] | None, images: int) -> None:
        self.noted: list[tuple[Tensor, Tensor, int]] = []
        self._where, self._images, self._count = where, images, 0
        self._within = 1 if isinstance(layer, nn.Linear) else 3  # dimensions of what goes in at one place
        self.handle = layer.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        given, place = _given(args, named), self._place()
        if place is not None and place < given.dim() - self._within and output.requires_grad:
            if given.shape[place] == self._images:
                self.noted.append((given.detach(), output, place))
        return output.clone()  # what comes next may write into it

    def _place(self) -> int | None:
        """Of the call that is now made."""
        self._count += 1
        if self._where is None:
            return 0
        return self._where[self._count - 1] if self._count <= len(self._where) else None


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
