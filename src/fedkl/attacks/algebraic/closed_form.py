"""Closed-form key-lock recovery: reads γ and β off one gradient, and the image with them, without any key.

The attack goes down a chain of convolutions with one-to-one activations, from the head to the image.

1. Head. With cross-entropy ∂L/∂b = p − y and ∂L/∂W = (p − y) hᵀ, so that the head's input is
   h = ∂L/∂Wᵀ (p − y) / ‖p − y‖², the label is the only negative entry of p − y, and ∂L/∂h = Wᵀ (p − y).
   A private head: the last convolution's own gradient gives its input and δ (`blind.py`).
2. A public convolution u = W * h′ + b, h = act(u): u and δ = ∂L/∂u follow from h and ∂L/∂h. Both u and
   ∂L/∂W = corr(δ, h′) are linear in h′, with more equations than unknowns: least squares (`convolution.py`).
3. A norm: z = γ x̂ + β with x̂ of mean 0 and variance 1 over the positions of each channel, so that β is the
   mean of z and γ its standard deviation. That is the secret. The gradient before the norm follows up to
   1/σ per channel (`norms.py`).
4. The convolution before that norm: the same equations with σ and μ per channel as further unknowns, now
   homogeneous, so that h′ comes out up to one factor. For the image the factor is fixed by the prior that
   pixels fill [0, 1]. For features it is that which makes the next block's equations fit best: a search in
   one dimension (`way_down.py`). Where running statistics are sent, σ and μ are known: no factor is lost.

Values near the bounds of a saturated activation are lost in float32. Every equation is weighted by the error
that float32 leaves of it, carried down from layer to layer, and positions without information are left out.

Values of γ and β in `Observation.model` are never read: where they are private they are the server's own
guess, and where they are public the attack does without. Nor are its running statistics: those of the one
image come from `Observation.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkl.attacks.algebraic.access import chain_of, image_equations, open_chain
from fedkl.attacks.algebraic.way_down import Descent, Passed
from fedkl.attacks.base import Attack, Reconstruction, register_attack
from fedkl.attacks.labels import infer_label
from fedkl.attacks.probing import probe_of
from fedkl.errors import AttackError
from fedkl.protocol import Observation
from fedkl.types import Labels


@dataclass(frozen=True, kw_only=True)
class PassedLayer:
    """How one layer was passed.

    Attributes:
        name: The layer's qualified name.
        forward_misfit: Mean squared error of the forward equations in units of their expected error; about 1
            where all is well and there are many more equations than unknowns, below where there are not.
        backward_misfit: Likewise of the backward equations.
        live: Channels that are not constant; None where no norm follows.
        saturated: Fraction of positions of live channels whose values the activation lost; None likewise.
    """

    name: str
    forward_misfit: float
    backward_misfit: float
    live: int | None
    saturated: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ClosedFormReconstruction(Reconstruction):
    """What the closed form found.

    Attributes:
        gammas: γ by the name of its parameter, for every norm with statistics per channel, public or private;
            shape ``(channels,)``, its sign is taken to be positive.
        betas: β likewise.
        layers: How each layer was passed, from above.
    """

    gammas: Mapping[str, Tensor] = field(repr=False)
    betas: Mapping[str, Tensor] = field(repr=False)
    layers: tuple[PassedLayer, ...]


@register_attack
@dataclass(frozen=True, kw_only=True)
class ClosedForm(Attack):
    """Reads γ, β and the image off the gradient of one image, layer by layer, by linear algebra.

    It needs a chain of convolutions and linear layers with invertible activations, no norms but instance
    norms and batch norms in train mode, and the head's gradient or, where that is private, a last convolution
    without a norm. It uses no key, labels or auxiliary data.
    Where dead channels leave fewer equations than pixels, a smoothness prior supplies the rest.

    Attributes:
        smoothness: Precision of the prior that neighboring pixels are alike; matters little unless channels
            are dead, and then hardly from 1 to 10⁵.
        chroma: How much more precisely the differences are known to be the same in all colors, as a factor.
            Behind many dead channels it matters: 1000 for gray images, repeated to three channels.

    Source:
        Head division: Geiping et al. 2020, proposition 3.1. Layer by layer: Zhu and Blaschko 2021 (R-GAP).
        The passage through a norm of unknown γ and β is this package's own.
    """

    title: ClassVar[str] = "the closed form"
    knows_locks: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = True
    reads_unaltered: ClassVar[bool] = True
    type: Literal["closed-form"] = "closed-form"
    smoothness: float = 10.0
    chroma: float = 10.0

    def __post_init__(self) -> None:
        self._require(*self._positive("smoothness"), *self._not_negative("chroma"))

    def memory(self, observation: Observation) -> int:
        """Of the normal equations for an image."""
        return image_equations(observation)

    def _check(self, observation: Observation) -> None:
        chain = open_chain(observation, attack="ClosedForm")
        locked = [block.layer.name for block in chain.blocks if block.elementwise is not None]
        if locked:
            raise AttackError(
                "ClosedForm: expected scale and shift per channel, got one of each per element behind "
                f"'{locked[0]}': they are no moments of anything. Use the attack wiener."
            )

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Callable[[int, int], None],
    ) -> list[Reconstruction]:
        found: list[Reconstruction] = []
        for number, observation in enumerate(observations, start=1):
            found.append(self._one(observation, generators[number - 1]))
            on_evaluation(number, len(observations) - number)
        return found

    def _one(self, observation: Observation, generator: torch.Generator) -> ClosedFormReconstruction:
        chain = chain_of(observation, attack="ClosedForm")
        descent = Descent(
            chain,
            observation.gradient,
            smoothness=self.smoothness,
            chroma=self.chroma,
            statistics=observation.statistics,
        )
        try:
            passed = descent.run(generator)
            image = descent.image(passed[-1]).unsqueeze(0).float()
        except ArithmeticError:  # a failure of this image, not of the whole audit
            passed, image = [], torch.full((1, *observation.image_shape), torch.nan)
        labels = observation.labels
        if labels is None and f"{chain.blocks[-1].layer.name}.bias" in observation.gradient:
            labels = infer_label(observation)
        norms = [(each.block.norm, each.norm) for each in passed]
        named = [(norm, values) for norm, values in norms if norm is not None and values is not None]
        gammas = {norm.scale: values.scale.float() for norm, values in named if norm.scale}
        betas = {norm.shift: values.beta.float() for norm, values in named if norm.shift}
        return ClosedFormReconstruction(
            images=image,
            labels=labels,
            scaling="prior" if descent.scale_is_lost(chain.blocks[0]) else "clip",
            loss=(
                _distance(observation, image, labels, {**gammas, **betas})
                if descent.sees_head and labels is not None
                else _blind_misfit(passed)
            ),
            evaluations=1,
            start=0,
            gammas=gammas,
            betas=betas,
            layers=tuple(_report(each) for each in passed),
        )


def _blind_misfit(passed: list[Passed]) -> float:
    """Of the blind top's equations: without the head, no gradient of the found image can be computed."""
    return passed[0].misfit[1] if passed else math.inf


def _report(passed: Passed) -> PassedLayer:
    norm = passed.norm
    return PassedLayer(
        name=passed.block.layer.name,
        forward_misfit=passed.misfit[0],
        backward_misfit=passed.misfit[1],
        live=None if norm is None else int(norm.live.sum()),
        saturated=None if norm is None else norm.saturated,
    )


def _distance(observation: Observation, image: Tensor, labels: Labels, affine: Mapping[str, Tensor]) -> float:
    """Squared distance of the found image's gradient from the observed one, relative to the latter's size."""
    if not bool(image.isfinite().all()):
        return math.inf
    model = probe_of(observation.model, train_mode=observation.train_mode)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in affine.items():
            parameters[name].copy_(value)
    observed = {name: g for name, g in observation.gradient.items() if name in parameters}
    some = next(iter(observed.values()))
    loss = F.cross_entropy(model(image.to(some)), labels.to(some.device))
    gradients = torch.autograd.grad(loss, [parameters[name] for name in observed])
    missed = sum(float((a - b).square().sum()) for a, b in zip(gradients, observed.values(), strict=True))
    return missed / sum(float(g.square().sum()) for g in observed.values())
