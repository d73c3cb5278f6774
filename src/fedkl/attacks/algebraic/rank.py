"""Which layers the closed form can pass, by counting equations and unknowns beforehand."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from fedkl.attacks.algebraic.chain import Block, read_chain


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One layer, from its output down to its input.

    Attributes:
        name: The layer's qualified name.
        equations: Forward, one per output value, and backward, one per weight. Those of dead channels are not
            counted: their gradients are 0 and their outputs constant. Nor do all the weights that read one
            constant input count: they say one thing about it, its value.
        unknowns: The input's values, and behind a norm σ and μ per live channel.
        locked: Whether γ and β of the norm behind it are private.
    """

    name: str
    equations: int
    unknowns: int
    locked: bool

    @property
    def passable(self) -> bool:
        """Whether the count does not forbid to pass it without a prior. Necessary, not sufficient."""
        return self.equations >= self.unknowns


def passable_layers(
    model: nn.Module,
    *,
    image_shape: tuple[int, int, int],
    observed: Collection[str] | None = None,
    live: float = 1.0,
) -> tuple[Passage, ...]:
    """Counts equations and unknowns of every layer below the head, from above.

    Args:
        model: The network with its norms; a chain as `read_chain` reads it. No value of it is used.
        image_shape: ``(channels, height, width)``.
        observed: Names of the parameters whose gradient is public; all by default.
        live: Fraction of channels with γ > 0 behind every norm; about a half with ReLU locks as published.

    Raises:
        AttackError: The network is not such a chain.

    >>> from torch import nn
    >>> net = nn.Sequential(
    ...     nn.Conv2d(3, 12, 5, stride=2, padding=2), nn.BatchNorm2d(12), nn.Sigmoid(),
    ...     nn.Flatten(), nn.Linear(3072, 10))
    >>> [(p.equations, p.unknowns, p.passable) for p in passable_layers(net, image_shape=(3, 32, 32))]
    [(3972, 3096, True)]
    >>> passable_layers(net, image_shape=(3, 32, 32), live=5 / 12)[0].passable
    False
    """
    chain = read_chain(model, image_shape=image_shape, train_mode=True)
    names = [name for name, _ in model.named_parameters()] if observed is None else observed
    below = [None, *chain.blocks[:-2]]
    pairs = list(zip(below, chain.blocks[:-1], strict=True))
    return tuple(_passage(block, under, live=live, observed=names) for under, block in reversed(pairs))


def counted(block: Block, *, alive: int, varying: int) -> tuple[int, int]:
    """Equations and unknowns of one block, from its output down to its input.

    Args:
        block: The block.
        alive: Output channels that are not constant.
        varying: Input channels that are not constant.
    """
    sources = block.layer.weight.shape[1]
    kernel = block.layer.weight[0, 0].numel()
    places = math.prod(block.output_shape[1:]) if block.layer.is_convolution else 1
    constant = sources - varying
    equations = alive * (places + kernel * varying) + (constant if alive else 0)
    unknowns = varying * math.prod(block.input_shape[1:]) + constant + (2 * alive if block.norm else 0)
    return equations, unknowns


def _passage(block: Block, under: Block | None, *, live: float, observed: Collection[str]) -> Passage:
    channels, sources = block.layer.weight.shape[:2]
    equations, unknowns = counted(
        block,
        alive=round(channels * live) if block.norm else channels,
        varying=round(sources * live) if under is not None and under.norm is not None else sources,
    )
    return Passage(
        name=block.layer.name,
        equations=equations,
        unknowns=unknowns,
        locked=block.norm is not None and bool(block.norm.scale) and block.norm.scale not in observed,
    )
