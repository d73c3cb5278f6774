"""The element prior: images from behind a lock with a scale and a shift of its own for every element.

Above the lock everything is public, so that the input z of the first activation is known (`way_down.py`).
With x̂ the standardized output of the public first convolution,

    z_i = γ_i x̂_i + β_i        one equation per element; γ_i, β_i, x̂_i unknown.

Counting says that nothing is pinned. But x̂ is nowhere near arbitrary: on images of its own the server sees
that a few hundred principal components hold all of it, and it knows how γ and β are drawn, for it draws them
itself. To it they are noise on a signal of known statistics:

1. γ ≥ 0. z_i = E[γ] x̂_i + E[β] + noise of variance Var[γ] x̂_i² + Var[β]. The best linear guess of x̂ is
   Wiener's filter, C_x̂z C_zz⁻¹ (z − m_z), computed in the components by Woodbury's identity (`gaussian.py`).
   Then x̂_i² is taken from that guess, and so on: iteratively reweighted.
2. Signs. Where γ is as often negative as positive, E[γ] = 0 and no linear guess is better than the mean. But
   given its sign s_i every γ_i has a mean E[γ | s_i] again. Expectation–maximization: the probability of each
   sign given the present guess of x̂ and its variance; the filter, every equation weighted by these; repeat.
   It starts from those of the server's own images that explain z best, with the strongest components, and
   goes on with all of them from where the likelihood is highest. No truth decides anywhere. The prior's mean
   tells the image from its negative.

With one sign only, 2 is 1. The image follows from x̂'s components by regression on the server's own images,
its brightness and contrast, which the norm takes away, included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedkl.attacks.algebraic.access import image_equations, open_above_first
from fedkl.attacks.algebraic.chain import Block, Chain
from fedkl.attacks.algebraic.way_down import Descent, Output
from fedkl.attacks.base import Attack, Needs, Reconstruction, register_attack
from fedkl.attacks.gaussian import Gaussian, Posterior
from fedkl.attacks.labels import infer_label
from fedkl.attacks.parallel import Progress
from fedkl.errors import AttackError
from fedkl.protocol import Auxiliary, Observation

_LEAST = 100  # auxiliary images
_COARSE = 64  # components while starts are compared
_STEPS = 15
_LOST = 1e12  # variance of a z that float32 has lost
_UNSURE = 0.3  # of a start's values, in units of their variance


@register_attack
@dataclass(frozen=True, kw_only=True)
class Wiener(Attack):
    """Wiener's filter against a lock per element, with expectation–maximization over signs where γ has both.

    It needs a chain that the closed form passes down to its first block, and there a public convolution, a
    norm with statistics per channel (or none) and γ and β per element, or either; auxiliary images; and a
    defense that the server can imitate. γ and β are drawn as clients draw theirs, from the operating system's
    randomness: results vary a little.
    Images come out with the scale that the auxiliary ones have. `Reconstruction.loss` is the negative
    logarithm of z's probability and the scores' (up to a constant) per element (nats; smaller is better, and
    it may be negative).

    Attributes:
        components: Principal components of the first layer's output; at most half as many as images.
        draws: Imitated clients, whose γ and β give the moments.
        starts: Auxiliary images that signs are sought from.

    Source:
        Wiener 1949; Dempster, Laird and Rubin 1977. Their use against a lock is this package's own.
    """

    title: ClassVar[str] = "the Wiener filter"
    knows_locks: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = True
    reads_unaltered: ClassVar[bool] = True
    type: Literal["wiener"] = "wiener"
    components: int = 300
    draws: int = 20
    starts: int = 10

    def __post_init__(self) -> None:
        self._require(components=1, draws=2, starts=1)  # of one draw all secrets would seem to be known

    @property
    def divisible(self) -> bool:
        """One prior serves all observations."""
        return False

    @property
    def needs(self) -> Needs:
        """Images of the server's own."""
        return Needs(own_images=_LEAST)

    def memory(self, observation: Observation) -> int:
        """Of the normal equations for an image."""
        return image_equations(observation)

    def _check(self, observation: Observation) -> None:
        chain = open_above_first(observation, attack="Wiener")
        own = observation.own_data("Wiener", least=_LEAST)
        first = chain.blocks[0]
        if first.elementwise is None or (first.norm is not None and (first.norm.scale or first.norm.shift)):
            raise AttackError(
                f"Wiener: expected a scale or shift per element behind '{first.layer.name}' and none per "
                "channel. Use the attack closed-form."
            )
        if own.draw is None:
            raise AttackError(
                "Wiener: expected auxiliary data with clients that draw γ and β as the defense does, got "
                "none that can. Give `Auxiliary.draw`."
            )

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        readers: dict[Auxiliary, _Reader] = {}
        found: list[Reconstruction] = []
        for observation, generator in zip(observations, generators, strict=True):
            chain = open_above_first(observation, attack="Wiener")
            own = observation.own_data("Wiener", least=_LEAST)
            if own not in readers:
                readers = {own: self._reader(chain, observation, own)}  # only the last: it is large
            found.append(_reconstruction(observation, chain, readers[own], generator, starts=self.starts))
            on_evaluation(len(found), len(observations) - len(found))
        return found

    def _reader(self, chain: Chain, observation: Observation, own: Auxiliary) -> _Reader:
        images = own.images.double().cpu()
        features = _features(chain, images)
        most = min(self.components, len(images) // 2)
        prior = Gaussian.of(features, components=most)
        scores = prior.scores(features)
        mean = images.mean(0)
        weights = scores.T @ (images - mean).flatten(1) / len(images)
        return _Reader(
            lock=_moments(chain.blocks[0], observation, own, draws=self.draws),
            prior=prior,
            features=features,
            scores=scores,
            mean=mean,
            weights=weights,
        )


class _Signed(NamedTuple):
    """Moments of γ and β.

    Attributes:
        share: Of each sign of γ, shape ``(signs,)``.
        scale: Mean of γ given its sign, shape ``(signs,)``, or of each element, ``(elements, 1)``.
        scale_variance: Likewise, shape ``(signs,)``.
        shift: Mean of β, of all elements or of each.
        shift_variance: Of β.
    """

    share: Tensor
    scale: Tensor
    scale_variance: Tensor
    shift: Tensor
    shift_variance: float


class _Found(NamedTuple):
    """Where one start has come to.

    Attributes:
        posterior: Of x̂'s components.
        likelihood: Logarithm of the probability of z given the guess before the last step, and of the last
            scores.
        start: Its number, by how well the images explain z.
        steps: Taken from there.
    """

    posterior: Posterior
    likelihood: float
    start: int = 0
    steps: int = _STEPS


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reader:
    """What the server knows before it sees z.

    Attributes:
        lock: How γ and β are drawn.
        prior: Of x̂.
        features: X̂ of the auxiliary images.
        scores: Theirs.
        mean: Of the images.
        weights: Takes scores to the image, shape ``(components, pixels)``.
    """

    lock: _Signed
    prior: Gaussian = field(repr=False)
    features: Tensor = field(repr=False)
    scores: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)

    def read(self, seen: Output, *, starts: int) -> _Found:
        """The components of x̂ from z."""
        z, error = seen.z.flatten() - self.lock.shift, seen.variance.flatten().clamp_max(_LOST)
        if len(self.lock.share) == 1:
            return self._climbed(self.prior, z, error, scores=None)
        coarse = self.prior.strongest(_COARSE)
        certain = _UNSURE * self.prior.variance
        likely = torch.stack(
            [self._logits(z, error, each, certain).logsumexp(1).sum() for each in self.features]
        )
        first = likely.topk(min(starts, len(likely))).indices
        tried = [self._climbed(coarse, z, error, scores=self.scores[k, :_COARSE]) for k in first]
        start = max(range(len(tried)), key=lambda k: tried[k].likelihood)
        found = self._climbed(self.prior, z, error, scores=tried[start].posterior.scores)
        return found._replace(start=start, steps=2 * _STEPS)

    def image(self, found: _Found) -> Float[Tensor, "channels height width"]:
        """The image with these components."""
        return self.mean + (found.posterior.scores @ self.weights).view_as(self.mean)

    def _climbed(self, prior: Gaussian, z: Tensor, error: Tensor, *, scores: Tensor | None) -> _Found:
        """Expectation–maximization from some scores on, or from the prior."""
        mean, spread = prior.mean, prior.variance
        if scores is not None:
            full = F.pad(scores, (0, prior.basis.shape[1] - len(scores)))
            mean, spread = prior.values(full), _UNSURE * prior.variance
        found = _Found(Posterior(torch.zeros(0), torch.zeros(0)), -math.inf)
        for _ in range(_STEPS):
            logits = self._logits(z, error, mean, spread)
            noise = self._noise(error, mean, spread) + self.lock.scale.square() * prior.rest.unsqueeze(1)
            weighted = logits.softmax(1) * self.lock.scale / noise
            posterior = prior.posterior((weighted * self.lock.scale).sum(1), weighted.sum(1) * z)
            mean = prior.values(posterior.scores)
            spread = posterior.spread.square().sum(1) + prior.rest
            likelihood = float(logits.logsumexp(1).sum() - posterior.scores.square().sum() / 2)
            found = _Found(posterior, likelihood)
        return found

    def _noise(self, error: Tensor, mean: Tensor, spread: Tensor) -> Float[Tensor, "elements signs"]:
        """Variance of z given x̂ and the sign of γ, at the second moment of x̂."""
        own = self.lock.scale_variance * (mean.square() + spread).unsqueeze(1)
        return own + self.lock.shift_variance + error.unsqueeze(1)

    def _logits(
        self, z: Tensor, error: Tensor, mean: Tensor, spread: Tensor
    ) -> Float[Tensor, "elements signs"]:
        """Log-probability of z and of each sign of γ, for x̂ with this mean and variance."""
        lock = self.lock
        variance = self._noise(error, mean, spread) + lock.scale.square() * spread.unsqueeze(1)
        miss = z.unsqueeze(1) - lock.scale * mean.unsqueeze(1)
        return lock.share.log() - (miss.square() / variance + (2 * math.pi * variance).log()) / 2


