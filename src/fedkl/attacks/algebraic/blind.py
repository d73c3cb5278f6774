"""The blind top: a convolution's input and output gradient from ∂L/∂W alone, where the head stays private.

Without the head's gradient neither h nor δ = ∂L/∂u of the last convolution is known. But its own gradient is
bilinear in the two,

    ∂L/∂W_oik = Σ_p δ_op h_i,q(p,k)        one equation per weight
    ∂L/∂b_o   = Σ_p δ_op                   fixes the factor that δ and h could exchange

and mostly has more entries than δ and h have values. Alternating least squares comes near from any start;
Levenberg–Marquardt finishes. No label and nothing of the head is used: that it is private does not help.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedkl.attacks.algebraic.convolution import ConvolutionSystem

LARGEST = 5000
"""Unknowns that the dense normal equations are built for."""

_ALTERNATIONS = 30
_STEPS = 80
_RIDGE = 1e-6
_SETTLED = 1e-9
_HOPELESS = 1e12
_BIAS_WEIGHT = 10.0


class BlindTop(NamedTuple):
    """What solves the two relations.

    Attributes:
        delta: ∂L/∂u, shape ``(out, positions)``.
        input: H, shape ``(in, places)``.
        variance: Of the input's error, same shape.
        misfit: Squared error of all equations, relative to the size of the gradient.
    """

    delta: Tensor
    input: Tensor
    variance: Tensor
    misfit: float


def solved(
    system: ConvolutionSystem,
    gradient: Float[Tensor, "outputs inputs kernel"],
    bias: Float[Tensor, " outputs"],
    *,
    generator: torch.Generator,
    starts: int,
    enough: float = 1e-12,
) -> BlindTop:
    """Solves from several random starts until one fits; the best of them.

    Args:
        system: The convolution.
        gradient: ∂L/∂W.
        bias: ∂L/∂b.
        generator: Of the starts.
        starts: At most this many.
        enough: The misfit with which no more are tried.
    """
    size = gradient.norm()
    problem = _Bilinear(system, gradient / size, bias / size)
    best: BlindTop | None = None
    for _ in range(starts):
        noise = torch.randn(system.inputs, system.places, generator=generator, dtype=torch.float64)
        found = problem.descend(*problem.alternate(torch.sigmoid(0.3 * noise)))
        if best is None or found.misfit < best.misfit:
            best = found
        if best.misfit < enough:
            break
    if best is None:
        raise ArithmeticError("No start was tried.")
    return best._replace(delta=best.delta * size)


class _Bilinear:
    """The equations for one gradient, scaled to size 1."""

    def __init__(self, system: ConvolutionSystem, gradient: Tensor, bias: Tensor) -> None:
        self._system = system
        self._gradient, self._bias = gradient, bias
        kernel, self._positions = system.reads.shape
        self._shape = (system.outputs, system.inputs, kernel)

    def alternate(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """δ and h by turns, each linear in the other; the pull towards 0.5 fades."""
        delta = self._delta(h)
        for step in range(_ALTERNATIONS):
            ridge = _RIDGE * 10 ** (-step / 10)
            backward = self._system.backward(delta).flatten(0, 1)
            target = self._gradient.permute(0, 2, 1).reshape(-1, self._shape[1])
            normal = backward.T @ backward
            normal.diagonal().add_(ridge)
            h = torch.linalg.solve(normal, backward.T @ target + 0.5 * ridge).T
            delta = self._delta(h)
        return delta, h

    def _delta(self, h: Tensor) -> Tensor:
        read = torch.cat([self._read(h), h.new_full((1, self._positions), _BIAS_WEIGHT)])
        target = torch.cat([self._gradient.flatten(1).T, _BIAS_WEIGHT * self._bias.unsqueeze(0)])
        normal = read.T @ read
        normal.diagonal().add_(_RIDGE)
        delta: Tensor = torch.linalg.solve(normal, read.T @ target).T
        return delta

    def descend(self, delta: Tensor, h: Tensor) -> BlindTop:
        """Levenberg–Marquardt on both at once."""
        damping, value = 1e-2, self._value(delta, h)
        for _ in range(_STEPS):
            normal, slope = self._normal(delta, h)
            step = None
            while step is None and damping < _HOPELESS:
                step = self._step(normal, slope, damping, delta, h, value)
                damping *= 4
            if step is None:
                break
            damping = max(damping / 20, 1e-14)
            delta, h, before = step[0], step[1], value
            value = self._value(delta, h)
            if value > before * (1 - _SETTLED):
                break
        return BlindTop(delta, h, self._variance(delta, h, value), value)

    def _step(
        self, normal: Tensor, slope: Tensor, damping: float, delta: Tensor, h: Tensor, value: float
    ) -> tuple[Tensor, Tensor] | None:
        """The damped step, if it lowers the misfit."""
        damped = normal.clone()
        diagonal = normal.diagonal()
        damped.diagonal().add_(damping * diagonal.clamp_min(float(diagonal.max()) * 1e-12))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed):
            return None
        step = torch.cholesky_solve(-slope.unsqueeze(1), factor).squeeze(1)
        new = (delta + step[: delta.numel()].view_as(delta), h + step[delta.numel() :].view_as(h))
        return new if self._value(*new) < value else None

    def _normal(self, delta: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """JᵀJ and Jᵀr, of δ first."""
        outputs, inputs, kernel = self._shape
        read, backward = self._read(h), self._system.backward(delta)
        own = torch.kron(torch.eye(outputs).to(h), read.T @ read + 1.0)
        below = torch.kron(torch.eye(inputs).to(h), torch.einsum("okq,okr->qr", backward, backward))
        mixed = torch.einsum("ikp,okq->opiq", read.view(inputs, kernel, -1), backward)
        mixed = mixed.reshape(len(own), len(below))
        missed, bias = self._residuals(delta, h)
        slopes = (missed.flatten(1) @ read + bias.unsqueeze(1), torch.einsum("oik,okq->iq", missed, backward))
        normal = torch.cat([torch.cat([own, mixed], 1), torch.cat([mixed.T, below], 1)])
        return normal, torch.cat([slope.flatten() for slope in slopes])

    def _variance(self, delta: Tensor, h: Tensor, value: float) -> Tensor:
        """Of h, as of any least-squares solution; float32 rounding of the gradient is in the misfit."""
        normal, _ = self._normal(delta, h)
        normal.diagonal().add_(float(normal.diagonal().max()) * 1e-14)
        factor, failed = torch.linalg.cholesky_ex(normal)
        if bool(failed):
            raise ArithmeticError("The blind top leaves its input open.")
        spare = max(self._gradient.numel() + len(self._bias) - len(normal), 1)
        inverse = torch.cholesky_inverse(factor).diagonal()[delta.numel() :]
        return inverse.view_as(h) * (value / spare)

    def _value(self, delta: Tensor, h: Tensor) -> float:
        return sum(float(part.square().sum()) for part in self._residuals(delta, h))

    def _residuals(self, delta: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        missed = (delta @ self._read(h).T).view(self._shape) - self._gradient
        return missed, delta.sum(1) - self._bias

    def _read(self, h: Tensor) -> Tensor:
        """What each weight is multiplied with: shape ``(in × kernel, positions)``."""
        padded = torch.cat([h, h.new_zeros(len(h), 1)], 1)
        return padded[:, self._system.padded_reads].flatten(0, 1)
