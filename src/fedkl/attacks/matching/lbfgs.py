"""L-BFGS over a batch of independent problems: own history, own line search, own stopping for each.

Gradient inversion runs many small problems, and each one alone keeps a machine idle. Here every evaluation
serves all problems that are still running, wherever each of them is in its own line search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(points of shape (running, d), their problem indexes) -> (values (running,), gradients (running, d))"""

_ARMIJO = 1e-4
_CURVATURE = 0.9
_SMALLEST_STEP = 1e-14


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """When a problem stops.

    Attributes:
        evaluations: Evaluations of the objective at most.
        value: Stop at or below this value.
        window: Stop where the value fell by less than the fraction `progress` over this many evaluations.
        progress: See `window`.
    """

    evaluations: int
    value: float = 0.0
    window: int = 400
    progress: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Minima:
    """Where the problems ended.

    Attributes:
        points: Best point of each problem, shape ``(problems, d)``.
        values: The objective there, shape ``(problems,)``; inf where no finite value was ever seen.
        evaluations: How many evaluations each problem used, shape ``(problems,)``.
    """

    points: Float[Tensor, "problems d"]
    values: Float[Tensor, " problems"]
    evaluations: Int64[Tensor, " problems"]


def minimize(
    objective: Objective,
    start: Float[Tensor, "problems d"],
    *,
    stopping: Stopping,
    history: int = 50,
    on_evaluation: Callable[[int, int], None] | None = None,
) -> Minima:
    """Minimizes every problem by L-BFGS with a weak Wolfe line search (bisection).

    Args:
        objective: Values and gradients of the problems still running.
        start: One starting point per problem.
        stopping: When a problem stops.
        history: Correction pairs that are kept.
        on_evaluation: Called with (evaluations so far, problems still running).

    Source:
        Byrd, Nocedal and Schnabel 1994, theorem 2.2 (compact representation); line search of Lewis and
        Overton 2013, algorithm 2.6.
    """
    problems = torch.arange(len(start), device=start.device)
    result = Minima(
        points=start.clone(), values=start.new_zeros(len(start)), evaluations=torch.zeros_like(problems)
    )
    state = _State(problems, start, *objective(start, problems), history=history)
    for count in range(2, stopping.evaluations + 1):
        if 2 * int(state.running.sum()) <= len(state.problems):
            state.write_to(result)
            state = state.take(state.running)
        index = state.running.nonzero().squeeze(1)
        if len(index) == 0:
            break
        trial = state.x[index] + state.step[index, None] * state.direction[index]
        state.advance(index, trial, *objective(trial, state.problems[index]))
        state.stop(stopping, count)
        if on_evaluation:
            on_evaluation(count, int(state.running.sum()))
    state.write_to(result)
    return result


