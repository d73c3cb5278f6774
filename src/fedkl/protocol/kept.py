"""Of updates of which a part was sent: what both a client's defense and an attacker's own change become."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def only_kept(change: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `Transform` of a client that sends some entries exactly as they are, and 0 for all others.

    What was not kept says nothing, and is not compared. Attacks that read single entries know by this very
    function that those which are not 0 are exact; a defense that changes them too has one of its own.
    """
    return {name: tensor * (observed[name] != 0) for name, tensor in change.items()}
