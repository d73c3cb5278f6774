"""Feature inversion: what the last blocks of a network got, exactly, and the images from that.

Gradient matching has to explain a gradient through the whole network at once, and in a deep one with norms of
its own statistics it does not. This attack goes in two steps that each are easy.

1. The features. Wherever a convolution has about as many outputs as positions of all images, its gradient
   alone says what it got of each, up to a factor (`subspace.py`): in ResNet-20, of one image, all of the last
   stage but its first convolution; in ResNet-18 of batches too.
   Labels, shortcuts, norms and the values of γ and β play no part in that; dead channels do, and in a batch
   the activation's zeros.
2. The images. From images of its own the server computes the same features, with secrets drawn as clients
   draw theirs, and a kernel ridge regression goes from features to images. Then images and private parameters
   are fitted to the features by descent: a match of values, not of gradients, from a start that is near,
   among images that the principal components of the server's own make likely.

Behind keys that leave channels dead, which ones is public (`structure.py`): drawn secrets are made to agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value, vmap

from fedkl.attacks.algebraic.features import Forward, read_features, readable_convolutions
from fedkl.attacks.algebraic.structure import read_structure
from fedkl.attacks.base import Attack, Needs, Reconstruction, register_attack
from fedkl.attacks.gaussian import Gaussian
from fedkl.attacks.learned.kernels import Regression, Views, best_regression
from fedkl.attacks.parallel import Progress
from fedkl.errors import AttackError
from fedkl.protocol import Auxiliary, Observation
from fedkl.types import ImageBatch, NamedTensors

_SIMULATIONS = 4000
_HELD_OUT = 0.15
_LEAST = 100  # auxiliary images
_AT_ONCE = 32  # images in one forward pass
_CLIENTS = 50  # imitated at least: the descent takes means and deviations of their secrets


@register_attack
@dataclass(frozen=True, kw_only=True)
class FeatureInversion(Attack):
    """The inputs of the last convolutions by linear algebra, and the image from them.

    It needs one step, a convolution that `subspace.py` can read, and auxiliary images. Labels are not used;
    the images of a batch come in no order. Secrets of simulated clients are drawn as clients draw theirs,
    from the operating system's randomness: results vary a little. Images come out with the scale that the
    auxiliary ones have. `Reconstruction.loss` is one minus the size of the cosine between the found images'
    features and the observed ones, averaged over images and layers; images are NaN where no features could
    be read.

    Attributes:
        layers: At most so many convolutions, those next to the image; of a batch one, as images come in
            another order from each.
        simulations: Images whose features are computed for the regression; None: 4,000, or as many as the
            server has if these are fewer.
        images_per_client: Of them so many before new secrets are drawn.
        components: Principal components of the images; at most half as many as there are.
        iterations: Steps of the descent; 0: the regression's image.
        lr: Of Adam, in standard deviations of scores and secrets; it falls to 0 along a cosine.
        prior: Weight of the scores' and secrets' mean squares.

    Source:
        Feature inversion: Mahendran and Vedaldi 2015. Reading the features off a gradient, and doing so
        without the client's private parameters, is this package's own.
    """

    title: ClassVar[str] = "feature inversion"
    knows_locks: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = True
    reads_unaltered: ClassVar[bool] = True
    type: Literal["feature-inversion"] = "feature-inversion"
    layers: int = 2
    simulations: int | None = None
    images_per_client: int = 40
    components: int = 1000
    iterations: int = 300
    lr: float = 0.05
    prior: float = 0.01

    def __post_init__(self) -> None:
        least = {"layers": 1, "images_per_client": 1, "components": 1, "iterations": 0, "simulations": _LEAST}
        self._require(*self._positive("lr"), *self._not_negative("prior"), **least)

    @property
    def divisible(self) -> bool:
        """One regression serves all observations with the same dead channels."""
        return False

    @property
    def needs(self) -> Needs:
        """Images of the server's own."""
        return Needs(own_images=_LEAST)

    def _check(self, observation: Observation) -> None:
        if not observation.local.is_gradient or not observation.up_to_a_factor:
            steps = observation.local.step_count(observation.batch_size // observation.cohort)
            raise AttackError(
                f"FeatureInversion: expected the gradient of one step, up to a factor, got {steps} steps, "
                "weights or a transformed update: the gradient's rows span too much "
                "then. Use the attack learned."
            )
        if observation.free or observation.secrets:
            raise AttackError(
                "FeatureInversion: it finds private parameters by itself; expected none to be free or "
                "generated. Leave out the arms that regress or match the lock's gradient."
            )
        own_data(observation, attack="FeatureInversion")
        if not readable_convolutions(observation):
            raise AttackError(
                "FeatureInversion: expected a convolution that has as many outputs as positions of all "
                f"{observation.batch_size} images, zeros as padding, no stride and no groups, got none whose "
                "gradient is observed. Use the attack learned, or closed-form."
            )

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        images = observations[0].batch_size
        most = self.layers if images == 1 else 1
        read = [read_features(observation, most=most) for observation in observations]
        found = invert(observations, read, attack=self, on_evaluation=on_evaluation)
        return [
            Reconstruction(
                images=found[place][0],
                labels=observation.labels if images == 1 else None,
                scaling="clip",
                loss=found[place][1],
                evaluations=self.iterations,
                start=0,
            )
            for place, observation in enumerate(observations)
        ]


def invert(
    observations: Sequence[Observation],
    read: Sequence[NamedTensors],
    *,
    attack: FeatureInversion,
    on_evaluation: Progress,
) -> list[tuple[ImageBatch, float]]:
    """Images that have these features, and 1 − |cos| of theirs; NaN and infinity where none were read.

    Args:
        observations: Of one kind.
        read: For each, features of length 1 by a layer's name, shape ``(images, values)``; as many images for
            all. They may be fewer than are behind an update where no norm mixes images.
        attack: Its settings.
        on_evaluation: Told of simulations and steps.
    """
    images = next((len(values) for each in read for values in each.values()), observations[0].batch_size)
    unread = torch.full((images, *observations[0].image_shape), torch.nan)
    found = dict.fromkeys(range(len(read)), (unread, math.inf))
    by_owner: dict[Auxiliary, list[int]] = {}
    for place, observation in enumerate(observations):
        if read[place]:
            by_owner.setdefault(own_data(observation, attack="FeatureInversion"), []).append(place)
    for own, places in by_owner.items():
        world = _World.of(own, attack, batch=images)
        supports = {place: world.supports(observations[place]) for place in places}
        lots: dict[object, list[int]] = {}
        for place in places:
            dead = tuple((name, tuple(live.tolist())) for name, live in supports[place].items())
            lots.setdefault((tuple(read[place]), dead), []).append(place)
        for lot in lots.values():
            first, names = lot[0], tuple(read[lot[0]])
            inverse = _Inverse(
                observations[first],
                world,
                names,
                supports[first],
                attack=attack,
                on_evaluation=on_evaluation,
            )
            for part in torch.split(torch.tensor(lot), max(1, _AT_ONCE // images)):
                asked = {name: torch.stack([read[place][name] for place in part.tolist()]) for name in names}
                results = zip(*inverse(asked), strict=True)
                found |= {
                    place: (own_images, float(loss))
                    for place, (own_images, loss) in zip(part.tolist(), results, strict=True)
                }
    return [found[place] for place in range(len(read))]


@dataclass(frozen=True, kw_only=True, eq=False)
class _World:
    """What the server knows of images and clients; on the CPU, as is all of this attack.

    Attributes:
        examples: Batches whose features are computed, shape ``(batches, images, channels, height, width)``.
        fitted: How many of them, from the first on, the regression is fitted on; no other has an image of
            these.
        images: The distribution of all that it has.
        secrets: Private parameters of imitated clients by name, shape ``(clients, …)``.
        each: Batches of a client.
        seed: Of its draws that the clients' secrets have no part in.
    """

    examples: Tensor
    fitted: int
    images: Gaussian
    secrets: Mapping[str, Tensor]
    each: int
    seed: int

    @classmethod
    def of(cls, own: Auxiliary, attack: FeatureInversion, *, batch: int) -> _World:
        images = own.images.cpu()
        count = -(-(attack.simulations or min(_SIMULATIONS, len(images))) // batch)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(own.seed))
        kept, held = round(len(images) * _HELD_OUT), max(1, round(count * _HELD_OUT))
        parts = ((order[kept:], count - held), (order[:kept], held))
        places = [part.repeat(-(-wanted * batch // len(part)))[: wanted * batch] for part, wanted in parts]
        each = max(1, attack.images_per_client // batch)
        assert own.draw is not None  # noqa: S101 - it was checked
        drawn = [own.draw() for _ in range(max(-(-count // each), _CLIENTS))]
        return cls(
            examples=images[torch.cat(places)].reshape(count, batch, *images.shape[1:]),
            fitted=count - held,
            images=Gaussian.of(images.flatten(1), components=min(attack.components, len(images) // 2)),
            secrets={name: torch.stack([client[name] for client in drawn]).cpu() for name in drawn[0]},
            each=each,
            seed=own.seed,
        )

    def supports(self, observation: Observation) -> NamedTensors:
        """Which channels are alive, by the name of a γ that clients draw zeros for and that has dead ones."""
        return {
            name: live.cpu()
            for name, live in read_structure(observation).support.items()
            if name in self.secrets and bool((self.secrets[name] == 0).any()) and not bool(live.all())
        }

    def agreeing(self, supports: NamedTensors) -> dict[str, Tensor]:
        """The clients' secrets, made to agree with dead channels that are known."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: _agreeing(values, supports[name], generator) if name in supports else values
            for name, values in self.secrets.items()
        }


class _Inverse:
    """From features to images, for observations of one model whose dead channels are the same.

    Args:
        observation: One of them.
        world: What the server knows.
        names: Whose inputs the features are.
        supports: Which channels are alive, where not all are; see `_World.supports`.
        attack: Its settings.
        on_evaluation: Told of the simulations.
    """

    def __init__(
        self,
        observation: Observation,
        world: _World,
        names: Sequence[str],
        supports: NamedTensors,
        *,
        attack: FeatureInversion,
        on_evaluation: Progress,
    ) -> None:
        self._world, self._attack, self._on_evaluation = world, attack, on_evaluation
        self._forward = Forward(observation, names)
        self._secrets = world.agreeing(supports)
        self._known, self._regression = self._learned()

    def __call__(
        self, asked: NamedTensors
    ) -> tuple[Float[Tensor, "batches images c h w"], Float[Tensor, " batches"]]:
        """Images for features of length 1, and what is left of the mismatch."""
        start = self._regression(self._known, _views(asked))
        scores = self._world.images.scores(start)
        batches, batch = next(iter(asked.values())).shape[:2]
        images, losses = self._descended(asked, scores.reshape(batches, batch, -1))
        return images.reshape(batches, batch, *self._forward.image_shape), losses

    def _learned(self) -> tuple[Views, Regression]:
        world, parts = self._world, []
        count, batch = world.examples.shape[:2]
        for some in torch.split(torch.arange(count), max(1, _AT_ONCE // batch)):
            secrets = {name: values[some // world.each] for name, values in self._secrets.items()}
            with torch.no_grad():
                parts.append(_views(self._forward(secrets, world.examples[some])))
            self._on_evaluation((int(some[-1]) + 1) * batch, 1)
        views, images = Views.joined(parts), world.examples.flatten(0, 1).flatten(1)
        fitted = world.fitted * batch
        known, probes = views.part(0, fitted), views.part(fitted, count * batch)
        return known, best_regression(known, images[:fitted], probes, images[fitted:])

    def _descended(self, asked: NamedTensors, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Adam on all batches at once, from these scores and the secrets' means on."""
        attack, world = self._attack, self._world
        moments = {
            name: torch.std_mean(values, dim=0, correction=0) for name, values in self._secrets.items()
        }

        def found(point: NamedTensors) -> tuple[Tensor, NamedTensors]:
            secrets = {name: mean + spread * point[name] for name, (spread, mean) in moments.items()}
            return world.images.values(point["images"]), secrets

        def objective(point: NamedTensors, target: NamedTensors) -> tuple[Tensor, Tensor]:
            images, secrets = found(point)
            misfit = self._forward.misfit(secrets, images, target)
            return misfit + attack.prior * sum(part.square().mean() for part in point.values()), misfit

        point = {"images": scores}
        point |= {name: torch.zeros(len(scores), *mean.shape) for name, (_, mean) in moments.items()}
        for tensor in point.values():
            tensor.requires_grad_()
        optimizer = torch.optim.Adam(list(point.values()), lr=attack.lr)
        steps = max(attack.iterations, 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        slope = vmap(grad_and_value(objective, has_aux=True))
        for step in range(attack.iterations):
            gradients, _ = slope({name: tensor.detach() for name, tensor in point.items()}, asked)
            for name, tensor in point.items():
                tensor.grad = gradients[name].nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
            schedule.step()
            self._on_evaluation(step + 1, len(scores))
        with torch.no_grad():
            end = {name: tensor.detach() for name, tensor in point.items()}
            return world.images.values(end["images"]), vmap(objective)(end, asked)[1]


def own_data(observation: Observation, *, attack: str) -> Auxiliary:
    """The server's own images and clients.

    Raises:
        AttackError: There are too few, or clients cannot be imitated.
    """
    own = observation.own_data(attack, least=_LEAST)
    if own.draw is None:
        raise AttackError(f"{attack}: expected clients that the server can imitate. Give `Auxiliary.draw`.")
    return own


def _agreeing(values: Float[Tensor, "clients channels"], live: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn γ, made to be zero where the client's is and nowhere else: other channels' values stand in."""
    chance = torch.rand(values.shape, generator=generator)
    order = torch.where(values > 0, chance, 2.0).argsort(1)  # the positive ones first
    positive = (values > 0).sum(1, keepdim=True).clamp_min(1)
    others = values.gather(1, order.gather(1, torch.arange(values.shape[1]).expand_as(values) % positive))
    return torch.where(live, torch.where(values == 0, others, values), 0.0)


def _views(features: NamedTensors) -> Views:
    """One for each image of each batch; with a positive sum, as those that are read: no sign is known."""
    signed = {
        name: torch.where(values.sum(2, keepdim=True) < 0, -values, values).flatten(0, 1)
        for name, values in features.items()
    }
    return Views.of(per_update=signed, per_image={}, batch=1)
