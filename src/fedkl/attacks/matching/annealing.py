"""Nonlinear least squares with a Gaussian prior: Levenberg and Marquardt's method under falling noise.

Sought are unknowns t, standard normal beforehand, whose residuals r(t) are known to be small. With residuals
taken for noise of standard deviation s, the most probable t has the least ‖r / s‖² + ‖t‖². At large s that is
close to the prior's mean and easy to find. So s begins there and is halved, each time from where the last one
led; and the unknowns that matter least are left at 0 until the others cannot explain the residuals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Residuals = Callable[[Tensor], Tensor]
"""Unknowns of shape (n,) -> residuals of shape (m,), in the unknowns' dtype; differentiable forward."""

_FIRST, _LAST, _COOLING = 10.0, 1e-6, 0.5  # s, in units of the residuals
_GAIN = 0.1  # share of the objective below which a step's gain says: go on to the next s
_EXPLAINED = 0.7  # residuals above this share of s call for more unknowns
_DAMPING, _LEAST_DAMPING = 1e-3, 1e-8
_TRIES = 6
_CHUNK = 32  # directions differentiated at once


class Fit(NamedTuple):
    """Where it ended.

    Attributes:
        point: The unknowns, float64.
        misfit: Mean squared residual; inf where it is not finite.
        iterations: How many were used.
    """

    point: Float[Tensor, " n"]
    misfit: float
    iterations: int


def anneal(
    residuals: Residuals,
    start: Float[Tensor, " n"],
    *,
    stages: Sequence[Int64[Tensor, " _"]],
    iterations: int,
) -> Fit:
    """The unknowns that explain the residuals, as far as the iterations go.

    It ends where the residuals are as small as rounding leaves them, or can be made no smaller.

    Args:
        residuals: In units of what they are to explain: all unknowns at 0 give residuals of about 1. Called
            with float64, and for derivatives with float32.
        start: Where to begin, float64.
        stages: Indexes of the unknowns to move: at first, and after each time that these were too few.
        iterations: At most so many.
    """
    point, stage, noise, damping = start, 0, _FIRST, 10 * _DAMPING
    used = 0
    while used < iterations:
        used += 1
        point, gain, damping = _step(residuals, point, stages[stage], noise=noise, damping=damping)
        if gain >= _GAIN:
            continue
        size = _mean_square(residuals(point)) ** 0.5
        if size > _EXPLAINED * noise and stage + 1 < len(stages):
            stage, damping = stage + 1, _DAMPING
        elif size > noise or noise < _LAST:
            break
        else:
            noise, damping = noise * _COOLING, min(damping, _DAMPING)
    return Fit(point, _mean_square(residuals(point)), used)


def _step(
    residuals: Residuals, point: Tensor, moved: Tensor, *, noise: float, damping: float
) -> tuple[Tensor, float, float]:
    """The next point, the share of the objective that it gains, and the next damping."""
    missed, slope = residuals(point), slopes(residuals, point, moved)
    normal = (slope @ slope.T).double() / noise**2
    normal.diagonal().add_(1.0)
    right = (slope @ missed.to(slope)).double() / noise**2 + point[moved]
    before = _objective(point, missed, noise=noise)
    for _ in range(_TRIES):
        damped = normal.clone()
        damped.diagonal().mul_(1 + damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            step = torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)
            there = point.index_add(0, moved, -step)
            after = _objective(there, residuals(there), noise=noise)
            if after < before:
                return there, (before - after) / before, max(damping / 10, _LEAST_DAMPING)
        damping *= 10
    return point, 0.0, damping


def _objective(point: Tensor, missed: Tensor, *, noise: float) -> float:
    return _number((missed / noise).square().sum() + point.square().sum())


def slopes(residuals: Residuals, point: Tensor, moved: Tensor) -> Float[Tensor, "moved m"]:
    """∂r/∂t of the unknowns that move. In float32: that decides how fast it goes, not where to.

    Args:
        residuals: As in `anneal`.
        point: Where.
        moved: Indexes of the unknowns.

    Raises:
        RuntimeError: The residuals cannot be differentiated forward, or draw random numbers.
    """
    at = point.float()

    def along(place: Tensor) -> Tensor:
        direction = torch.zeros_like(at).index_fill(0, place.unsqueeze(0), 1.0)
        slope: Tensor = torch.func.jvp(residuals, (at,), (direction,))[1]
        return slope

    several = torch.vmap(along)
    found = at.new_empty(len(moved), len(residuals(at)))  # filled in place: it is large
    for begin in range(0, len(moved), _CHUNK):
        found[begin : begin + _CHUNK] = several(moved[begin : begin + _CHUNK])
    return found


def _mean_square(values: Tensor) -> float:
    return _number(values.double().square().mean())


def _number(value: Tensor) -> float:
    """Infinite where it is NaN, which is then never the lesser."""
    return math.inf if bool(value.isnan()) else float(value)
