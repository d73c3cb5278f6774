"""The floor of the ladder: what the server guesses from data of its own and the label, without the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fedkl.attacks.base import Attack, Needs, Reconstruction, register_attack
from fedkl.attacks.labels import known_labels
from fedkl.attacks.parallel import Progress
from fedkl.protocol import Observation
from fedkl.types import ImageBatch, Labels

Guess = Literal["class-mean", "mean", "class-image"]


@register_attack
@dataclass(frozen=True, kw_only=True)
class PriorOnly(Attack):
    """Looks at nothing but the label: an attack that does no better has read nothing out of the update.

    Attributes:
        guess: ``"class-mean"``: the mean of the auxiliary images of the label; ``"mean"``: of all;
            ``"class-image"``: one of the label's at random. A class without auxiliary images has all of them.

    Source:
        Rung 0 of this package's ladder.
    """

    title: ClassVar[str] = "the guess from the label alone"
    type: Literal["prior-only"] = "prior-only"
    guess: Guess = "class-mean"

    @property
    def needs(self) -> Needs:
        """It looks at no update at all."""
        return Needs(sums=True, own_images=1)

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        labels = known_labels(observations)
        return [
            Reconstruction(
                images=self._guessed(observation, own, generator),
                labels=own,
                scaling="clip",
                loss=1.0,
                evaluations=0,
                start=0,
            )
            for observation, own, generator in zip(observations, labels, generators, strict=True)
        ]

    def _guessed(self, observation: Observation, labels: Labels, generator: torch.Generator) -> ImageBatch:
        own = observation.own_data("PriorOnly", least=1)
        if self.guess == "class-mean":
            return class_means(labels, images=own.images, labels=own.labels)
        if self.guess == "mean":
            return own.images.mean(0).expand(len(labels), *own.images.shape[1:]).clone()
        among = [_of_class(label, own.images, own.labels) for label in labels.tolist()]
        return torch.stack([each[int(torch.randint(len(each), (), generator=generator))] for each in among])


def class_means(
    wanted: Labels,
    *,
    images: Float[Tensor, "own channels height width"],
    labels: Int64[Tensor, " own"],
) -> ImageBatch:
    """The mean image of each wanted label, in their order: a guess that looks at no update.

    Args:
        wanted: Labels to guess from.
        images: The server's own; of a label without any, all of them are taken.
        labels: Theirs.
    """
    means = {label: _of_class(label, images, labels).mean(0) for label in set(wanted.tolist())}
    return torch.stack([means[label] for label in wanted.tolist()])


def _of_class(label: int, images: Tensor, labels: Tensor) -> Tensor:
    of_class = images[labels == label]
    return of_class if len(of_class) else images
