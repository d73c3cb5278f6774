"""The clients that are attacked, and what the server has of its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from fedkl import rng
from fedkl.attacking.simulating import SimulatedClients
from fedkl.data import Dataset
from fedkl.defenses import Arm, Defense
from fedkl.errors import DataError
from fedkl.locking import Split
from fedkl.protocol import Auxiliary, Procedure


def own_order(dataset: Dataset, *, seed: int) -> Int64[Tensor, " images"]:
    """The training images, in the order in which a server gets them as its own."""
    return torch.randperm(len(dataset.train_images), generator=rng.generator(seed, "auxiliary"))


class Victims:
    """The clients that are attacked, by their defense: one of each network where γ and β are public."""

    def __init__(self) -> None:
        # The networks are kept too: the id of one that is gone may become another's.
        self._firsts: dict[int, tuple[nn.Module, int]] = {}
        self._drawn: dict[tuple[Defense, int], list[Split]] = {}

    def begin(self, models: Mapping[int, nn.Module]) -> None:
        """A lot of trials, by their numbers; what is of no network of it is forgotten."""
        here = {id(model) for model in models.values()}
        self._firsts = {name: first for name, first in self._firsts.items() if name in here}
        kept = {number for _, number in self._firsts.values()}
        self._drawn = {place: drawn for place, drawn in self._drawn.items() if place[1] in kept}
        for number, model in models.items():
            self._firsts.setdefault(id(model), (model, number))

    def of(self, defense: Defense, model: nn.Module, *, client: int | None, cohort: int) -> list[Split]:
        """A client with the rest of its cohort; None: the one whose γ and β are the network's."""
        number = self._firsts[id(model)][1] if client is None else client
        members = self._drawn.setdefault((defense, number), [])
        # Where γ and β are public, the first may have been drawn already.
        while len(members) < (1 if client is None else cohort):
            members.append(defense.prepare(model))
        return members[:1] if client is None else members


class OwnData:
    """The server's own data, and clients to learn from: one `Auxiliary` for all that it holds for."""

    def __init__(
        self, dataset: Dataset, *, seed: int, train_mode: bool, local: Procedure, cohort: int
    ) -> None:
        self._dataset = dataset
        self._order, self._seed = own_order(dataset, seed=seed), seed
        self._simulated = partial(SimulatedClients.of, train_mode=train_mode, local=local, cohort=cohort)
        self._made: dict[Hashable, Auxiliary] = {}

    def of(self, arm: Arm, victim: Split, model: nn.Module) -> Auxiliary | None:
        """What an arm grants; None where that is nothing.

        Raises:
            DataError: The dataset has fewer training images.
        """
        granted = arm.knowledge
        if not granted.auxiliary:
            return None
        if granted.auxiliary > len(self._order):
            raise DataError(
                f"auxiliary: expected at most {len(self._order)}, the training images of "
                f"{self._dataset.spec.name}, got {granted.auxiliary}."
            )
        secret = granted.key or granted.lock_layers or granted.affine
        place = (arm.defense, granted, id(model), id(victim) if secret else None)
        if place not in self._made:
            self._made[place] = self._auxiliary(arm, victim, model)
        return self._made[place]

    def _auxiliary(self, arm: Arm, victim: Split, model: nn.Module) -> Auxiliary:
        index = self._order[: arm.knowledge.auxiliary]
        device = next(model.parameters()).device
        clients = self._simulated(
            arm, victim, model, generator=rng.generator(self._seed, "imitated", arm.name)
        )
        return Auxiliary(
            images=self._dataset.train_images[index].to(device),
            labels=self._dataset.train_labels[index].to(device),
            simulate=clients,
            seed=rng.generator(self._seed, "learned").initial_seed(),
            draw=clients.draw,
        )
