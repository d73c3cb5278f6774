"""Learned inversion: what clients would send for images of the server's own teaches it to read updates.

The server knows the defense, so it can play any number of clients, with secrets of its own draw, on auxiliary
images: pairs of an update and the images behind it. From these a kernel ridge regression learns to go back.
It needs no gradient of a gradient and no invertible network, takes any batch size and number of local steps,
and one fit serves every update of the same public model.

One image of a batch is told from the others by its class: the row of the head's gradient that belongs to it,
which for a batch of one is the head's input up to its sign and scale, and for more the sum over that class's
images. Less the mean of the rows of classes that are not in the batch, little but that sum is left; and less
the direction that most of the head's gradient has in common, the mean of the head's input is gone, which
would drown what tells images apart.

A gradient depends on its image's label as much as on the image. Where an update is of one image, `per_label`
lets simulated clients have that label for whatever image: then all of them teach about the update, and not
a tenth of them.

Several updates of one client share its secrets. Across them every entry of an update is standardized: what
γ and β do to it as factor and offset is gone then, without ever being known, and what is left is compared
with updates that simulated clients sent as often, standardized likewise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkl.attacks.base import Attack, Needs, Reconstruction, register_attack
from fedkl.attacks.labels import head_names, known_labels
from fedkl.attacks.learned.kernels import Regression, Views, best_regression
from fedkl.attacks.parallel import Progress
from fedkl.errors import AttackError
from fedkl.protocol import Auxiliary, Observation
from fedkl.types import ImageBatch, Labels, NamedTensors

_HELD_OUT = 0.15
_SIMULATIONS = 2000  # by default, where there are fewer images
_LEAST = 40  # auxiliary images: fewer hold too few out
_TAUGHT = 0  # the image of a simulated batch that is learned from
_FLOOR = 0.1  # of the deviations within a client, relative to a typical one


@register_attack
@dataclass(frozen=True, kw_only=True)
class LearnedInversion(Attack):
    """Kernel ridge regression from updates to images, fitted on simulated clients.

    Which layers count, the kernel's width and the ridge are chosen on auxiliary images that were held out.
    Images come out with the scale that the auxiliary ones have. `Reconstruction.loss` is the squared error on
    the held-out images, relative to that of their mean: about 1 where updates taught nothing. It is the least
    over the choices made by it, and so a little too good.

    Attributes:
        simulations: Updates that simulated clients send; None: 2,000, or one for each auxiliary image if the
            server has more. Each teaches one of its images, so that a large batch is learned from as many
            companies as a small one. Memory: 32 kB for each and each tensor of an update, and the square.
        updates_per_client: Updates simulated before a new client with new secrets is drawn; as many as each
            client sent, where several observations are known to be of one client.
        per_label: Simulate clients for each label that is asked about, all of whose images have it: stronger,
            for that many times the simulations. For batches of one, of clients with one update.

    Source:
        The idea: Wu et al. 2022 (arXiv 2210.10880), who train a network on hashed gradients. Deviation:
        kernel ridge regression on the whole gradient, which fits thousands of updates in seconds and needs no
        tuning by hand. Clients with fresh secrets are this package's own.
    """

    title: ClassVar[str] = "learned inversion"
    knows_locks: ClassVar[bool] = True
    type: Literal["learned"] = "learned"
    simulations: int | None = None
    updates_per_client: int = 10
    per_label: bool = False

    def __post_init__(self) -> None:
        self._require(simulations=_LEAST, updates_per_client=1)

    @property
    def divisible(self) -> bool:
        """One fit serves all observations."""
        return False

    @property
    def needs(self) -> Needs:
        """What is simulated can be a cohort as well."""
        return Needs(sums=True)

    def _check(self, observation: Observation) -> None:
        _own(observation)
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
        single = observations[0].batch_size == 1 and all(o.client is None for o in observations)
        if self.per_label and not single:
            raise AttackError(
                "LearnedInversion: per_label expects updates of one image, each of another client. Leave it "
                "out for batches, and for several updates of a client."
            )
        labels = known_labels(observations)
        lots: dict[tuple[Auxiliary, int | None], list[int]] = {}
        for place, observation in enumerate(observations):
            label = int(labels[place]) if self.per_label else None
            lots.setdefault((_own(observation), label), []).append(place)
        found: dict[int, Reconstruction] = {}
        like: dict[Auxiliary, Regression] = {}  # what was chosen for one label serves the others
        for (own, label), places in lots.items():
            data = own if label is None else _relabeled(own, label)
            group = [observations[place] for place in places], [labels[place] for place in places]
            results, like[own] = self._learn(data, *group, on_evaluation, like=like.get(own))
            found |= dict(zip(places, results, strict=True))
        return [found[place] for place in range(len(observations))]

    def _learn(
        self,
        own: Auxiliary,
        group: list[Observation],
        labels: list[Labels],
        on_evaluation: Progress,
        *,
        like: Regression | None,
    ) -> tuple[list[Reconstruction], Regression]:
        first = group[0]
        generator = torch.Generator().manual_seed(own.seed)
        clients = _clients(group)
        together = len(clients[0]) > 1
        each = len(clients[0]) if together else self.updates_per_client
        simulations = self.simulations or max(_SIMULATIONS, len(own.images))
        held = round(_HELD_OUT * simulations)
        pairs = [
            self._simulated(first, images, count, generator, on_evaluation, each=each, together=together)
            for images, count in zip(_divided(own, generator), (simulations - held, held), strict=True)
        ]
        (known, images), (probes, truth) = pairs
        regression = best_regression(known, images.flatten(1), probes, truth.flatten(1), like=like)
        found: dict[int, Tensor] = {}
        for places in clients:
            sent = {name: torch.stack([group[p].gradient[name] for p in places]) for name in first.gradient}
            asked = _views(first, sent, [labels[p] for p in places], together=together)
            images = regression(known, asked).reshape(len(places), first.batch_size, *first.image_shape)
            found |= dict(zip(places, images, strict=True))
        results = [
            Reconstruction(
                images=found[place],
                labels=label,
                scaling="clip",
                loss=regression.error,
                evaluations=simulations,
                start=0,
            )
            for place, label in enumerate(labels)
        ]
        return results, regression

    def _simulated(
        self,
        observation: Observation,
        images: Auxiliary,
        count: int,
        generator: torch.Generator,
        on_evaluation: Progress,
        *,
        each: int,
        together: bool,
    ) -> tuple[Views, ImageBatch]:
        """Updates of simulated clients as views, and the image that each of them teaches."""
        clients = -(-count // each)
        batches = _batches(
            len(images.images), updates=clients * each, size=observation.batch_size, generator=generator
        )
        views = []
        for done, part in enumerate(torch.split(batches, each), start=1):
            labels = images.labels[part]
            updates = images.simulate(images.images[part], labels)
            if not all(bool(tensor.isfinite().all()) for tensor in updates.values()):
                raise AttackError(
                    "LearnedInversion: a simulated client's update is not finite, so that nothing can be "
                    "learned from it. Check the protocol's local steps and learning rate."
                )
            views.append(_views(observation, updates, list(labels), together=together, only=_TAUGHT))
            on_evaluation(done * each, 1)
        return Views.joined(views), images.images[batches[:, _TAUGHT]]


def _clients(group: list[Observation]) -> list[list[int]]:
    """Places of the observations of each client; every one a client of its own, unless all are known.

    Raises:
        AttackError: Some clients sent more updates than others.
    """
    places: dict[int, list[int]] = {}
    for place, observation in enumerate(group):
        if observation.client is not None:
            places.setdefault(observation.client, []).append(place)
    if sum(map(len, places.values())) < len(group):
        return [[place] for place in range(len(group))]
    sizes = sorted({len(each) for each in places.values()})
    if len(sizes) > 1:
        raise AttackError(
            f"LearnedInversion: expected as many updates of every client, got {sizes[0]} to {sizes[-1]}. Let "
            "the number of trials be a multiple of the updates of one client."
        )
    return list(places.values())


def _relabeled(own: Auxiliary, label: int) -> Auxiliary:
    """The same images, all with one label."""
    return replace(own, labels=torch.full_like(own.labels, label))


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
    """Indexes of shape (updates, size): at each place every image comes equally often, give or take one."""
    rounds = -(-updates // images)
    places = [
        torch.cat([torch.randperm(images, generator=generator) for _ in range(rounds)])[:updates]
        for _ in range(size)
    ]
    return torch.stack(places, 1)


def _views(
    observation: Observation,
    updates: NamedTensors,
    labels: list[Labels],
    *,
    together: bool,
    only: int | None = None,
) -> Views:
    """Each observed tensor; and per image its class, and what the head's gradient has on that class.

    Args:
        observation: One of the kind.
        updates: By tensor, stacked.
        labels: Of each update.
        together: Whether all are of one client, to be compared across its updates too.
        only: The image of each update that is asked about; None: all of them.
    """
    classes = torch.stack(labels)
    per_image = {"class": F.one_hot(classes, observation.classes).float()}
    head, _ = head_names(observation)
    if head in updates:
        rows = updates[head].gather(1, classes[..., None].expand(-1, -1, updates[head].shape[2]))
        per_image["row of the class"] = rows
        per_image["row less those of no image"] = rows - _absent(updates[head], classes).unsqueeze(1)
        if observation.batch_size > 1:  # of one image all rows have one direction
            per_image["row beside the common direction"] = _beside(rows, _common(updates[head]))
    tensors = {name: tensor.flatten(1) for name, tensor in updates.items()}
    if together:
        tensors |= {f"{name} within the client": _standardized(tensor) for name, tensor in tensors.items()}
        per_image |= {
            f"{name} within the client": _standardized(rows.flatten(0, 1)).view_as(rows)
            for name, rows in per_image.items()
            if name != "class"
        }
    asked = slice(None) if only is None else slice(only, only + 1)
    return Views.of(
        per_update=tensors,
        per_image={name: rows[:, asked].flatten(0, 1) for name, rows in per_image.items()},
        batch=observation.batch_size if only is None else 1,
    )


def _absent(head: Tensor, classes: Tensor) -> Tensor:
    """The mean row of the head's gradient over classes without an image; 0 where every class has one."""
    absent = torch.ones(head.shape[:2], device=head.device).scatter_(1, classes, 0.0)
    total = torch.einsum("uc,ucf->uf", absent, head)
    return total / absent.sum(1, keepdim=True).clamp_min(1)


def _common(head: Tensor) -> Tensor:
    """The direction of the head's gradient with the largest singular value, of every update."""
    largest = torch.linalg.eigh((head @ head.mT).double()).eigenvectors[..., -1].to(head)
    return F.normalize(torch.einsum("uc,ucf->uf", largest, head), dim=1, eps=1e-30)


def _beside(rows: Tensor, direction: Tensor) -> Tensor:
    """What rows of shape (updates, batch, features) have beside a direction of each update."""
    along = torch.einsum("ubf,uf->ub", rows, direction)
    return rows - along.unsqueeze(2) * direction.unsqueeze(1)


def _standardized(vectors: Tensor) -> Tensor:
    """Directions with every entry's mean and deviation over the vectors taken out; shape as given."""
    directions = F.normalize(vectors, dim=1, eps=1e-30)
    spread, mean = torch.std_mean(directions, dim=0, correction=0)
    return (directions - mean) / (spread + _FLOOR * spread.square().mean().sqrt().clamp_min(1e-30))
