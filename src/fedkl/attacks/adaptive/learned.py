"""Learned inversion: what clients would send for images of the server's own teaches it to read updates.

The server knows the defense, so it can play any number of clients, with secrets of its own draw, on auxiliary
images: pairs of an update and the images behind it. From these a kernel ridge regression learns to go back.
It needs no gradient of a gradient and no invertible network, takes any batch size and number of local steps,
and one fit serves every update of the same public model.

One image of a batch is told from the others by its class: the row of the head's gradient that belongs to it,
which for a batch of one is the head's input up to its sign and scale, and for more the sum over that class's
images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkl.attacks.adaptive.kernels import Views, best_regression
from fedkl.attacks.base import Attack, Auxiliary, Observation, Reconstruction
from fedkl.attacks.labels import head_names, known_labels
from fedkl.attacks.parallel import Progress
from fedkl.errors import AttackError, ConfigError
from fedkl.types import ImageBatch, Labels, NamedTensors

_HELD_OUT = 0.15
_LEAST = 40  # auxiliary images: fewer hold too few out


@dataclass(frozen=True, kw_only=True)
class LearnedInversion(Attack):
    """Kernel ridge regression from updates to images, fitted on simulated clients.

    Which layers count, the kernel's width and the ridge are chosen on auxiliary images that were held out.
    Images come out with the scale that the auxiliary ones have. `Reconstruction.loss` is the squared error on
    the held-out images, relative to that of their mean: about 1 where updates taught nothing. It is the least
    over the choices made by it, and so a little too good.

    Attributes:
        simulations: Auxiliary images that simulated clients send updates of: at batch size B a B-th as many
            updates. An image may come more than once.
        updates_per_client: Updates simulated before a new client with new secrets is drawn.

    Source:
        The idea: Wu et al. 2022 (arXiv 2210.10880), who train a network on hashed gradients. Deviation:
        kernel ridge regression on the whole gradient, which fits thousands of updates in seconds and needs no
        tuning by hand. Clients with fresh secrets are this package's own.
    """

    type: Literal["learned"] = "learned"
    simulations: int = 2000
    updates_per_client: int = 10

    def __post_init__(self) -> None:
        least = {"simulations": _LEAST, "updates_per_client": 1}
        wrong = [f"{n} ≥ {low}, got {getattr(self, n)}" for n, low in least.items() if getattr(self, n) < low]
        if wrong:
            raise ConfigError(f"LearnedInversion: expected {', '.join(wrong)}.")

    @property
    def divisible(self) -> bool:
        """One fit serves all observations."""
        return False

    def _check(self, observation: Observation) -> None:
        _own(observation)
        if self.simulations * _HELD_OUT < observation.batch_size:
            least = math.ceil(observation.batch_size / _HELD_OUT)
            raise AttackError(
                f"LearnedInversion: {self.simulations} simulations hold out less than one batch of "
                f"{observation.batch_size}. Use --set attack.simulations={least} or more."
            )
        if observation.free:
            raise AttackError(
                "LearnedInversion: it looks for images only; nothing may be free, got "
                f"{', '.join(observation.free)}. Leave out the arms that regress."
            )

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        groups: dict[Auxiliary, list[int]] = {}
        for place, observation in enumerate(observations):
            groups.setdefault(_own(observation), []).append(place)
        results: dict[int, Reconstruction] = {}
        for places in groups.values():
            group = [observations[place] for place in places]
            found = self._learn(group, on_evaluation)
            results |= dict(zip(places, found, strict=True))
        return [results[place] for place in range(len(observations))]

    def _learn(self, group: list[Observation], on_evaluation: Progress) -> list[Reconstruction]:
        first, labels = group[0], known_labels(group)
        generator = torch.Generator().manual_seed(_own(first).seed)
        held = max(first.batch_size, round(_HELD_OUT * self.simulations))
        fitted, checked = _divided(_own(first), generator)
        pairs = [
            self._simulated(first, images, count, generator, on_evaluation)
            for images, count in ((fitted, self.simulations - held), (checked, held))
        ]
        (known, images), (probes, truth) = pairs
        regression = best_regression(known, images.flatten(1), probes, truth.flatten(1))
        seen = {name: torch.stack([o.gradient[name] for o in group]) for name in first.gradient}
        found = regression(known, _views(first, seen, labels))
        return [
            Reconstruction(
                images=own,
                labels=label,
                scaling="clip",
                loss=regression.error,
                evaluations=self.simulations,
                start=0,
            )
            for own, label in zip(
                found.reshape(len(group), first.batch_size, *first.image_shape), labels, strict=True
            )
        ]

    def _simulated(
        self,
        observation: Observation,
        images: Auxiliary,
        count: int,
        generator: torch.Generator,
        on_evaluation: Progress,
    ) -> tuple[Views, ImageBatch]:
        """Updates of simulated clients as views, and the image that each row of them is about."""
        size = observation.batch_size
        batches = _batches(len(images.images), updates=-(-count // size), size=size, generator=generator)
        views = []
        for done, part in enumerate(torch.split(batches, self.updates_per_client), start=1):
            labels = images.labels[part]
            updates = images.simulate(images.images[part], labels)
            if not all(bool(tensor.isfinite().all()) for tensor in updates.values()):
                raise AttackError(
                    "LearnedInversion: a simulated client's update is not finite, so that nothing can be "
                    "learned from it. Check the protocol's local steps and learning rate."
                )
            views.append(_views(observation, updates, list(labels)))
            on_evaluation(done * self.updates_per_client, 1)
        return Views.joined(views), images.images[batches.flatten()]


def _own(observation: Observation) -> Auxiliary:
    """Data to hold a part out of that still makes a batch."""
    least = max(_LEAST, math.ceil((observation.batch_size + 1) / _HELD_OUT))
    return observation.own_data("LearnedInversion", least=least)


def _divided(own: Auxiliary, generator: torch.Generator) -> tuple[Auxiliary, Auxiliary]:
    """Images to fit on, and others to choose by."""
    order = torch.randperm(len(own.images), generator=generator)
    held = round(_HELD_OUT * len(order))
    parts = (order[held:], order[:held])
    fitted, checked = (replace(own, images=own.images[part], labels=own.labels[part]) for part in parts)
    return fitted, checked


def _batches(images: int, *, updates: int, size: int, generator: torch.Generator) -> Tensor:
    """Indexes of shape (updates, size): every image as often as every other, give or take one."""
    rounds = -(-updates * size // images)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(rounds)])
    return order[: updates * size].reshape(updates, size)


def _views(observation: Observation, updates: NamedTensors, labels: list[Labels]) -> Views:
    """Each observed tensor; and per image its class, and that class's row of the head's gradient."""
    classes = torch.stack(labels)
    per_image = {"class": F.one_hot(classes.flatten(), observation.classes).float()}
    head, _ = head_names(observation)
    if head in updates:
        rows = updates[head].gather(1, classes[..., None].expand(-1, -1, updates[head].shape[2]))
        per_image["row of the class"] = rows.flatten(0, 1)
    tensors = {name: tensor.flatten(1) for name, tensor in updates.items()}
    return Views(per_update=tensors, per_image=per_image, batch=observation.batch_size)
