"""Activations that an attacker can go back through: one-to-one functions of each value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True, eq=False)
class Activation:
    """h = act(z), seen from its output.

    Attributes:
        name: As in PyTorch.
        inverse: z from h.
        slope: act′(z) from h.
        low: Greatest lower bound of h.
        high: Least upper bound of h.
    """

    name: str
    inverse: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    low: float
    high: float

    def undo(self, h: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Z and act′(z). What lies outside the range, by rounding, is put just inside it.

        Args:
            h: Outputs, float64.
        """
        inside = h.clamp(self.low + _MARGIN, self.high - _MARGIN)
        return self.inverse(inside), self.slope(inside)


_MARGIN = 1e-9
_INFINITY = float("inf")


def sigmoid() -> Activation:
    """Z = log h / (1 − h)."""
    return Activation(name="sigmoid", inverse=torch.logit, slope=lambda h: h * (1 - h), low=0.0, high=1.0)


def tanh() -> Activation:
    """Z = artanh h."""
    return Activation(name="tanh", inverse=torch.atanh, slope=lambda h: 1 - h.square(), low=-1.0, high=1.0)


def leaky_relu(negative_slope: float = 0.01) -> Activation:
    """Z = h, or h / a where h < 0."""
    return Activation(
        name="leaky_relu",
        inverse=lambda h: torch.where(h < 0, h / negative_slope, h),
        slope=lambda h: torch.where(h < 0, negative_slope, 1.0).to(h),
        low=-_INFINITY,
        high=_INFINITY,
    )


def elu(alpha: float = 1.0) -> Activation:
    """Z = h, or log(1 + h / α) where h < 0."""
    return Activation(
        name="elu",
        inverse=lambda h: torch.where(h < 0, torch.log1p(h.clamp(max=0) / alpha), h),
        slope=lambda h: torch.where(h < 0, h + alpha, 1.0),
        low=-alpha,
        high=_INFINITY,
    )


def softplus(beta: float = 1.0) -> Activation:
    """Z = h + log(1 − e^(−βh)) / β."""
    return Activation(
        name="softplus",
        inverse=lambda h: h + torch.log(-torch.expm1(-beta * h)) / beta,
        slope=lambda h: -torch.expm1(-beta * h),
        low=0.0,
        high=_INFINITY,
    )


def identity() -> Activation:
    """Z = h."""
    return Activation(
        name="identity", inverse=lambda h: h, slope=torch.ones_like, low=-_INFINITY, high=_INFINITY
    )


def _leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    return leaky_relu(negative_slope)


def _elu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Activation:
    return elu(alpha)


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Activation:
    return softplus(beta)


INVERTIBLE: dict[Any, Callable[..., Activation]] = {
    torch.sigmoid: lambda x: sigmoid(),
    Tensor.sigmoid: lambda x: sigmoid(),
    torch.tanh: lambda x: tanh(),
    Tensor.tanh: lambda x: tanh(),
    F.leaky_relu: _leaky_relu,
    F.elu: _elu,
    F.softplus: _softplus,
}
"""By the function that PyTorch calls: the activation, from that call's arguments."""
