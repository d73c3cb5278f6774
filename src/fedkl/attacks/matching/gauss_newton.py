"""Images and secrets together, from one gradient: whatever the network, the lock and the batch.

The closed form goes down layer by layer and must pass each by itself. Dead channels, as ReLU keys make them,
stop it: a layer's input has more unknowns then than the layer has equations. Taken together they are not too
few. The image is one set of unknowns for all layers, a lock adds some tens, and one gradient has thousands of
entries: nonlinear least squares, over

* the scores of each image on the principal components of the server's own images, the strongest first;
* γ and β, or whatever else is private, in units of how clients draw them: the server plays clients to see.
  Where clients draw zeros, as ReLU keys make them, a zero row of the gradient says where (`structure.py`).

Residuals are the differences between the gradient that these would give and the observed one, every tensor
in units of its own size; `annealing.py` finds the way. The objective of gradient matching is the same: what
differs is that curvature is used, and that coarse features come first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedkl.attacks import smoothness as prior
from fedkl.attacks.algebraic.structure import read_structure
from fedkl.attacks.base import Attack, Needs, Reconstruction, register_attack
from fedkl.attacks.labels import known_labels, order_matters
from fedkl.attacks.matching.annealing import Fit, anneal, slopes
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.attacks.parallel import Progress
from fedkl.errors import AttackError
from fedkl.protocol import Auxiliary, Observation
from fedkl.types import ImageBatch, Labels

_LEAST = 100  # auxiliary images
_LARGEST = 4096  # numbers of an image, and unknowns
_MOST = 10**9  # entries of the Jacobian: 4 GB
_COARSE = 64  # components that are sought first
_SMALL = 1e-10  # share of the gradient's square below which a tensor is rounding: of a bias before a norm
_STILL, _WIDE = 0.05, 0.5  # size of the first start, and of the others, in standard deviations


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussNewtonReconstruction(Reconstruction):
    """What Gauss–Newton found.

    Attributes:
        private: Values of the private parameters, by their names in `Observation.model`.
    """

    private: Mapping[str, Tensor] = field(repr=False)


@register_attack
@dataclass(frozen=True, kw_only=True)
class GaussNewton(Attack):
    """Nonlinear least squares for images, γ and β (or what else is private) at once.

    It needs auxiliary images, and a defense that the server can imitate. Any network that PyTorch can
    differentiate forward, and any batch. In several local steps γ and β are taken to change as ordinary
    parameters do, which is wrong where lock layers train. What the server fills in for private values is not
    used: they are drawn as clients draw theirs, from the operating system's randomness, so that results vary
    a little. Images come out with the scale that the auxiliary ones have.

    `Reconstruction.loss` is the mean squared residual: 1 for a gradient of zeros. What the components leave
    out of the image stays in it; a local minimum, which a restart may leave, has more.
    `Reconstruction.evaluations` counts iterations: each differentiates along every unknown that moves.

    Attributes:
        components: Principal components of an image, at most.
        iterations: At most, for each start.
        restarts: Starts; the one of least loss is returned. The first is at the mean image.
        draws: Imitated clients, whose private values give mean and standard deviation.

    Source:
        Levenberg 1944, Marquardt 1963. Its use against locks is this package's own.
    """

    title: ClassVar[str] = "Gauss–Newton"
    knows_locks: ClassVar[bool] = True
    type: Literal["gauss-newton"] = "gauss-newton"
    components: int = 512
    iterations: int = 80
    restarts: int = 1
    draws: int = 20

    def __post_init__(self) -> None:
        self._require(components=1, iterations=1, restarts=1, draws=2)

    @property
    def divisible(self) -> bool:
        """One prior serves all observations."""
        return False

    @property
    def needs(self) -> Needs:
        """Images of the server's own."""
        return Needs(own_images=_LEAST)

    def _check(self, observation: Observation) -> None:
        own = observation.own_data("GaussNewton", least=_LEAST)
        values = math.prod(observation.image_shape)
        if values > _LARGEST:
            raise AttackError(
                f"GaussNewton: expected images of at most {_LARGEST:,} numbers, got {values:,}. Use another "
                "attack, or smaller images."
            )
        if observation.free or observation.generate is not None:
            raise AttackError(
                "GaussNewton: it looks for the secrets by itself, as numbers: none may be free, granted "
                "along with its gradient, or trained by local steps. Leave out the arms that regress or "
                "grant the lock's gradient, and use one local step."
            )
        if order_matters(observation):
            raise AttackError(
                "GaussNewton: expected labels, or steps of all images: after steps of some, an update does "
                "not say which of them has which label. Grant the labels, or use the attack ig or dlg."
            )
        hidden = _private_names(observation)
        if hidden and own.draw is None:
            raise AttackError(
                "GaussNewton: expected auxiliary data with clients that draw γ and β as the defense does, "
                "got none that can. Give `Auxiliary.draw`."
            )
        parameters = dict(observation.model.named_parameters())
        unknowns = observation.batch_size * min(self.components, values)
        unknowns += sum(parameters[name].numel() for name in hidden)
        entries = unknowns * sum(tensor.numel() for tensor in observation.gradient.values())
        if unknowns > _LARGEST or entries > _MOST:
            raise AttackError(
                f"GaussNewton: expected at most {_LARGEST:,} unknowns and {_MOST:,} entries of the Jacobian, "
                f"got {unknowns:,} and {entries:,}. Use fewer components, a smaller batch, or another attack."
            )
        _check_forward(observation)

    def _run(
        self, observations: list[Observation], generators: list[torch.Generator], on_evaluation: Progress
    ) -> list[Reconstruction]:
        priors: dict[Auxiliary, _Priors] = {}
        found: list[Reconstruction] = []
        labels = known_labels(observations)
        for number, (observation, generator) in enumerate(zip(observations, generators, strict=True)):
            own = observation.own_data("GaussNewton", least=_LEAST)
            if own not in priors:
                priors = {own: self._priors(own, observation)}  # only the last: it is large
            problem = _Problem(observation, labels[number], priors[own])
            found.append(self._reconstruction(problem, observation, labels[number], generator))
            on_evaluation(number + 1, len(observations) - number - 1)
        return found

    def _priors(self, own: Auxiliary, observation: Observation) -> _Priors:
        images = own.images.double().cpu()
        mean, basis = prior.components(images, count=self.components)
        names = _private_names(observation)
        draws = [own.draw() for _ in range(self.draws)] if names and own.draw is not None else []
        drawn = {name: torch.stack([each[name].double().cpu() for each in draws]) for name in names}
        return _Priors(mean, basis, drawn)

    def _reconstruction(
        self, problem: _Problem, observation: Observation, labels: Labels, generator: torch.Generator
    ) -> Reconstruction:
        starts = [problem.start(generator, first=number == 0) for number in range(self.restarts)]
        fits = [
            anneal(problem.residuals, start, stages=problem.stages(), iterations=self.iterations)
            for start in starts
        ]
        chosen = min(range(len(fits)), key=lambda number: fits[number].misfit)
        images, private = problem.read(fits[chosen])
        return GaussNewtonReconstruction(
            images=images,
            labels=labels,
            scaling="clip",
            loss=fits[chosen].misfit,
            evaluations=fits[chosen].iterations,
            start=chosen,
            private=private,
        )


