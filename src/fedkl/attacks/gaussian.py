"""A Gaussian prior from examples: their mean, their principal components, and what these leave out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_LEAST = 1e-8  # share of the mean variance: no value is known exactly beforehand


def cholesky(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The lower factor of a symmetric positive definite matrix.

    Raises:
        ArithmeticError: It is none, or not finite: a failure of one image, not of the whole audit.
    """
    found: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(matrix)
    if bool(found[1]):
        raise ArithmeticError("not positive definite")
    return found[0]


class Posterior(NamedTuple):
    """What the prior and the observations say together.

    Attributes:
        scores: Means of the components' scores, shape ``(components,)``.
        spread: A square root of the values' covariance within the components, shape ``(values, components)``.
    """

    scores: Tensor
    spread: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaussian:
    """V = mean + basis s + rest, where the scores s are standard normal and the rest is independent.

    Attributes:
        mean: Shape ``(values,)``.
        basis: Shape ``(values, components)``, the strongest component first.
        rest: Variance of what the components leave out, shape ``(values,)``.
        directions: Takes deviations from the mean to scores, shape ``(components, values)``.
    """

    mean: Tensor = field(repr=False)
    basis: Tensor = field(repr=False)
    rest: Tensor = field(repr=False)
    directions: Tensor = field(repr=False)

    @classmethod
    def of(cls, examples: Float[Tensor, "examples values"], *, components: int) -> Gaussian:
        """The one that examples have, with at most so many components.

        Args:
            examples: At least two.
            components: Fewer where the examples span fewer.
        """
        mean = examples.mean(0)
        deviations = (examples - mean) / len(examples) ** 0.5
        wide = deviations.shape[0] < deviations.shape[1]
        gram = deviations @ deviations.T if wide else deviations.T @ deviations
        power, vectors = torch.linalg.eigh(gram)
        strong = torch.arange(len(power) - 1, -1, -1)[:components]
        strong = strong[power[strong] > power[-1].clamp_min(1e-300) * 1e-10]
        root, vectors = power[strong].sqrt(), vectors[:, strong]
        basis = deviations.T @ vectors if wide else vectors * root
        rest = deviations.square().sum(0) - basis.square().sum(1)
        least = _LEAST * deviations.square().sum(0).mean().clamp_min(1e-300)
        directions = basis.T / root.square().unsqueeze(1)
        return cls(mean=mean, basis=basis, rest=rest.clamp_min(least), directions=directions)

    @property
    def variance(self) -> Float[Tensor, " values"]:
        """Of every value."""
        return self.basis.square().sum(1) + self.rest

    def strongest(self, components: int) -> Gaussian:
        """The same with fewer components, and more in the rest."""
        lost = self.basis[:, components:].square().sum(1)
        return Gaussian(
            mean=self.mean,
            basis=self.basis[:, :components],
            rest=self.rest + lost,
            directions=self.directions[:components],
        )

    def values(self, scores: Float[Tensor, "*many components"]) -> Float[Tensor, "*many values"]:
        """The values that have these scores."""
        return self.mean + scores @ self.basis.T

    def scores(self, values: Float[Tensor, "many values"]) -> Float[Tensor, "many components"]:
        """The scores of values."""
        return (values - self.mean) @ self.directions.T

    def posterior(self, precision: Float[Tensor, " values"], pull: Float[Tensor, " values"]) -> Posterior:
        """After each value was observed by itself, with Gaussian errors; that of the rest is to be in them.

        By Woodbury's identity in the components, not in the values.

        Args:
            precision: 1 / variance of the errors, the rest's included; 0 where nothing was observed.
            pull: Precision × what was observed.

        Raises:
            ArithmeticError: A number is not finite, or too large for the others.
        """
        normal = (self.basis.T * precision) @ self.basis
        normal.diagonal().add_(1)
        factor = cholesky(normal)
        right = self.basis.T @ (pull - precision * self.mean)
        scores = torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)
        return Posterior(scores, torch.linalg.solve_triangular(factor, self.basis.T, upper=False).T)
