"""What a client has at hand when it sends: for defenses that look at more than the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Sending:
    """What a client has at hand when it sends.

    Attributes:
        received: The public tensors as they came from the server, by name: what an update is a change of.
        network: The client's network. Its public tensors may have been trained since: `received` has them as
            they came. None where it is not at hand, as in a Flower mod.
        sample: Gives so many of the images that it trained on, or all of them, and their labels, as the
            network is called with them. None where they are not at hand.
        frozen: All names of public parameters that training leaves alone. A defense sends them as they came.
        tied: Further names of public tensors that have several, and the first name of each. A defense changes
            such a tensor once: of noise that is drawn for each name, a server would take the mean.
    """

    received: Mapping[str, Tensor] = field(repr=False)
    network: nn.Module | None = field(default=None, repr=False)
    sample: Callable[[int], tuple[Tensor, Tensor]] | None = field(default=None, repr=False)
    frozen: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        received: Mapping[str, Tensor],
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        frozen: frozenset[str] = frozenset(),
        tied: Mapping[str, str] | None = None,
    ) -> Sending:
        """Of a client with these images."""
        return cls(
            received=received,
            network=network,
            sample=lambda count: (images[:count], labels[:count]),
            frozen=frozen,
            tied=tied or {},
        )
