"""Of updates of which a part was sent: what both a client's defense and an attacker's own change become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """The `Transform` of a client that sends some entries exactly as they are, and 0 for all others.

    What was not kept says nothing, and is not compared. Attacks that read single entries ask which of those
    that were sent are `exact`; a defense that changes all of them has a transform of its own.
    """

    def __call__(self, change: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The change, with what was not kept at 0."""
        return {name: tensor * (observed[name] != 0) for name, tensor in change.items()}

    def exact(self, observed: Tensor) -> Tensor:
        """Which entries of a tensor of the observed change are as the client computed them: booleans."""
        return observed != 0


only_kept = Kept()
