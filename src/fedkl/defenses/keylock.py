"""FedKL (arXiv 2305.04095): a private key generates γ and β of norm layers; and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from fedkl.defenses.base import Arm, Defense, NoDefense, register_defense
from fedkl.errors import LockError
from fedkl.keys import Key, KeyDistribution
from fedkl.locking import (
    Activation,
    Granularity,
    Initialization,
    Lock,
    OwnSplit,
    Split,
    Start,
    lock,
    make_public,
    withhold,
    withhold_statistics,
)
from fedkl.protocol import Knowledge


@register_defense
@dataclass(frozen=True, kw_only=True)
class KeyLock(Defense):
    """Options of `fedkl.lock`, plus how new keys are drawn.

    The published setting is ``key_distribution="uniform", activation="relu", initialization="published"``.

    A trained model keeps its function: every client's γ and β start at the model's, also after
    `Lock.redraw`. This needs an activation that can give them, as ``"identity"`` can. ``start="drawn"`` draws
    them in any case.

    Attributes:
        layers: As for `fedkl.lock`, and so the rest.
        input_shape: Of one image, ``(channels, height, width)``, which a lock per element needs. If given,
            the model is run once, and layers are in the order in which it calls them.
    """

    plain: ClassVar[str] = "lock"
    type: Literal["keylock"] = "keylock"
    layers: Literal["first", "all", "classifier"] | tuple[str, ...] = "first"
    granularity: Granularity = "channel"
    activation: Activation = "softplus"
    initialization: Initialization = "unit"
    start: Start = "model"
    chained: bool = True
    share_statistics: bool = False
    private: tuple[str, ...] = ()
    input_shape: tuple[int, int, int] | None = None
    key_length: int = 1024
    key_distribution: KeyDistribution = "normal"

    @property
    def shares_statistics(self) -> bool:
        """Whether it was asked to."""
        return self.share_statistics

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Lock:
        """Locks a copy of the model.

        Raises:
            LockError: The model cannot be locked so; a lock per element lacks the images' shape; the
                activation cannot give a trained model's γ and β.
        """
        if self.granularity == "element" and self.input_shape is None:
            expected = "input_shape=(channels, height, width), the shape of one image"
            raise LockError(f"KeyLock: granularity='element' needs {expected}.")
        return lock(
            model,
            key=key or Key.generate(length=self.key_length, distribution=self.key_distribution),
            layers=self.layers,
            granularity=self.granularity,
            activation=self.activation,
            initialization=self.initialization,
            start=self.start,
            chained=self.chained,
            share_statistics=self.share_statistics,
            private=self.private,
            example_inputs=self._example(model),
        )

    def for_images(self, shape: tuple[int, int, int]) -> KeyLock:
        """With the shape of the images, if it is needed and not given."""
        needed = self.granularity == "element" and self.input_shape is None
        return replace(self, input_shape=shape) if needed else self

    def for_untrained(self) -> KeyLock:
        """With γ and β drawn, whatever values the norms were initialized with."""
        return replace(self, start="drawn")

    def _example(self, model: nn.Module) -> torch.Tensor | None:
        if self.input_shape is None:
            return None
        parameter = next(model.parameters(), torch.empty(0))
        return torch.zeros(1, *self.input_shape, dtype=parameter.dtype, device=parameter.device)

    def control(self) -> Arm:
        """The same client and the same γ and β, which are public: as parameters, and in the update."""
        return Arm(
            name="public-norm",
            description="the locked network, γ and β public",
            defense=self,
            knowledge=Knowledge(affine=True, affine_gradient=True),
            open=True,
        )

    def guesses(self) -> tuple[Arm, ...]:
        """γ and β without a key; then every cell of the paper's threat-model grid, and better guesses.

        The gradient of the lock layers gives the first lock's key away without any attack, as the ratio of
        the gradients of W and b; the arms that see it only match it too, with the key they have.

        Source:
            The grid: arXiv 2305.04095, section 3; its public implementation.
        """
        return (
            *PrivateNorm(like=self).guesses(),
            self._guess("lock", "nothing private known"),
            self._guess("lock-known-key", "key known", key=True),
            self._guess("lock-known-layers", "lock layers known, wrong key", lock_layers=True),
            self._nothing_unknown(),
            *map(_aside, self._better_guesses()),
        )

    def _nothing_unknown(self) -> Arm:
        known = self._guess("lock-known-both", "key and lock layers known", key=True, lock_layers=True)
        return replace(known, open=True)

    def _better_guesses(self) -> tuple[Arm, ...]:
        seen = "gradient of the lock layers matched too"
        shared = replace(self, share_statistics=True)
        return (
            self._guess("lock-seen-gradient", seen, lock_gradient=True),
            self._guess("lock-known-key-seen-gradient", f"key known, {seen}", key=True, lock_gradient=True),
            replace(
                self._guess(
                    "lock-regressed-key",
                    "lock layers known, the key found along with the image",
                    lock_layers=True,
                ),
                regress="key",
            ),
            replace(
                self._guess("lock-regressed-affine", "γ and β found along with the image"), regress="affine"
            ),
            self._guess("lock-known-affine", "γ and β known, not their gradient", affine=True),
            replace(self._guess("lock-neutral", "γ = 1 and β = 0 put in"), filled_in="neutral"),
            replace(
                self._guess("lock-calibrated", "γ and β fitted to auxiliary images"), filled_in="calibrated"
            ),
            shared._guess(
                "lock-shared-statistics",
                "nothing private known but the norms' running statistics, which are sent",
            ),
        )

    def _guess(self, name: str, description: str, **granted: bool) -> Arm:
        return Arm(
            name=name,
            description=f"key-lock, {description}",
            defense=self,
            knowledge=Knowledge(**granted),
            control=self.control().name,
        )

    def baselines(self) -> tuple[tuple[Defense, str], ...]:
        """The same network with public γ and β, then the plain one."""
        return (PublicNorm(like=self), "same norm layers"), (NoDefense(), "plain network")

    def describe(self) -> str:
        """Its layers, key and activation."""
        return f"{self.type} ({self.where()}, {self.key_distribution} key, {self.activation})"

    def where(self) -> str:
        """What is locked, in words."""
        layers = self.layers if isinstance(self.layers, str) else ", ".join(self.layers)
        detail = f"layers {layers}"
        detail += ", per element" if self.granularity == "element" else ""
        return detail + (f", private {', '.join(self.private)}" if self.private else "")


PUBLISHED_LOCK = KeyLock(key_distribution="uniform", activation="relu", initialization="published")
"""The lock of arXiv 2305.04095."""

_DIFFERENT = ("key_distribution", "activation", "initialization")
LOCK_SETTINGS = {
    name: {field: getattr(lock, field) for field in _DIFFERENT}
    for name, lock in (("default", KeyLock()), ("published", PUBLISHED_LOCK))
}
"""Settings of the lock by name: the fields that differ between them."""


def _aside(arm: Arm) -> Arm:
    """One that is run only where it is named."""
    return replace(arm, main=False)


@register_defense
@dataclass(frozen=True, kw_only=True)
class PublicNorm(Defense):
    """Norm-matched control: the network of the key-lock, baked, so that γ and β are public parameters.

    What the lock costs or protects is the difference to this, not to a network without norms. Layers that
    the lock keeps private are public here.
    """

    type: Literal["public-norm"] = "public-norm"
    like: KeyLock = field(default_factory=KeyLock)

    @property
    def shares_statistics(self) -> bool:
        """Whether it was asked to."""
        return self.like.share_statistics

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """Locks and bakes a copy of the model; norm statistics are private as in `like`."""
        plain = self.like.prepare(model, key=key).bake()
        make_public(plain)
        if not self.like.share_statistics:
            withhold_statistics(plain)
        return Split(plain)

    def for_images(self, shape: tuple[int, int, int]) -> PublicNorm:
        """With the shape of the images, if the lock that it is like needs it."""
        return replace(self, like=self.like.for_images(shape))

    def for_untrained(self) -> PublicNorm:
        """Like a lock that draws γ and β."""
        return replace(self, like=self.like.for_untrained())

    def control(self) -> Arm:
        """What it is itself: the lock's network with nothing hidden."""
        return self.like.control()

    def guesses(self) -> tuple[Arm, ...]:
        """None: it is a control, and hides nothing but norm statistics."""
        return ()

    def describe(self) -> str:
        """Which lock it is like."""
        return f"{self.type} ({self.like.where()})"


@register_defense
@dataclass(frozen=True, kw_only=True)
class PrivateNorm(Defense):
    """Private γ and β as free parameters without any key (FedBN, Li et al. 2021), in the locked layers.

    Shows what the key adds to merely not sharing γ and β. They start at 1 and 0, as in any norm, or at a
    trained model's values where the lock keeps these; the server knows that. Layers that the lock keeps
    private are so here too.
    """

    type: Literal["private-norm"] = "private-norm"
    like: KeyLock = field(default_factory=KeyLock)

    @property
    def shares_statistics(self) -> bool:
        """Whether it was asked to."""
        return self.like.share_statistics

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

    def control(self) -> Arm:
        """The control of the lock that it is like."""
        return self.like.control()

    def guesses(self) -> tuple[Arm, ...]:
        """γ = 1 and β = 0, where every client's start."""
        return (
            Arm(
                name="private-norm",
                description="γ and β private, no key (FedBN)",
                defense=self,
                control=self.control().name,
            ),
        )

    def describe(self) -> str:
        """Which lock it is like."""
        return f"{self.type} ({self.like.where()})"
