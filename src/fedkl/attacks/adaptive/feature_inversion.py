"""Feature inversion: what the last blocks of any network got, exactly, and the image from that.

Gradient matching has to explain a gradient through the whole network at once, and in a deep one with norms of
its own statistics it does not. This attack goes in two steps that each are easy.

1. The features. Wherever a convolution has about as many outputs as positions, its gradient alone says what
   it got, up to a factor (`subspace.py`): in ResNet-20 all of the last stage but its first convolution.
   Labels, shortcuts, activations, norms and locks play no part in that.
2. The image. From images of its own the server computes the same features, with secrets drawn as clients draw
   theirs, and a kernel ridge regression goes from features to images. Then image and private parameters are
   fitted to the features by descent: a match of values, not of gradients, from a start that is near, among
   images that the principal components of the server's own make likely.

Behind keys that leave channels dead, which ones is public (`structure.py`): drawn secrets are made to agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value, vmap

from fedkl.attacks.adaptive.features import Forward, read_features, readable_convolutions
from fedkl.attacks.adaptive.gaussian import Gaussian
from fedkl.attacks.adaptive.kernels import Regression, Views, best_regression
from fedkl.attacks.adaptive.structure import read_structure
from fedkl.attacks.base import Attack, Auxiliary, Observation, Reconstruction
from fedkl.attacks.parallel import Progress
from fedkl.errors import AttackError, ConfigError
from fedkl.types import NamedTensors

_SIMULATIONS = 4000
_HELD_OUT = 0.15
_LEAST = 100  # auxiliary images
_AT_ONCE = 32  # images in one forward pass


@dataclass(frozen=True, kw_only=True)
class FeatureInversion(Attack):
    """The inputs of the last convolutions by linear algebra, and the image from them.

    It needs one image and one step, a convolution that `subspace.py` can read, and auxiliary images. Labels
    are not used. Secrets of simulated clients are drawn as clients draw theirs, from the operating system's
    randomness: results vary a little. Images come out with the scale that the auxiliary ones have.
    `Reconstruction.loss` is 1 − cos between the found image's features and the observed ones, averaged over
    layers; images are NaN where no features could be read.

    Attributes:
        layers: At most so many convolutions, those next to the image.
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

    type: Literal["feature-inversion"] = "feature-inversion"
    layers: int = 2
    simulations: int | None = None
    images_per_client: int = 40
    components: int = 1000
    iterations: int = 300
    lr: float = 0.05
    prior: float = 0.01

    def __post_init__(self) -> None:
        least = {"layers": 1, "images_per_client": 1, "components": 1, "iterations": 0}
        wrong = [f"{name} ≥ {low}" for name, low in least.items() if getattr(self, name) < low]
        wrong += ["finite lr > 0"] if not 0 < self.lr < math.inf else []
        wrong += ["finite prior ≥ 0"] if not 0 <= self.prior < math.inf else []
        few = self.simulations is not None and self.simulations < _LEAST
        wrong += [f"simulations ≥ {_LEAST}"] if few else []
        if wrong:
            raise ConfigError(f"FeatureInversion: expected {', '.join(wrong)}, got something else.")

    @property
    def divisible(self) -> bool:
        """One regression serves all observations with the same dead channels."""
        return False

    def _check(self, observation: Observation) -> None:
        if observation.batch_size != 1 or observation.local.steps > 1 or observation.transform is not None:
            raise AttackError(
                "FeatureInversion: expected the gradient of one image and one step as it is, got a batch of "
                f"{observation.batch_size}, {observation.local.steps} steps or a transformed update: the "
                "gradient's rows span too much then. Use the attack learned."
            )
        if observation.free or observation.secrets:
            raise AttackError(
                "FeatureInversion: it finds private parameters by itself; expected none to be free or "
                "generated. Leave out the arms that regress or match the lock's gradient."
            )
        _own(observation)
        if not readable_convolutions(observation):
            raise AttackError(
                "FeatureInversion: expected a convolution without stride that has as many outputs as "
                "positions, got none whose gradient is observed. Use the attack learned, or closed-form."
            )

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        read = [read_features(observation, most=self.layers) for observation in observations]
        lots: dict[object, list[int]] = {}
        for place, observation in enumerate(observations):
            dead = tuple((name, tuple(live.tolist())) for name, live in _supports(observation).items())
            lots.setdefault((observation.auxiliary, tuple(read[place]), dead), []).append(place)
        unread = torch.full(observations[0].image_shape, torch.nan)
        found = dict.fromkeys(range(len(observations)), (unread, math.inf))
        known: dict[Auxiliary, _World] = {}  # only the last: it is large
        for places in lots.values():
            first, names = observations[places[0]], tuple(read[places[0]])
            if not names:
                continue
            own = _own(first)
            if own not in known:
                known = {own: _World.of(own, self)}
            inverse = _Inverse(first, known[own], names, attack=self, on_evaluation=on_evaluation)
            for part in torch.split(torch.tensor(places), _AT_ONCE):
                asked = {name: torch.stack([read[place][name] for place in part.tolist()]) for name in names}
                images, losses = inverse(asked)
                found |= dict(zip(part.tolist(), zip(images, losses.tolist(), strict=True), strict=True))
        return [
            Reconstruction(
                images=found[place][0].unsqueeze(0),
                labels=observation.labels,
                scaling="clip",
                loss=found[place][1],
                evaluations=self.iterations,
                start=0,
            )
            for place, observation in enumerate(observations)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _World:
    """What the server knows of images and clients; on the CPU, as is all of this attack.

    Attributes:
        examples: The images whose features are computed, shape ``(simulations, channels, height, width)``.
        images: The distribution of all that it has.
        secrets: Private parameters of imitated clients by name, shape ``(clients, …)``.
    """

    examples: Tensor
    images: Gaussian
    secrets: Mapping[str, Tensor]

    @classmethod
    def of(cls, own: Auxiliary, attack: FeatureInversion) -> _World:
        images = own.images.cpu()
        count = attack.simulations or min(_SIMULATIONS, len(images))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(own.seed))
        assert own.draw is not None  # noqa: S101 - it was checked
        drawn = [own.draw() for _ in range(-(-count // attack.images_per_client))]
        return cls(
            examples=images[order.repeat(-(-count // len(images)))[:count]],
            images=Gaussian.of(images.flatten(1), components=min(attack.components, len(images) // 2)),
            secrets={name: torch.stack([client[name] for client in drawn]).cpu() for name in drawn[0]},
        )


class _Inverse:
    """From features to images, for observations of one model whose dead channels are the same.

    Args:
        observation: One of them.
        world: What the server knows.
        names: Whose inputs the features are.
        attack: Its settings.
        on_evaluation: Told of the simulations.
    """

    def __init__(
        self,
        observation: Observation,
        world: _World,
        names: Sequence[str],
        *,
        attack: FeatureInversion,
        on_evaluation: Progress,
    ) -> None:
        self._world, self._attack, self._on_evaluation = world, attack, on_evaluation
        self._forward = Forward(observation, names)
        supports = _supports(observation)
        self._secrets = {
            name: _agreeing(values, supports[name]) if name in supports else values
            for name, values in world.secrets.items()
        }
        self._known, self._regression = self._learned()

    def __call__(self, asked: NamedTensors) -> tuple[Float[Tensor, "images c h w"], Float[Tensor, " images"]]:
        """Images for features of length 1, and what is left of the mismatch."""
        start = self._regression(self._known, _views(asked))
        images, losses = self._descended(asked, self._world.images.scores(start))
        return images.reshape(-1, *self._forward.image_shape), losses

    def _learned(self) -> tuple[Views, Regression]:
        examples, parts = self._world.examples, []
        count = len(examples)
        for some in torch.split(torch.arange(count), _AT_ONCE):
            clients = some // self._attack.images_per_client
            secrets = {name: values[clients] for name, values in self._secrets.items()}
            with torch.no_grad():
                parts.append(_views(self._forward(secrets, examples[some])))
            self._on_evaluation(len(parts) * _AT_ONCE, 1)
        views, images = Views.joined(parts), examples.flatten(1)
        fitted = count - round(_HELD_OUT * count)
        known, probes = views.first(fitted), views.last(count - fitted)
        return known, best_regression(known, images[:fitted], probes, images[fitted:])

    def _descended(self, asked: NamedTensors, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Adam on all images at once, from these scores and the secrets' means on."""
        attack, world = self._attack, self._world
        moments = {
            name: torch.std_mean(values, dim=0, correction=0) for name, values in self._secrets.items()
        }

        def found(point: NamedTensors) -> tuple[Tensor, NamedTensors]:
            secrets = {name: mean + spread * point[name] for name, (spread, mean) in moments.items()}
            return world.images.values(point["image"]), secrets

        def objective(point: NamedTensors, target: NamedTensors) -> tuple[Tensor, Tensor]:
            image, secrets = found(point)
            misfit = self._forward.misfit(secrets, image, target)
            return misfit + attack.prior * sum(part.square().mean() for part in point.values()), misfit

        point = {"image": scores}
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
            return world.images.values(end["image"]), vmap(objective)(end, asked)[1]


def _own(observation: Observation) -> Auxiliary:
    own = observation.own_data("FeatureInversion", least=_LEAST)
    if own.draw is None:
        raise AttackError(
            "FeatureInversion: expected clients that the server can imitate. Give `Auxiliary.draw`."
        )
    return own


def _supports(observation: Observation) -> NamedTensors:
    """Which channels are alive, by the name of a γ that is not observed and has dead ones."""
    return {
        name: live
        for name, live in read_structure(observation).support.items()
        if name not in observation.gradient and not bool(live.all())
    }


def _agreeing(values: Float[Tensor, "clients channels"], live: Tensor) -> Tensor:
    """Drawn γ, made to be zero where the client's is and nowhere else: other channels' values stand in."""
    order = torch.where(values > 0, torch.rand_like(values), 2.0).argsort(1)  # the positive ones first
    positive = (values > 0).sum(1, keepdim=True).clamp_min(1)
    others = values.gather(1, order.gather(1, torch.arange(values.shape[1]).expand_as(values) % positive))
    return torch.where(live, torch.where(values == 0, others, values), 0.0)


def _views(features: NamedTensors) -> Views:
    return Views.of(per_update=features, per_image={}, batch=1)
