"""What a defense does to a change, as far as everybody knows: the attacker does the same to its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping

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