def _reconstruction(
    observation: Observation, chain: Chain, reader: _Reader, generator: torch.Generator, *, starts: int
) -> Reconstruction:
    descent = Descent(
        chain, observation.gradient, smoothness=1.0, chroma=0.0, statistics=observation.statistics
    )
    image, loss, start, steps = torch.full(observation.image_shape, torch.nan), math.inf, 0, 0
    try:
        seen = descent.first_output(generator)
        found = reader.read(seen, starts=starts)
        image, loss = reader.image(found), -found.likelihood / seen.z.numel()
        start, steps = found.start, found.steps
    except ArithmeticError:  # a failure of this image, not of the whole audit
        pass
    labels = observation.labels
    if labels is None and f"{chain.blocks[-1].layer.name}.bias" in observation.gradient:
        labels = infer_label(observation)
    return Reconstruction(
        images=image.unsqueeze(0).float(),
        labels=labels,
        scaling="clip",
        loss=loss,
        evaluations=steps,
        start=start,
    )


def _features(chain: Chain, images: Float[Tensor, "images channels height width"]) -> Tensor:
    """What the lock's γ multiplies, of every image, flattened."""
    first = chain.blocks[0]
    layer = first.layer
    pixels = images * chain.scale + chain.shift
    output = F.conv2d(pixels, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
    return (output if first.norm is None else F.instance_norm(output, eps=first.norm.eps)).flatten(1)


def _moments(block: Block, observation: Observation, own: Auxiliary, *, draws: int) -> _Signed:
    """Of γ and β: over all elements of imitated clients, which a lock treats alike, unless they are known."""
    if own.draw is None or block.elementwise is None:
        raise AttackError("Wiener: expected clients that draw γ and β. Give `Auxiliary.draw`.")
    clients = [own.draw() for _ in range(draws)]
    public = dict(observation.model.named_parameters())

    def drawn(name: str, neutral: float) -> Float[Tensor, "draws elements"]:
        if not name:
            return torch.full((1, 1), neutral).double()
        values = [client[name] for client in clients if name in client]
        if not values and name not in observation.gradient:
            raise AttackError(
                f"Wiener: '{name}' is neither public nor drawn by `Auxiliary.draw`. Draw it too."
            )
        values = values or [public[name].detach()]
        return torch.stack(values).flatten(1).double().cpu()

    scale, shift = drawn(block.elementwise.scale, 1.0), drawn(block.elementwise.shift, 0.0)
    middle, variance = (shift[0], 0.0) if _known(shift) else (shift.mean(), float(shift.var(correction=0)))
    if _known(scale):
        one = torch.ones(1).double()
        return _Signed(one, scale[0].unsqueeze(1), 0 * one, middle, variance)
    signs = [part for part in (scale[scale >= 0], scale[scale < 0]) if len(part)]
    return _Signed(
        share=torch.tensor([len(part) / scale.numel() for part in signs]).double(),
        scale=torch.stack([part.mean() for part in signs]),
        scale_variance=torch.stack([part.var(correction=0) for part in signs]),
        shift=middle,
        shift_variance=variance,
    )


def _known(values: Float[Tensor, "draws elements"]) -> bool:
    """Whether all clients have the same, as where public, granted, or a trained model's.

    There every lock layer gives the model's values, but for rounding.
    """
    return torch.allclose(values, values[:1].expand_as(values), rtol=1e-4, atol=1e-6)
