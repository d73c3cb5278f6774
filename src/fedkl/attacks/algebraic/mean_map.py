"""The mean map: a private first convolution and the images below it, from what one client sends.

Above the first block everything is public, so that for each of T updates the input z_t of the first
activation is known (`way_down.py`), and

    z_t = W * x_t + b        W, b: a few hundred private numbers, the same in all of the client's updates.

The server knows the labels, and what images of these classes look like: x_t is normal about the class's mean,
with principal components taken from images of its own (`gaussian.py`). Two steps by turns:

1. The stem. Least squares of z on patches of the images. At first these are the classes' means: over a class
   both sides average, which gives the method its name. The covariance that step 2 leaves of the images counts
   as well, and how the defense draws W and b holds them where the images say nothing.
2. The images. Given W and b the posterior of x_t is normal, with the misfit of step 1 as the noise.

That is expectation–maximization for factor analysis whose loadings are one convolution: an image has 12 × 256
values behind it in LeNet, and a stem with the wrong numbers does not explain them with natural images. The
same stem for all updates makes it the surer, but one update often does.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedkl.attacks.algebraic.access import image_equations, open_above_first
from fedkl.attacks.algebraic.chain import Chain, Layer
from fedkl.attacks.algebraic.way_down import Descent
from fedkl.attacks.base import Attack, Needs, Reconstruction, register_attack
from fedkl.attacks.gaussian import Gaussian, cholesky
from fedkl.attacks.labels import known_labels
from fedkl.attacks.parallel import Progress
from fedkl.errors import AttackError
from fedkl.protocol import Auxiliary, Observation

_LEAST = 100  # auxiliary images
_FIRST_NOISE = 0.1  # share of the variance of z that is left open while the images are the classes' means
_CERTAIN = 1e-12  # variance of a private number that was granted


@register_attack
@dataclass(frozen=True, kw_only=True)
class MeanMap(Attack):
    """Finds a private first convolution together with the images, from all updates of one client.

    It needs a chain that the closed form passes down to its first block, there a convolution without a norm,
    labels, auxiliary images, and a defense that the server can imitate. Updates of one client are those with
    the same `Observation.client`; one without a number is alone.
    Stems are drawn as clients draw theirs, from the operating system's randomness: results vary a little.
    Images come out with the scale that the auxiliary ones have. `Reconstruction.loss` is the share of the
    variance of the client's z that is left unexplained.

    Attributes:
        components: Principal components of the images; at most half as many as there are.
        draws: Imitated clients, whose stems give the moments.
        steps: Turns of stem and images.

    Source:
        Rubin and Thayer 1982 (expectation–maximization for factor analysis). Its use against a private
        stem is this package's own.
    """

    title: ClassVar[str] = "the mean map"
    knows_locks: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = True
    reads_unaltered: ClassVar[bool] = True
    type: Literal["mean-map"] = "mean-map"
    components: int = 200
    draws: int = 5
    steps: int = 100

    def __post_init__(self) -> None:
        self._require(components=1, draws=2, steps=1)  # of one draw the stem would seem to be known

    @property
    def divisible(self) -> bool:
        """A client's updates serve each other."""
        return False

    @property
    def needs(self) -> Needs:
        """Images of the server's own."""
        return Needs(own_images=_LEAST)

    def memory(self, observation: Observation) -> int:
        """Of the normal equations for an image."""
        return image_equations(observation)

    def _check(self, observation: Observation) -> None:
        first = open_above_first(observation, attack="MeanMap", private_stem=True).blocks[0]
        own = observation.own_data("MeanMap", least=_LEAST)
        if first.norm is not None or first.elementwise is not None:
            raise AttackError(
                f"MeanMap: expected no norm and no lock behind '{first.layer.name}': z would not be linear "
                "in the image. Use the attack wiener or closed-form where that convolution is public."
            )
        if own.draw is None or f"{first.layer.name}.weight" in observation.gradient:
            raise AttackError(
                f"MeanMap: expected a private '{first.layer.name}' and clients that draw theirs as the "
                "defense does, got none. Use the attack closed-form where that convolution is public."
            )

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        clients: dict[Hashable, list[int]] = {}
        for place, observation in enumerate(observations):
            alone = ("alone", place) if observation.client is None else observation.client
            clients.setdefault((alone, observation.auxiliary), []).append(place)
        labels = known_labels(observations)
        found: dict[int, Reconstruction] = {}
        known: dict[Auxiliary, tuple[_World, _Stem]] = {}  # only the last: it is large
        for places in clients.values():
            group = [observations[k] for k in places]
            own = group[0].own_data("MeanMap", least=_LEAST)
            chain = open_above_first(group[0], attack="MeanMap", private_stem=True)
            if own not in known:
                world = _World.of(own, chain, components=self.components, classes=group[0].classes)
                known = {own: (world, _Stem(chain.blocks[0].layer, own, draws=self.draws))}
            z = [_first_output(observations[k], generators[k]) for k in places]
            images, misfit = self._climbed(chain, *known[own], z, torch.cat([labels[k] for k in places]))
            for place, image in zip(places, images, strict=True):
                found[place] = Reconstruction(
                    images=image.unsqueeze(0).float(),
                    labels=labels[place],
                    scaling="clip",
                    loss=misfit if bool(image.isfinite().all()) else math.inf,
                    evaluations=self.steps,
                    start=0,
                )
            on_evaluation(len(found), len(observations) - len(found))
        return [found[place] for place in range(len(observations))]

    def _climbed(
        self, chain: Chain, world: _World, stem: _Stem, z: list[Tensor | None], labels: Tensor
    ) -> tuple[Tensor, float]:
        """The client's images, and the loss; NaN for those whose z could not be found."""
        known = torch.tensor([each is not None for each in z])
        images = torch.full((len(z), *world.means.shape[1:]), torch.nan).double()
        seen = [each for each in z if each is not None]
        if not seen:
            return images, math.inf
        means = world.means[labels.cpu()[known]]
        try:
            found, misfit = _alternated(stem, world, torch.stack(seen), means, self.steps)
        except ArithmeticError:  # a failure of this client, not of the whole audit
            return images, math.inf
        images[known] = (found - chain.shift) / chain.scale
        return images, misfit