class _State:
    """Problems side by side, one a row; `problems` are their numbers in the caller's order.

    The history is a ring of correction pairs, each scaled so that s·y = 1, which keeps the small matrices of
    the compact representation well-conditioned. `sy` and `yy` hold the products of all pairs, by slot.
    """

    def __init__(self, problems: Tensor, x: Tensor, f: Tensor, g: Tensor, *, history: int) -> None:
        rows, d = x.shape
        finite = torch.isfinite(f) & torch.isfinite(g).all(1)
        self.problems = problems
        self.x = x.clone()
        self.f = torch.where(finite, f, torch.inf)
        self.g = torch.where(finite[:, None], g, 0.0)
        self.running: Bool[Tensor, " rows"] = finite & (self.g != 0).any(1)
        self.evaluations = torch.ones_like(problems)
        self.s = x.new_zeros(rows, history, d)
        self.y = x.new_zeros(rows, history, d)
        self.sy = x.new_zeros(rows, history, history)
        self.yy = x.new_zeros(rows, history, history)
        self.pairs = torch.zeros_like(problems)  # accepted so far; the next goes to pairs % history
        self.scale = x.new_ones(rows)
        self.direction = x.new_zeros(rows, d)
        self.slope = x.new_zeros(rows)
        self.step = x.new_zeros(rows)
        self.low = x.new_zeros(rows)
        self.high = x.new_full((rows,), torch.inf)
        self.milestone = self.f.clone()  # the value at the start of the present stopping window
        self._new_directions(torch.arange(rows, device=x.device))

    def take(self, keep: Tensor) -> _State:
        """The state of some of the problems only."""
        taken = object.__new__(_State)
        taken.__dict__ = {name: tensor[keep] for name, tensor in self.__dict__.items()}
        return taken

    def write_to(self, result: Minima) -> None:
        result.points[self.problems] = self.x
        result.values[self.problems] = self.f
        result.evaluations[self.problems] = self.evaluations

    def advance(self, index: Tensor, trial: Tensor, f: Tensor, g: Tensor) -> None:
        """One step of every running problem's own line search, by what its trial point gave."""
        self.evaluations[index] += 1
        step, slope = self.step[index], self.slope[index]
        finite = torch.isfinite(f) & torch.isfinite(g).all(1)
        decreased = finite & (f <= self.f[index] + _ARMIJO * step * slope)
        flat = (g * self.direction[index]).sum(1) >= _CURVATURE * slope
        too_long, too_short = index[~decreased], index[decreased & ~flat]
        self.high[too_long] = self.step[too_long]
        self.low[too_short] = self.step[too_short]
        middle = (self.low[index] + self.high[index]) / 2
        self.step[index] = torch.where(torch.isfinite(middle), middle, 2 * step)
        accepted = decreased & flat
        self._accept(index[accepted], trial[accepted], f[accepted], g[accepted])
        # Where no step helps, the history misleads: forget it once; without one, this is the end.
        stuck = index[~accepted & (self.step[index] < _SMALLEST_STEP)]
        self.running[stuck[self.pairs[stuck] == 0]] = False
        self._forget(stuck)
        self._new_directions(stuck)

    def _forget(self, index: Tensor) -> None:
        for tensor in (self.s, self.y, self.sy, self.yy, self.pairs):
            tensor[index] = 0
        self.scale[index] = 1

    def stop(self, stopping: Stopping, count: int) -> None:
        self.running &= self.f > stopping.value
        if count % stopping.window == 0:
            self.running &= self.f < (1 - stopping.progress) * self.milestone
            self.milestone = self.f.clone()

    def _accept(self, index: Tensor, x: Tensor, f: Tensor, g: Tensor) -> None:
        s, y = x - self.x[index], g - self.g[index]
        curvature = (s * y).sum(1)
        good = curvature > 1e-300
        self._keep_pairs(index[good], s[good], y[good], curvature[good])
        self.x[index], self.f[index], self.g[index] = x, f, g
        self._new_directions(index)

    def _keep_pairs(self, rows: Tensor, s: Tensor, y: Tensor, curvature: Tensor) -> None:
        if len(rows) == 0:
            return
        self.scale[rows] = curvature / y.square().sum(1)
        root = curvature.sqrt()[:, None]
        slots = self.pairs[rows] % self.s.shape[1]
        self.s[rows, slots], self.y[rows, slots] = s / root, y / root
        new_y = torch.zeros_like(self.x)
        new_y[rows] = y / root
        # R holds old s with new y; what else is in the new row is left over, and below the diagonal.
        self.sy[rows, :, slots] = _times(self.s, new_y)[rows]
        products = _times(self.y, new_y)[rows]
        self.yy[rows, :, slots] = products
        self.yy[rows, slots, :] = products
        self.pairs[rows] += 1

    def _new_directions(self, index: Tensor) -> None:
        if len(index) == 0:
            return
        # For all rows at once: picking rows of the history would copy it.
        direction = -self._inverse_hessian_times_gradient()[index]
        slope = (direction * self.g[index]).sum(1)
        self.direction[index], self.slope[index] = direction, slope
        self.low[index], self.high[index] = 0.0, torch.inf
        size = self.g[index].abs().sum(1).clamp_min(1e-300)
        self.step[index] = torch.where(self.pairs[index] == 0, (1 / size).clamp_max(1.0), 1.0)
        self.running[index] &= slope < 0

    def _inverse_hessian_times_gradient(self) -> Tensor:
        """H g = c g + [S, c Y] [[R⁻ᵀ(D + c YᵀY)R⁻¹, −R⁻ᵀ], [−R⁻¹, 0]] [Sᵀg; c Yᵀg], with D = I here.

        R is the part of SᵀY on and above the diagonal, in order of age. Empty slots are zero: no effect.
        """
        history = self.s.shape[1]
        # The slots from the oldest pair to the newest; in a ring that is not full, empty ones come first.
        order = (self.pairs[:, None] + torch.arange(history, device=self.pairs.device)) % history
        by_age = order[:, :, None].expand(-1, -1, history)
        sy = self.sy.gather(1, by_age).gather(2, by_age.transpose(1, 2))
        yy = self.yy.gather(1, by_age).gather(2, by_age.transpose(1, 2))
        upper = sy.triu()
        empty = upper.diagonal(dim1=1, dim2=2) == 0
        upper = upper + torch.diag_embed(empty.to(upper.dtype))
        scale = self.scale[:, None]
        along_s = _times(self.s, self.g).gather(1, order)
        along_y = scale * _times(self.y, self.g).gather(1, order)
        w = torch.linalg.solve_triangular(upper, along_s[:, :, None], upper=True)
        middle = w + scale[:, :, None] * (yy @ w) - along_y[:, :, None]
        v = torch.linalg.solve_triangular(upper.transpose(1, 2), middle, upper=False)
        back = torch.zeros_like(along_s)
        from_s = back.scatter(1, order, v.squeeze(2))
        from_y = back.scatter(1, order, w.squeeze(2))
        combined = _combine(self.s, from_s) - scale * _combine(self.y, from_y)
        return scale * self.g + combined


def _times(vectors: Tensor, g: Tensor) -> Tensor:
    """Each row's products of its history's vectors with one vector: (r, h, d), (r, d) → (r, h)."""
    return torch.bmm(vectors, g[:, :, None]).squeeze(2)


def _combine(vectors: Tensor, coefficients: Tensor) -> Tensor:
    """Each row's linear combination of its history's vectors."""
    return torch.bmm(coefficients[:, None, :], vectors).squeeze(1)