class _Priors(NamedTuple):
    """What the server knows beforehand: mean image, its components, and draws of private parameters."""

    mean: Tensor
    basis: Tensor
    drawn: Mapping[str, Tensor]


class _Private(NamedTuple):
    """A private parameter: mean and standard deviation of its entries, and which of them are not known."""

    mean: Tensor
    spread: Tensor
    unknown: Tensor

    def at(self, scores: Tensor) -> Tensor:
        """Its values, for the scores of the unknown entries."""
        places = self.unknown.flatten().nonzero().squeeze(1)
        values = self.mean.to(scores).flatten().index_add(0, places, self.spread.to(scores) * scores)
        return values.view(self.mean.shape)


class _Problem:
    """One observation's unknowns and residuals.

    A point holds the images' scores, image by image, then those of private parameters, each flattened.

    Args:
        observation: What the server has.
        labels: The batch's.
        priors: Of images and private parameters.
    """

    def __init__(self, observation: Observation, labels: Labels, priors: _Priors) -> None:
        self._shape = (observation.batch_size, *observation.image_shape)
        sizes = _sizes(observation)
        self._gradients = {
            dtype: _Gradients(observation, labels, sizes, dtype) for dtype in (torch.float64, torch.float32)
        }
        device = self._gradients[torch.float64].device
        self._mean, self._basis = priors.mean.to(device), priors.basis.to(device)
        support = read_structure(observation).support if observation.train_mode else {}
        self._private = {
            name: _private(drawn.to(device), support.get(name)) for name, drawn in priors.drawn.items()
        }
        self._lengths = [int(private.unknown.sum()) for private in self._private.values()]

    def residuals(self, point: Tensor) -> Tensor:
        """Differences from the observed gradient, each tensor's in units of its size."""
        images, private = self._parts(point)
        return self._gradients[point.dtype].residuals(images, private)

    def start(self, generator: torch.Generator, *, first: bool) -> Tensor:
        """The mean image and the mean secrets, nearly; or a draw from the priors."""
        scores = torch.randn(self._shape[0], self._basis.shape[1], generator=generator, dtype=torch.float64)
        scores[:, _COARSE:] = 0.0
        secrets = torch.randn(sum(self._lengths), generator=generator, dtype=torch.float64)
        parts = (
            (_STILL * scores.flatten(), 0 * secrets) if first else (_WIDE * scores.flatten(), _WIDE * secrets)
        )
        return torch.cat(parts).to(self._basis.device)

    def stages(self) -> list[Tensor]:
        """The unknowns to move: private ones, and more and more of the components."""
        batch, most = self._shape[0], self._basis.shape[1]
        private = batch * most + torch.arange(sum(self._lengths))
        sizes = [min(_COARSE, most)]
        while sizes[-1] < most:
            sizes.append(min(2 * sizes[-1], most))
        each = most * torch.arange(batch).unsqueeze(1)
        stages = [torch.cat([(each + torch.arange(size)).flatten(), private]) for size in sizes]
        return [stage.to(self._basis.device) for stage in stages]

    def read(self, fit: Fit) -> tuple[ImageBatch, dict[str, Tensor]]:
        """Images and private parameters at a point; NaN where nothing finite was found."""
        images, private = self._parts(fit.point)
        if not math.isfinite(fit.misfit):
            images = torch.full_like(images, torch.nan)
        return images.float(), {name: value.float() for name, value in private.items()}

    def _parts(self, point: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch, most = self._shape[0], self._basis.shape[1]
        scores, *secrets = torch.split(point, [batch * most, *self._lengths])
        images = self._mean.to(point) + scores.view(batch, most) @ self._basis.to(point).T
        private = {
            name: each.at(part) for (name, each), part in zip(self._private.items(), secrets, strict=True)
        }
        return images.view(self._shape), private


class _Gradients(GradientMatching):
    """The gradient that images and private parameters give, against the observed one."""

    silences = False  # networks that draw are refused

    def __init__(
        self, observation: Observation, labels: Labels, sizes: Mapping[str, float], dtype: torch.dtype
    ) -> None:
        super().__init__([observation], labels=[labels], dtype=dtype)
        self._target = labels.to(self.device)
        self._sizes = sizes
        self._goal = {
            name: (observation.gradient[name].double() / size).to(dtype) for name, size in sizes.items()
        }

    def residuals(self, images: ImageBatch, private: Mapping[str, Tensor]) -> Tensor:
        """Shape ``(entries,)``, in the dtype of the images."""
        known = {name: self._known.first(name) for name in self._known}
        buffers = {name: self._buffers.first(name) for name in self._buffers}
        observed = {name: self._observed.first(name) for name in self._observed}
        tensors = known | dict(private)
        update: Mapping[str, Tensor] = self._update(images, self._target, tensors, buffers, observed)
        return torch.cat(
            [(update[name] / size - self._goal[name]).flatten() for name, size in self._sizes.items()]
        )


def _check_forward(observation: Observation) -> None:
    """Differentiates once along a blank batch, which costs little beside the attack.

    Raises:
        AttackError: PyTorch cannot, or the network draws random numbers.
    """
    labels = torch.zeros(observation.batch_size, dtype=torch.long)
    gradients = _Gradients(observation, labels, _sizes(observation), torch.float32)
    blank = torch.zeros(observation.batch_size, *observation.image_shape, device=gradients.device)

    def residuals(point: Tensor) -> Tensor:
        return gradients.residuals(point.view(blank.shape), {})

    try:
        slopes(residuals, blank.flatten(), torch.zeros(1, dtype=torch.long, device=blank.device))
    except (RuntimeError, NotImplementedError) as error:
        raise AttackError(
            "GaussNewton: this network cannot be differentiated forward, or it draws random numbers, as "
            f"dropout does in train mode ({error}). Use another attack, or a network without."
        ) from error


def _sizes(observation: Observation) -> dict[str, float]:
    """Root mean square of every observed tensor that is not rounding."""
    squares = {name: float(tensor.double().square().sum()) for name, tensor in observation.gradient.items()}
    least = _SMALL * sum(squares.values())
    return {
        name: (square / observation.gradient[name].numel()) ** 0.5
        for name, square in sorted(squares.items())
        if square > least
    }


def _private_names(observation: Observation) -> list[str]:
    """Parameters that were not observed."""
    return [name for name, _ in observation.model.named_parameters() if name not in observation.gradient]


def _private(drawn: Tensor, support: Tensor | None) -> _Private:
    """Mean and spread of a private parameter, over all of its entries; known where all draws are the same.

    Args:
        drawn: Shape ``(draws, …)``.
        support: Where its rows of the gradient are not zero, if that was read off; shape ``(…)``.
    """
    every = torch.ones_like(drawn[0], dtype=torch.bool)
    if bool((drawn == drawn[0]).all()):
        return _Private(drawn[0], drawn.new_zeros(()), ~every)
    if support is None or not bool((drawn == 0).any()):
        return _Private(drawn.mean().expand_as(every), drawn.std(), every)
    values = drawn[drawn != 0]
    return _Private(values.mean() * support, values.std(), support)