@dataclass(frozen=True, kw_only=True, eq=False)
class _World:
    """What images look like, as the first layer gets them.

    Attributes:
        means: Of each class, shape ``(classes, channels, height, width)``.
        basis: Principal components of the deviations from these, shape ``(components, channels, …)``.
    """

    means: Tensor = field(repr=False)
    basis: Tensor = field(repr=False)

    @classmethod
    def of(cls, own: Auxiliary, chain: Chain, *, components: int, classes: int) -> _World:
        """From the server's own images; a class without any has the mean of all."""
        images = own.images.double().cpu() * chain.scale + chain.shift
        labels = own.labels.cpu()
        means = torch.stack(
            [(images[labels == k] if bool((labels == k).any()) else images).mean(0) for k in range(classes)]
        )
        most = min(components, len(images) // 2)
        prior = Gaussian.of((images - means[labels]).flatten(1), components=most)
        return cls(means=means, basis=prior.basis.T.reshape(-1, *images.shape[1:]))


class _Estimate(NamedTuple):
    """Weights of the stem, one column per output channel and the bias last, and the noise they leave."""

    columns: Tensor
    noise: Tensor


class _Stem:
    """The private convolution: what is known of it, and its least squares."""

    def __init__(self, layer: Layer, own: Auxiliary, *, draws: int) -> None:
        self._layer, self._shape = layer, layer.weight.shape
        clients = [own.draw() for _ in range(draws)] if own.draw is not None else []
        if not all(f"{layer.name}.weight" in client for client in clients) or not clients:
            raise AttackError(
                f"MeanMap: expected clients that draw '{layer.name}.weight' as the defense does. Give "
                "`Auxiliary.draw`."
            )
        size = math.prod(self._shape[1:])
        self._mean, self._precision = (
            torch.zeros(size + 1, len(layer.weight)).double(),
            torch.zeros(size + 1).double(),
        )
        for part, rows in (("weight", slice(0, size)), ("bias", slice(size, size + 1))):
            name = f"{layer.name}.{part}"
            # What clients do not draw is public: a bias, or none.
            drawn = [client[name] for client in clients if name in client] or [getattr(layer, part)]
            values = torch.stack(drawn).double().cpu().view(len(drawn), len(layer.weight), -1)
            known = bool((values == values[0]).all())
            self._mean[rows] = values[0].T if known else values.mean()
            self._precision[rows] = 1 / (_CERTAIN if known else float(values.var(correction=0)))

    def patches(self, images: Float[Tensor, "images channels height width"]) -> Tensor:
        """What the kernel reads, shape ``(images, kernel, positions)``."""
        layer = self._layer
        return F.unfold(images, self._shape[2:], layer.dilation, layer.padding, layer.stride)

    def fitted(
        self, patches: Tensor, spread: Float[Tensor, "kernel kernel"], z: Tensor, noise: Tensor
    ) -> _Estimate:
        """Least squares of z on patches.

        Args:
            patches: Of the images' means.
            spread: Covariance of their patches, summed over images and positions.
            z: Shape ``(images, out, positions)``.
            noise: Variance of its errors.
        """
        read = torch.cat([patches, torch.ones_like(patches[:, :1])], 1).transpose(0, 1).flatten(1)
        target = z.transpose(0, 1).flatten(1)
        normal = read @ read.T
        normal[:-1, :-1] += spread
        prior = noise * self._precision
        right = read @ target.T + prior.unsqueeze(1) * self._mean
        columns = torch.cholesky_solve(right, cholesky(normal + prior.diag()))
        miss = (target - columns.T @ read).square().sum() + (columns[:-1] * (spread @ columns[:-1])).sum()
        return _Estimate(columns, miss / target.numel())


def _alternated(
    stem: _Stem, world: _World, z: Float[Tensor, "images out height width"], means: Tensor, steps: int
) -> tuple[Tensor, float]:
    """Images, from their classes' means on, and the share of the variance of z that is unexplained."""
    z = z.flatten(2)
    average, components = stem.patches(means), stem.patches(world.basis)
    patches, spread = average, torch.zeros(2 * [average.shape[1]]).double()
    size = z.var(correction=0).clamp_min(1e-300)
    noise, scores = _FIRST_NOISE * size, torch.zeros(len(z), len(components)).double()
    for _ in range(steps):
        columns, noise = stem.fitted(patches, spread, z, noise)
        noise = noise.clamp_min(1e-12 * size)
        seen = torch.einsum("ko,nkp->nop", columns[:-1], components).flatten(1)
        normal = seen @ seen.T / noise
        normal.diagonal().add_(1)
        factor = cholesky(normal)
        expected = torch.einsum("ko,nkp->nop", columns[:-1], average) + columns[-1].view(1, -1, 1)
        scores = torch.cholesky_solve(seen @ (z - expected).flatten(1).T / noise, factor).T
        patches = average + torch.tensordot(scores, components, 1)
        left = torch.linalg.solve_triangular(factor, components.flatten(1), upper=False)
        left = left.view_as(components).transpose(0, 1).flatten(1)
        spread = len(z) * left @ left.T
    return means + torch.tensordot(scores, world.basis, 1), float(noise / size)


def _first_output(observation: Observation, generator: torch.Generator) -> Tensor | None:
    """Z of one update; None where the way down failed, which is a failure of this image alone.

    Every update has a chain of its own: above the stem, the public weights are those of its round.
    """
    chain = open_above_first(observation, attack="MeanMap", private_stem=True)
    descent = Descent(
        chain, observation.gradient, smoothness=1.0, chroma=0.0, statistics=observation.statistics
    )
    try:
        return descent.first_output(generator).z
    except ArithmeticError:
        return None
