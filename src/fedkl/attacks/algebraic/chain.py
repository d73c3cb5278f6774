"""Reads a network as a chain: affine preprocessing, blocks of layer, norm and activation, and a linear head.

The network is run once on a blank image and the calls of PyTorch's functions are noted, so that it does not
matter whether an activation is a module or a function, or a norm is called by a hook. Values play no part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedkl.attacks.algebraic.activations import INVERTIBLE, Activation, identity
from fedkl.attacks.probing import as_taken, probe_of
from fedkl.errors import AttackError


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A convolution or a linear layer, with its public tensors in float64.

    Attributes:
        name: The module's qualified name.
        weight: Shape ``(out, in, height, width)``, or ``(out, in)`` for a linear layer.
        bias: Shape ``(out,)``; zeros where it has none.
        stride: Of a convolution; both directions.
        padding: With zeros.
        dilation: As in PyTorch.
    """

    name: str
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.weight.dim() == 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """A norm with statistics of its own per channel, over the positions of the one image.

    Attributes:
        name: The module's qualified name; empty where it has neither scale nor shift.
        eps: Added to the variance.
        scale: γ's parameter name; empty where it has none.
        shift: β's parameter name; empty where it has none.
    """

    name: str
    eps: float
    scale: str
    shift: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Elementwise:
    """A scale and a shift of its own for every element of a value, not of every channel.

    Attributes:
        scale: γ's parameter name; empty where it has none.
        shift: β's parameter name; empty where it has none.
    """

    scale: str = ""
    shift: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Layer, norm (or none), scale and shift per element (or none), and activation.

    Attributes:
        layer: The layer.
        norm: What follows it.
        elementwise: What follows that.
        activation: What follows that.
        input_shape: Of one image, as the layer gets it.
        output_shape: Likewise.
    """

    layer: Layer
    norm: Norm | None
    elementwise: Elementwise | None = None
    activation: Activation
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """A network: scale · image + shift, then the blocks, the last of which is the linear head.

    Attributes:
        scale: Broadcasts over an image.
        shift: Likewise.
        blocks: From the image upwards.
        covered: Whether a norm over all features comes between the last activation and the head: what is
            behind its scale and shift, the head's gradient does not tell.
    """

    scale: Tensor = field(repr=False)
    shift: Tensor = field(repr=False)
    blocks: tuple[Block, ...]
    covered: bool = False


def read_chain(
    model: nn.Module, *, image_shape: tuple[int, int, int], train_mode: bool, attack: str = "ClosedForm"
) -> Chain:
    """Reads a network as a chain.

    Args:
        model: Not changed. On any device; the chain is on the CPU.
        image_shape: ``(channels, height, width)``.
        train_mode: Whether the gradient was computed in train mode.
        attack: Who asks, for messages.

    Raises:
        AttackError: It is not a chain, or a part of it cannot be gone back through; the message names the
            first such part.
    """
    probe = probe_of(model, train_mode=train_mode).cpu()  # linear algebra in float64, on any machine
    image = as_taken(probe, torch.zeros(1, *image_shape))
    reader = _Reader(probe, image, attack)
    with torch.no_grad(), reader:
        output = probe(image)
    return reader.chain(output)


class _Reader(TorchFunctionMode):
    """Notes the calls that carry the image from the input to the output."""

    def __init__(self, model: nn.Module, image: Tensor, attack: str) -> None:
        super().__init__()
        self._attack = attack
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._buffers = {id(buffer): name for name, buffer in model.named_buffers()}
        self._carriers = [image]  # kept, so that no id is used twice
        self._scale, self._shift = image.new_ones(()).double(), image.new_zeros(()).double()
        self._blocks: list[Block] = []
        self._covered: int | None = None  # how many blocks lie below the norm in front of the head

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        last = self._carriers[-1]
        used = [each for each in self._carriers if any(value is each for value in values)]
        shape = tuple(last.shape[1:])
        result = func(*args, **kwargs)
        if used and isinstance(result, Tensor) and result.is_floating_point():
            if any(each is not last for each in used):
                raise AttackError(
                    f"{self._attack}: the network branches at {self._place()}: {_name(func)} takes "
                    "an earlier value. Expected a chain of layers; use another attack for networks with "
                    "shortcuts."
                )
            self._note(func, args, kwargs, shape, tuple(result.shape[1:]))
            self._carriers.append(result)
        return result

    def chain(self, output: Any) -> Chain:
        """What was noted.

        Raises:
            AttackError: The chain does not end in the output, at a linear layer.
        """
        last = self._blocks[-1] if self._blocks else None
        ends = output is self._carriers[-1] and last is not None
        if (
            last is None
            or not ends
            or last.layer.is_convolution
            or last.norm
            or last.elementwise
            or last.activation.name != "identity"
        ):
            raise AttackError(
                f"{self._attack}: expected a network that ends in one linear layer's logits, got "
                f"{self._place()} at the end. Use another attack."
            )
        if self._covered not in (None, len(self._blocks) - 1):
            raise AttackError(f"{self._attack}: layer_norm further down {_why_not(F.layer_norm)}")
        return Chain(
            scale=self._scale,
            shift=self._shift,
            blocks=tuple(self._blocks),
            covered=self._covered is not None,
        )

    def _place(self) -> str:
        return f"'{self._blocks[-1].layer.name}'" if self._blocks else "the input"

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any, after: Any
    ) -> None:
        if func in _RESHAPES:
            return
        if func in _LAYERS:
            layer = self._layer(_LAYERS[func](*args, **kwargs))
            self._blocks.append(
                Block(layer=layer, norm=None, activation=identity(), input_shape=before, output_shape=after)
            )
        elif (
            func in _AFFINE
            and not self._blocks
            and len(args) == 2
            and not kwargs
            and args[0] is self._carriers[-1]
        ):
            self._scale, self._shift = _AFFINE[func](self._scale, self._shift, args[1])
        elif (
            func in _ELEMENTWISE
            and self._blocks
            and not kwargs
            and (name := self._element_parameter(args, before))
        ):
            self._extend(elementwise=Elementwise(**{_ELEMENTWISE[func]: name}))
        elif func in (F.batch_norm, F.instance_norm) and self._blocks:
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.apply_defaults()
            self._extend(norm=self._norm(func.__name__, bound.arguments))
        elif func is F.layer_norm and self._blocks and self._blocks[-1].activation.name != "identity":
            self._covered = len(self._blocks)
        elif func in INVERTIBLE and self._blocks:
            self._extend(activation=INVERTIBLE[func](*args, **kwargs))
        else:
            raise AttackError(f"{self._attack}: {_name(func)} after {self._place()} {_why_not(func)}")

    def _element_parameter(self, args: tuple[Any, ...], shape: Any) -> str:
        """The name of the parameter, of the shape of one value, that the last value is met with."""
        others = [each for each in args if each is not self._carriers[-1]]
        if len(args) != 2 or len(others) != 1 or not isinstance(others[0], Tensor):
            return ""
        return self._names.get(id(others[0]), "") if tuple(others[0].shape) == shape else ""

    def _extend(
        self,
        norm: Norm | None = None,
        elementwise: Elementwise | None = None,
        activation: Activation | None = None,
    ) -> None:
        last = self._blocks[-1]
        own = last.elementwise
        late = (norm and (last.norm or own)) or (own and elementwise and (own.shift or elementwise.scale))
        if last.activation.name != "identity" or late:
            raise AttackError(
                f"{self._attack}: expected a layer, its norm and its activation in this order, got another "
                f"after {self._place()}. Use another attack."
            )
        if norm and not last.layer.is_convolution:
            raise AttackError(
                f"{self._attack}: the norm after {self._place()} has one position per channel: its "
                "statistics say nothing about γ and β. Use another attack."
            )
        if own and elementwise:
            elementwise = Elementwise(scale=own.scale, shift=elementwise.shift)
        self._blocks[-1] = replace(
            last,
            norm=norm or last.norm,
            elementwise=elementwise or own,
            activation=activation or last.activation,
        )

    def _layer(self, call: dict[str, Any]) -> Layer:
        weight, bias = call["weight"], call["bias"]
        name = self._names.get(id(weight), "")
        if not name.endswith("weight") or (bias is not None and id(bias) not in self._names):
            raise AttackError(
                f"{self._attack}: the weight of a layer after {self._place()} is not a parameter of the "
                "model. Expected plain layers; use another attack."
            )
        if call.get("groups", 1) != 1 or isinstance(call.get("padding"), str):
            raise AttackError(
                f"{self._attack}: '{name}' has groups or padding by name; expected an ordinary convolution. "
                "Use another attack."
            )
        shift = torch.zeros(len(weight)) if bias is None else bias.detach()
        geometry = {key: _pair(call[key]) for key in ("stride", "padding", "dilation") if key in call}
        return Layer(
            name=name.rpartition(".")[0], weight=weight.detach().double(), bias=shift.double(), **geometry
        )

    def _norm(self, kind: str, call: dict[str, Any]) -> Norm:
        if not call.get("training", call.get("use_input_stats")):
            raise AttackError(
                f"{self._attack}: {kind} after {self._place()} used running statistics, so that γ and β are "
                "no moments of this image; expected train mode. Use another attack."
            )
        scale, shift = (self._names.get(id(call[key]), "") for key in ("weight", "bias"))
        named = scale or shift or self._buffers.get(id(call["running_mean"]), "")
        return Norm(name=named.rpartition(".")[0], eps=call["eps"], scale=scale, shift=shift)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
    return {"weight": weight, "bias": bias}


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any]:
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    return {"weight": weight, "bias": bias, "groups": groups, **geometry}


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _why_not(func: Any) -> str:
    name = _name(func)
    if "relu" in name:
        return "cannot be inverted: expected sigmoid, tanh, leaky ReLU, ELU or softplus. Use another attack."
    if name in ("group_norm", "layer_norm", "rms_norm"):
        return (
            "has statistics over several channels, so that γ and β are no moments of a channel; expected "
            "batch or instance norms. Use another attack."
        )
    return (
        "is not known to this attack: expected a chain of layers, norms and activations. Use another attack."
    )


_Affine = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
_AFFINE: dict[Any, _Affine] = {
    Tensor.add: lambda a, b, c: (a, b + c),
    Tensor.sub: lambda a, b, c: (a, b - c),
    Tensor.mul: lambda a, b, c: (a * c, b * c),
    Tensor.div: lambda a, b, c: (a / c, b / c),
    Tensor.__sub__: lambda a, b, c: (a, b - c),
    Tensor.__truediv__: lambda a, b, c: (a / c, b / c),
}
_ELEMENTWISE = {Tensor.mul: "scale", torch.mul: "scale", Tensor.add: "shift", torch.add: "shift"}
_LAYERS: dict[Any, Callable[..., dict[str, Any]]] = {F.linear: _linear, F.conv2d: _conv2d}
_RESHAPES = (torch.flatten, Tensor.flatten, Tensor.reshape, Tensor.view)
