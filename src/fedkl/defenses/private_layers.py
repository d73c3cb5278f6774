"""Whole layers that stay with the client: a private classifier, or a private first layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedkl.defenses.base import Arm, Defense, register_defense
from fedkl.errors import LockError, gathered
from fedkl.keys import Key
from fedkl.locking import OwnLayers, OwnSplit, Split, copied, find_layers, warn_about_frozen


@register_defense
@dataclass(frozen=True, kw_only=True)
class PrivateLayers(Defense):
    """Clients keep whole layers to themselves, each with a start of its own; there is no lock.

    The server averages the rest. It cannot evaluate its model, nor read labels off a gradient without a head.

    Attributes:
        layers: ``"head"``: the last linear layer; ``"stem"``: the first layer (a convolution, linear layer,
            embedding, attention or recurrent layer), in the order of `model.named_modules()`; or names of
            modules. A module that is called head or stem is meant before these. Frozen parameters stay as
            the model has them, with a warning.

    Source:
        A private head: Arivazhagan et al. 2019 (FedPer); a private stem: Liang et al. 2020 (LG-FedAvg). Both
        start from the server's weights, which it knows; here every client draws its own.
    """

    type: Literal["private-layers"] = "private-layers"
    layers: Literal["head", "stem"] | tuple[str, ...] = "head"

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """Withholds the layers of a copy of the model.

        Raises:
            LockError: A layer is unknown or has no parameters, none is left to send, or the model cannot be
                copied.
        """
        names = (self.layers,) if isinstance(self.layers, str) else self.layers
        chosen, problems = find_layers(model, names)
        if problems or not chosen:
            problems = problems or ["layers is empty"]
            remedy = 'Choose "head", "stem" or names from model.named_modules().'
            raise LockError(gathered("PrivateLayers: these layers cannot be private.", problems, remedy))
        warn_about_frozen(model, chosen)
        own = copied(model, subject="PrivateLayers")
        split = OwnSplit(own, OwnLayers(own, chosen))
        split.redraw()
        return split

    def guesses(self) -> tuple[Arm, ...]:
        """Layers of the server's own draw."""
        what = {"head": "the classifier", "stem": "the first layer"}
        layers = self.layers if isinstance(self.layers, str) else ", ".join(self.layers)
        known = isinstance(self.layers, str) and self.layers in what
        return (
            Arm(
                name=f"private-{layers}" if known else self.type,
                description=f"no lock, {what.get(layers, layers)} stays private",
                defense=self,
                control=self.control().name,
            ),
        )

    @classmethod
    def variants(cls) -> tuple[Defense, ...]:
        """A private classifier, and a private first layer."""
        return (cls(layers="head"), cls(layers="stem"))

    def describe(self) -> str:
        """Which layers."""
        layers = self.layers if isinstance(self.layers, str) else ", ".join(self.layers)
        return f"{self.type} (layers {layers})"
