"""Several defenses in a row, such as a key-lock and noise, or pruning and noise."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from fedkl.defenses.base import DEFENSES, AnyProcedure, Arm, Defense, NoDefense, register_defense
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.pruning import Pruning
from fedkl.errors import ConfigError
from fedkl.keys import Key
from fedkl.locking import Split
from fedkl.protocol import Rescaling, Sending, Transform
from fedkl.update import PublicUpdate


@dataclass(frozen=True)
class InTurn:
    """A `Transform` that does several, each with the change that was observed in the end.

    Attributes:
        transforms: The first first.
    """

    transforms: tuple[Transform, ...]

    def __call__(self, change: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The change, after all of them."""
        return reduce(lambda found, transform: transform(found, observed), self.transforms, change)


class Rescalings(InTurn, Rescaling):
    """The same of such as multiply by a factor: together they do, too."""

    def altered(self, model: nn.Module) -> Collection[str]:
        """What any of them alters."""
        of = [transform.altered(model) for transform in self.transforms if isinstance(transform, Rescaling)]
        return frozenset().union(*of)


@register_defense
@dataclass(frozen=True, kw_only=True)
class Combined(Defense):
    """Several defenses in a stated order: each changes what the one before it would have sent.

    A server that knows them does to its own change what a server does that knows each, in the same order. It
    sees what the last one sends: which entries were pruned shows where pruning comes after noise, and not the
    other way around. There it prunes its own change as the client does its own.

    Attributes:
        parts: The defenses, the first first. At most one may keep tensors.
    """

    type: Literal["combined"] = "combined"
    parts: tuple[Annotated[Defense, DEFENSES], ...] = (Pruning(), GaussianNoise())

    def __post_init__(self) -> None:
        keeping = [part.type for part in self.parts if part.keeps_tensors]
        if not self.parts or len(keeping) > 1:
            got = f"{', '.join(keeping)} that all keep some" if keeping else "none"
            raise ConfigError(
                f"Combined: parts: expected at least one defense, at most one that keeps tensors, got {got}."
            )

    @property
    def _keeper(self) -> Defense:
        """The part that keeps tensors."""
        return next((part for part in self.parts if part.keeps_tensors), NoDefense())

    @property
    def keeps_tensors(self) -> bool:
        """Whether a part does."""
        return self._keeper.keeps_tensors

    @property
    def changes_updates(self) -> bool:
        """Whether a part does."""
        return any(part.changes_updates for part in self.parts)

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """As the part that keeps tensors."""
        return self._keeper.prepare(model, key=key)

    def for_images(self, shape: tuple[int, int, int]) -> Combined:
        """Every part for such images."""
        return replace(self, parts=tuple(part.for_images(shape) for part in self.parts))

    def for_untrained(self) -> Combined:
        """Every part for an untrained model."""
        return replace(self, parts=tuple(part.for_untrained() for part in self.parts))

    def check_training(self) -> None:
        """Refuses where a part does.

        Raises:
            ConfigError: A part is for attacks only.
        """
        for part in self.parts:
            part.check_training()

    def procedure(self, procedure: AnyProcedure) -> AnyProcedure:
        """How a client trains with all parts."""
        return reduce(lambda found, part: part.procedure(found), self.parts, procedure)

    def transform(self, update: PublicUpdate, *, client: Sending) -> PublicUpdate:
        """Every part in turn."""
        return reduce(lambda found, part: part.transform(found, client=client), self.parts, update)

    @property
    def noise_deviation(self) -> float:
        """Of all parts, where none takes any of it away again."""
        return math.hypot(*(part.noise_deviation for part in self.parts))

    @property
    def public_transform(self) -> Transform | None:
        """Those of the parts in turn, each with the change that was observed in the end."""
        changing = [part for part in self.parts if part.changes_updates]
        if len(changing) == 1:
            return changing[0].public_transform
        known = []
        for place, part in enumerate(changing):
            noise = math.hypot(*(later.noise_deviation for later in changing[place + 1 :]))
            known.append(part.transform_under_noise(noise) if noise else part.public_transform)
        transforms = tuple(transform for transform in known if transform is not None)
        if all(isinstance(transform, Rescaling) for transform in transforms):
            return Rescalings(transforms) if transforms else None
        return InTurn(transforms)

    def imitate_transform(
        self, changes: Mapping[str, Tensor], *, clients: Sequence[Sending], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Every part in turn."""
        for part in self.parts:
            changes = part.imitate_transform(changes, clients=clients, generator=generator)
        return changes

    def control(self) -> Arm:
        """That of the part that keeps tensors: the same network, with nothing hidden."""
        return self._keeper.control()

    def guesses(self) -> tuple[Arm, ...]:
        """What a server would try against the part that keeps tensors, of which it knows all others."""
        keeper = self._keeper
        arms = [arm for arm in keeper.guesses() if arm.defense == keeper]
        if not arms:
            return super().guesses()
        others = ", ".join(part.describe() for part in self.parts if part != keeper)
        return tuple(
            replace(
                arm,
                name=f"{self.type}-{arm.name}",
                description=f"{arm.description}; with {others}" if others else arm.description,
                defense=self,
                open=arm.open and not self.changes_updates,
            )
            for arm in arms
        )

    def baselines(self) -> tuple[tuple[Defense, str], ...]:
        """Those of the part that keeps tensors."""
        return self._keeper.baselines() or super().baselines()

    @classmethod
    def variants(cls) -> tuple[Defense, ...]:
        """None: which parts are usual, nobody can say."""
        return ()

    def describe(self) -> str:
        """Its parts, in order."""
        return f"{self.type} ({', then '.join(part.describe() for part in self.parts)})"
