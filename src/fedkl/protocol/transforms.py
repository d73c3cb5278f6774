"""What a defense does to a change, as far as everybody knows: the attacker does the same to its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import reduce

from torch import Tensor, nn

Transform = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]
"""What a defense does to a change (see `fedkl.defenses.Defense.public_transform`), given the one observed."""


class Rescaling(ABC):
    """A `Transform` that multiplies all of a change by one positive factor, but for tensors that it names.

    The others are sent up to that factor, so that attacks can read them as they are.
    """

    @abstractmethod
    def __call__(self, change: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The change, scaled."""

    def altered(self, model: nn.Module) -> Collection[str]:
        """Names of the parameters whose tensors are sent otherwise than up to the factor; by default none.

        Args:
            model: The network that the server sees.
        """
        return ()


@dataclass(frozen=True)
class InTurn:
    """A `Transform` that does several, each with the change that was observed in the end.

    Attributes:
        transforms: The first first.
        after_noise: Whether one of them comes after noise: what it makes of the change without the noise is
            then not what was sent.
    """

    transforms: tuple[Transform, ...]
    after_noise: bool = False

    def __call__(self, change: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The change, after all of them."""
        return reduce(lambda found, transform: transform(found, observed), self.transforms, change)


class Rescalings(InTurn, Rescaling):
    """The same of such as multiply by a factor: together they do, too."""

    def altered(self, model: nn.Module) -> Collection[str]:
        """What any of them alters."""
        of = [transform.altered(model) for transform in self.transforms if isinstance(transform, Rescaling)]
        return frozenset().union(*of)


def in_turn(transforms: tuple[Transform, ...], *, after_noise: bool = False) -> Transform:
    """Several as one; a `Rescaling`, where each of them is."""
    kind = Rescalings if all(isinstance(each, Rescaling) for each in transforms) else InTurn
    return kind(transforms, after_noise)


def rescales(transform: Transform | None) -> bool:
    """Whether it multiplies by a factor that depends on the change, before or after whatever else it does."""
    if isinstance(transform, InTurn):
        return any(rescales(each) for each in transform.transforms)
    return isinstance(transform, Rescaling)
