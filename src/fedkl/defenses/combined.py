"""Several defenses in a row, such as a key-lock and noise, or pruning and noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from fedkl.defenses.base import (
    DEFENSES,
    AnyProcedure,
    Arm,
    Defense,
    NoDefense,
    register_defense,
)
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.pruning import Pruning
from fedkl.defenses.server_view import Known, ServerView
from fedkl.errors import ConfigError
from fedkl.keys import Key
from fedkl.locking import Split
from fedkl.privacy import GaussianCost
from fedkl.protocol import Knowledge, Procedure, Sending, Transform, in_turn
from fedkl.update import PublicSchema, PublicUpdate


@register_defense
@dataclass(frozen=True, kw_only=True)
class Combined(Defense):
    """Several defenses in a stated order: each changes what the one before it would have sent.

    A server that knows them does to its own change what a server does that knows each, in the same order. It
    sees what the last one sends: which entries were pruned shows where pruning comes after noise, and not the
    other way around. There it prunes its own change as the client does its own.

    Its differential privacy is that of the last part which has any, if no part that acts after that one looks
    at images; training comes before all that is done to updates.

    Attributes:
        parts: The defenses, the first first. At most one may keep tensors or change the network. A
            combination among them stands for its parts.
    """

    type: Literal["combined"] = "combined"
    parts: tuple[Annotated[Defense, DEFENSES], ...] = (Pruning(), GaussianNoise())

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(_flat(self.parts)))
        preparing = [part.type for part in self.parts if _prepares(part)]
        if not self.parts or len(preparing) > 1:
            got = f"{', '.join(preparing)} that all do" if preparing else "none"
            raise ConfigError(
                "Combined: parts: expected at least one defense, at most one that keeps tensors or changes "
                f"the network, got {got}."
            )

    @property
    def _preparing(self) -> Defense:
        """The part that keeps tensors or changes the network."""
        return next((part for part in self.parts if _prepares(part)), NoDefense())

    @property
    def keeps_tensors(self) -> bool:
        """Whether a part does."""
        return self._preparing.keeps_tensors

    @property
    def changes_network(self) -> bool:
        """Whether a part does."""
        return self._preparing.changes_network

    @property
    def shares_statistics(self) -> bool:
        """Whether a part does."""
        return any(part.shares_statistics for part in self.parts)

    @property
    def looks_at_images(self) -> bool:
        """Whether a part does."""
        return any(part.looks_at_images for part in self.parts)

    @property
    def changes_updates(self) -> bool:
        """Whether a part does."""
        return any(part.changes_updates for part in self.parts)

    @property
    def changes_procedure(self) -> bool:
        """Whether a part does."""
        return any(part.changes_procedure for part in self.parts)

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """As the part that keeps tensors or changes the network."""
        return self._preparing.prepare(model, key=key)

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

    def check_sent(self, schema: PublicSchema) -> None:
        """Refuses where a part does."""
        for part in self.parts:
            part.check_sent(schema)

    def transform(self, update: PublicUpdate, *, client: Sending) -> PublicUpdate:
        """Every part in turn."""
        return reduce(
            lambda found, part: part.transform(found, client=_seen_by(part, client)), self.parts, update
        )

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
        noisy = any(part.noise_deviation for part in changing[:-1])
        return in_turn(transforms, after_noise=noisy) if transforms else None

    def imitate_transform(
        self, changes: Mapping[str, Tensor], *, clients: Sequence[Sending], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Every part in turn."""
        for part in self.parts:
            seen = [_seen_by(part, client) for client in clients]
            changes = part.imitate_transform(changes, clients=seen, generator=generator)
        return changes

    def privacy(self, procedure: Procedure, *, samples: int) -> GaussianCost | None:
        """That of one part, which nothing after it may spoil; see the class.

        Args:
            procedure: How the client trains, with what all parts make of that.
            samples: How many images it has.
        """
        for place, part in reversed(list(enumerate(self.parts))):
            cost = part.privacy(procedure, samples=samples)
            if cost is None or part.procedure(procedure) != procedure:  # a later part trains otherwise
                continue
            others = (*self.parts[:place], *self.parts[place + 1 :])
            after = others if part.changes_procedure else self.parts[place + 1 :]
            return None if any(other.looks_at_images for other in after) else cost
        return None

    def server_view(
        self,
        victim: Split,
        model: nn.Module,
        *,
        granted: Knowledge,
        generator: torch.Generator | None = None,
    ) -> ServerView:
        """That of the part that keeps tensors or changes the network."""
        return self._preparing.server_view(victim, model, granted=granted, generator=generator)

    def informed(self, model: nn.Module, seen: Mapping[str, Tensor]) -> nn.Module:
        """As of the same part, as far as the others leave of the update."""
        return self._preparing.informed(model, seen)

    def known(self, victim: Split, *, granted: Knowledge) -> Known:
        """As of the same part."""
        return self._preparing.known(victim, granted=granted)

    def imitated(self, model: nn.Module, *, known: Known, generator: torch.Generator | None = None) -> Split:
        """As of the same part."""
        return self._preparing.imitated(model, known=known, generator=generator)

    def control(self) -> Arm:
        """That of the part that keeps tensors or changes the network: the same, with nothing hidden."""
        return self._preparing.control()

    def guesses(self) -> tuple[Arm, ...]:
        """What a server would try against the part that keeps tensors or changes the network."""
        preparing = self._preparing
        arms = [arm for arm in preparing.guesses() if arm.defense == preparing]
        if not arms:
            return super().guesses()
        others = ", ".join(part.describe() for part in self.parts if part != preparing)
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
        """Those of the part that keeps tensors or changes the network."""
        return self._preparing.baselines() or super().baselines()

    @classmethod
    def variants(cls) -> tuple[Defense, ...]:
        """None: which parts are usual, nobody can say."""
        return ()

    def describe(self) -> str:
        """Its parts, in order."""
        return f"{self.type} ({', then '.join(part.describe() for part in self.parts)})"


def _flat(parts: Sequence[Defense]) -> Iterator[Defense]:
    for part in parts:
        yield from part.parts if isinstance(part, Combined) else (part,)


def _prepares(part: Defense) -> bool:
    return part.keeps_tensors or part.changes_network


def _seen_by(part: Defense, client: Sending) -> Sending:
    """What a part has at hand: no more than it says that it looks at."""
    return client if part.looks_at_images else replace(client, network=None, sample=None)
