"""The search in one dimension for the factor that a norm above another block lost."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_VALLEYS = 3
_SEARCH = {"maxiter": 10, "xatol": 1e-6}


def minimum(misfit: Callable[[float], float], low: float, high: float, *, points: int = 0) -> float:
    """Where a misfit is least: by Brent's method, around the lowest valleys of a grid if it has points.

    A valley is narrow, and a wrong one, where much is saturated, can look lower on the grid.

    Args:
        misfit: Smooth, and about parabolic near its minimum.
        low: Where the search begins.
        high: Where it ends.
        points: Of the grid; 0: the misfit has one valley between the ends.

    Returns:
        The position of the least misfit that was found.
    """
    from scipy import optimize  # takes a while to import

    brackets = [(low, high)]
    if points:
        grid = torch.linspace(low, high, points).tolist()
        values = [math.inf, *(misfit(position) for position in grid), math.inf]
        valleys = [i for i in range(points) if values[i + 1] <= min(values[i], values[i + 2])]
        valleys = sorted(valleys, key=lambda i: values[i + 1])[:_VALLEYS]
        brackets = [(grid[max(i - 1, 0)], grid[min(i + 1, points - 1)]) for i in valleys]
    found = [
        optimize.minimize_scalar(misfit, bounds=bracket, method="bounded", options=_SEARCH)
        for bracket in brackets
    ]
    best = min(found, key=lambda result: float(result.fun))
    return float(best.x)
