"""How a lock's secrets become γ and β, as a function without the model: what a server would simulate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.locking import surgery
from fedkl.locking.activations import ACTIVATIONS, Activation
from fedkl.locking.layers import LockLayer
from fedkl.types import NamedTensors

KEY = "key"
"""The key's name among the secrets; no parameter can have it, since theirs hold a dot."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One lock layer: its generated tensor, its W and b by name, and where its k comes from.

    Attributes:
        tensor: Name of the γ or β in the baked model.
        shape: Of that tensor.
        weight: Name of W among the private parameters.
        bias: Name of b.
        source: `KEY`, or the generated tensor that is k.
        activation: The function act.
    """

    tensor: str
    shape: tuple[int, ...]
    weight: str
    bias: str
    source: str
    activation: Activation


@dataclass(frozen=True)
class Generation:
    """Maps secrets by name (the key and every W and b) to all γ and β by name; holds no secret itself.

    Attributes:
        links: In the order of their chains.
    """

    links: tuple[Link, ...]

    def __call__(self, secrets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """γ = act(W k + b) for every link; differentiable."""
        vectors = {KEY: secrets[KEY]}
        for link in self.links:
            pre_activation = F.linear(vectors[link.source], secrets[link.weight], secrets[link.bias])
            vectors[link.tensor] = ACTIVATIONS[link.activation](pre_activation)
        return {link.tensor: vectors[link.tensor].reshape(link.shape) for link in self.links}


def generation_of(model: nn.Module) -> Generation:
    """The links of a locked model.

    Args:
        model: Locked; not changed.
    """
    names = {id(module): name for name, module in model.named_modules()}
    links: list[tuple[int, Link]] = []
    for norm, tensors in surgery.generated(model).items():
        for tensor_name, value in tensors.items():
            own = f"{names[id(norm)]}.{tensor_name}".removeprefix(".")
            secret = f"{names[id(norm)]}.parametrizations.{tensor_name}".removeprefix(".")
            layer: LockLayer = norm.parametrizations[tensor_name][0]  # type: ignore[index, assignment]
            before = layer.chain.before(layer.position)
            source = KEY if before is None else f"{names[id(before[0])]}.{before[1]}".removeprefix(".")
            link = Link(
                tensor=own,
                shape=tuple(value.shape),
                weight=f"{secret}.original0",
                bias=f"{secret}.original1",
                source=source,
                activation=layer.activation,
            )
            links.append((layer.position, link))
    return Generation(tuple(link for _, link in sorted(links, key=lambda one: one[0])))


def secrets_of(key: Tensor, private_parameters: NamedTensors) -> dict[str, Tensor]:
    """The argument of a `Generation`: the key and the lock layers, as detached copies of one dtype."""
    like = next(iter(private_parameters.values()))
    secrets = {KEY: key.to(like), **private_parameters}
    return {name: tensor.detach().clone() for name, tensor in secrets.items()}
