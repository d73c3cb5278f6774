"""The two controls of the key-lock: the same norms with public γ and β, or with private ones and no key."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from fedkl.defenses.base import Defense
from fedkl.defenses.keylock import KeyLock
from fedkl.keys import Key
from fedkl.locking import OwnSplit, Split, withhold, withhold_statistics


@dataclass(frozen=True, kw_only=True)
class PublicNorm(Defense):
    """Norm-matched control: the network of the key-lock, baked, so that γ and β are public parameters.

    What the lock costs or protects is the difference to this, not to a network without norms. Layers that
    the lock keeps private are public here.
    """

    type: Literal["public-norm"] = "public-norm"
    like: KeyLock = field(default_factory=KeyLock)

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """Locks and bakes a copy of the model; norm statistics are private as in `like`."""
        plain = self.like.prepare(model, key=key).bake()
        if not self.like.share_statistics:
            withhold_statistics(plain)
        return Split(plain)

    def for_images(self, shape: tuple[int, int, int]) -> PublicNorm:
        """With the shape of the images, if the lock that it is like needs it."""
        return replace(self, like=self.like.for_images(shape))

    def for_untrained(self) -> PublicNorm:
        """Like a lock that draws γ and β."""
        return replace(self, like=self.like.for_untrained())


@dataclass(frozen=True, kw_only=True)
class PrivateNorm(Defense):
    """Private γ and β as free parameters without any key (FedBN, Li et al. 2021), in the locked layers.

    Shows what the key adds to merely not sharing γ and β. They start at 1 and 0, as in any norm, or at a
    trained model's values where the lock keeps these; the server knows that. Layers that the lock keeps
    private are so here too.
    """

    type: Literal["private-norm"] = "private-norm"
    like: KeyLock = field(default_factory=KeyLock)

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """Gives a copy of the model the norms of the key-lock and withholds their γ and β."""
        locked = self.like.prepare(model, key=key)
        plain = locked.bake()
        for name in locked.layers:
            norm = plain.get_submodule(name)
            if name not in locked.kept:
                norm.reset_parameters()  # type: ignore[operator]
            withhold(norm, tuple(name for name, _ in norm.named_parameters(recurse=False)))
        if not self.like.share_statistics:
            withhold_statistics(plain)
        return OwnSplit(plain, locked.private_layers)

    def for_images(self, shape: tuple[int, int, int]) -> PrivateNorm:
        """With the shape of the images, if the lock that it is like needs it."""
        return replace(self, like=self.like.for_images(shape))

    def for_untrained(self) -> PrivateNorm:
        """Like a lock that draws γ and β."""
        return replace(self, like=self.like.for_untrained())
