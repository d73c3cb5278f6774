"""The activations of lock layers, what each of them can represent, and their inverses there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["softplus", "relu", "sigmoid", "tanh", "identity"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda pre_activation: pre_activation,
}


@dataclass(frozen=True)
class Range:
    """An open interval of values, and the inverse of the activation there.

    ReLU also gives 0, but for every number below 0, and what starts there gets no gradient.
    """

    low: float
    high: float
    inverse: Callable[[Tensor], Tensor]
    text: str


RANGES: dict[Activation, Range] = {
    # log(exp(y) - 1), which neither overflows nor loses small y
    "softplus": Range(0.0, math.inf, lambda y: y + torch.log(-torch.expm1(-y)), "above 0"),
    "relu": Range(0.0, math.inf, lambda y: y, "above 0"),
    "sigmoid": Range(0.0, 1.0, torch.logit, "in (0, 1)"),
    "tanh": Range(-1.0, 1.0, torch.atanh, "in (−1, 1)"),
    "identity": Range(-math.inf, math.inf, lambda y: y, "finite"),
}


def represents(activation: Activation, values: Tensor) -> bool:
    """Whether some pre-activation gives each of the values; never for values that are not finite."""
    found = RANGES[activation]
    return bool(((values > found.low) & (values < found.high)).all())
