"""Whole layers that stay with the client, and the start that every client draws for them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fedkl.errors import shown, warn
from fedkl.keys import Key, Uniform, normal, secure_uniform
from fedkl.locking.split import Split
from fedkl.locking.withholding import withheld, withhold

LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
"""What may be a network's first layer."""


def find_layers(model: nn.Module, names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The modules that are meant, and what is wrong with those that cannot be found.

    Args:
        model: The plain model; not changed.
        names: Of modules; ``"head"`` also means the last linear layer and ``"stem"`` the first layer with
            weights (`LAYERS`), in `named_modules()` order, unless a module with parameters has that name.
    """
    known = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    layers = [name for name, module in known.items() if isinstance(module, LAYERS)]
    linear = [name for name in layers if isinstance(known[name], nn.Linear)]
    meant = {"head": linear[-1:], "stem": layers[:1]}
    chosen, problems = [], []
    for name in names:
        if name in known and any(True for _ in known[name].parameters()):
            chosen.append(name)
        elif meant.get(name):
            chosen += meant[name]
        elif name in known:
            problems.append(f"'{name}' ({type(known[name]).__name__}) has no parameters to keep private")
        else:
            close = difflib.get_close_matches(name, layers, n=1)
            hint = f", did you mean '{close[0]}'?" if close else ""
            problems.append(f"'{name}' is not a module of this model{hint}")
    problems += _tied_problems(model, [known[name] for name in chosen])
    own = {id(parameter) for name in chosen for parameter in known[name].parameters()}
    if chosen and all(id(parameter) in own for parameter in model.parameters()):
        problems.append(f"with {', '.join(chosen)} private, no parameter is left to send")
    return tuple(dict.fromkeys(chosen)), problems


def warn_about_frozen(model: nn.Module, names: Sequence[str]) -> None:
    """Warns of parameters of private layers that no training changes.

    Args:
        model: The plain model.
        names: Of its private layers.
    """
    layers = [(name, model.get_submodule(name)) for name in names]
    frozen = [
        f"{name}.{own}"
        for name, layer in layers
        for own, parameter in layer.named_parameters()
        if not parameter.requires_grad
    ]
    if frozen and any(parameter.requires_grad for parameter in model.parameters()):
        warn(
            f"{', '.join(map(shown, frozen))}: frozen (requires_grad=False) in a private layer. Nothing is "
            "drawn for what never trains: it stays as the model has it, and hides nothing from a server that "
            "knows the model. Unfreeze it, or keep other layers private."
        )


def _tied_problems(model: nn.Module, chosen: Sequence[nn.Module]) -> list[str]:
    """What would be private here and public there."""
    inside = {id(module) for each in chosen for module in each.modules()}
    own = {id(t) for each in chosen for t in (*each.parameters(), *each.buffers())}
    return [
        f"'{prefix}{'.' * bool(prefix)}{name}' is a tensor of a private layer too, and would stay public"
        for prefix, module in model.named_modules()
        if id(module) not in inside
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and id(tensor) in own
    ]


class OwnLayers:
    """Private layers, which every client draws for itself. Knows their names, and how each tensor starts.

    Frozen parameters stay as they are, unless all of the model are: then nothing is trained yet.

    Args:
        model: With its initial weights, and locked already if it is to be: what a lock generates is not part
            of the layers.
        names: Of modules, see `find_layers`.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.names = names
        locked = {id(tensor) for _, tensor in withheld(model)}
        plain = [parameter for parameter in model.parameters() if id(parameter) not in locked]
        whole = not any(parameter.requires_grad for parameter in plain)
        with torch.no_grad():
            self._start = {
                f"{prefix}.{name}": (float(tensor.mean()), float(tensor.std(correction=0)))
                for prefix, module in self._parts(model)
                for name, tensor in module.named_parameters(recurse=False)
                if id(tensor) not in locked and tensor.is_floating_point() and (tensor.requires_grad or whole)
            }

    def withhold(self, model: nn.Module) -> None:
        """Makes all parameters and buffers of the layers private."""
        for _, module in self._parts(model):
            withhold(module, tuple(name for name, _ in module.named_parameters(recurse=False)))
            withhold(module, tuple(name for name, _ in module.named_buffers(recurse=False)))

    def redraw(self, model: nn.Module, *, uniform: Uniform = secure_uniform) -> None:
        """Draws every parameter that is trained from a normal of the mean and deviation that it started with.

        One that started constant, as the scale of a norm, starts so for every client.
        """
        with torch.no_grad():
            for name, (mean, spread) in self._start.items():
                parameter = model.get_parameter(name)
                parameter.copy_(mean + spread * normal(uniform, *parameter.shape).to(parameter))

    def _parts(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name in self.names:
            yield from model.get_submodule(name).named_modules(prefix=name)


class OwnSplit(Split):
    """A split with private layers, drawn anew for each client."""

    def __init__(self, model: nn.Module, own: OwnLayers) -> None:
        super().__init__(model)
        self._own = own
        own.withhold(model)
        self._check_nothing_lost()

    def redraw(self, *, key: Key | None = None, uniform: Uniform = secure_uniform) -> None:
        """Draws the private layers anew, as for another client."""
        self._own.redraw(self._model, uniform=uniform)
