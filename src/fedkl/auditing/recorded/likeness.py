"""Whether an update looks like those of clients that are played: in direction, sign and size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CLIENTS = 160
"""How many played clients a comparison takes: a quarter for a mean direction, half for how features spread,
a quarter for how far clients lie from that."""

_LEAST = 1e-4  # of an update's norm: tensors below are rounding errors
_SPREAD = 1e-3  # the least standard deviation of a feature
_RIDGE, _SIGN_RIDGE = 0.05, 0.1
_EXACT = 1e-6  # a ridge below which inner products are fixed, but for rounding
_MARGIN, _EXACT_MARGIN = 2.0, 5.0  # at least so many times the farthest client that was kept apart
_SIGN_MARGIN = 1.5
_UNCLEAR, _REVERSED = 0.25, -0.5  # of a sign's score, 1 on average: an alarm takes more


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What one update is, beside played clients.

    Attributes:
        distance: How far it lies from them; above 1, it is none of theirs. Neither its size nor, mostly, its
            sign has a part in it.
        sign: Whether it points where theirs do.
        factor: Its size over the median of theirs.
        odd_size: Whether none of theirs is so small or so large.
    """

    distance: float
    sign: Literal["right", "reversed", "unclear"]
    factor: float
    odd_size: bool

    @property
    def fits(self) -> bool:
        """Whether it looks like one of theirs, whatever its size."""
        return self.distance <= 1


class Likeness:
    """What the updates of clients who do the same have in common.

    Two distances from the mean client, each in a unit that lies beyond the farthest client that was kept
    apart. The first is of three features a tensor that do not depend on the update's size: its cosine with
    the weights, its cosine with the clients' mean direction, its norm among the other tensors' norms. The
    second is of the tensors' inner products with the weights, of which a network fixes some whatever the
    images are: that of a layer before a norm with the batch's statistics is zero, and layers with a ReLU
    between them have the same one. So its directions without spread count most.

    Args:
        clients: Their updates by name, all with the same names; looked at one after the other.
        count: How many there are; at least 40.
        weights: The base weights, by the same names.
    """

    def __init__(
        self, clients: Iterable[Mapping[str, Tensor]], *, count: int, weights: Mapping[str, Tensor]
    ) -> None:
        self._weights = {name: tensor.flatten().double() for name, tensor in weights.items()}
        self._mean = {name: torch.zeros_like(tensor) for name, tensor in self._weights.items()}
        sizes, rows, quarter = [], [], count // 4
        for number, client in enumerate(clients):
            sizes.append(_size(client))
            if number < quarter:
                for name, total in self._mean.items():
                    total += _unit(client[name].flatten().double())
                continue
            if number == quarter:
                self._mean = {name: _unit(total) for name, total in self._mean.items()}
            rows.append(self._features(client))
        looks, products, odd = (torch.stack(each) for each in zip(*rows, strict=True))
        known = 2 * quarter
        self._looks = _Distance(looks[:known], looks[known:], least=_SPREAD, ridge=_RIDGE, margin=_MARGIN)
        self._products = _Distance(
            products[:known], products[known:], least=1.0, ridge=_EXACT, margin=_EXACT_MARGIN
        )
        self._direction = _discriminant(odd[:known])
        self._signs = odd @ self._direction
        self._sizes = torch.tensor(sizes).log()

    def compare(self, update: Mapping[str, Tensor]) -> Comparison:
        """Holds an update beside the clients' own.

        Args:
            update: Finite and not all zero.
        """
        looks, products, odd = self._features(update)
        size, center = math.log(_size(update)), float(self._sizes.median())
        low, high = self.factors
        return Comparison(
            distance=max(self._looks.of(looks), self._products.of(products)),
            sign=self._sign(odd),
            factor=math.exp(size - center),
            odd_size=not low <= math.exp(size - center) <= high,
        )

    @property
    def factors(self) -> tuple[float, float]:
        """Between which factors sizes are not odd: one within them cannot be told from one update."""
        room = (self._sizes.max() - self._sizes.min()) / 2
        ends = (self._sizes.min() - room, self._sizes.max() + room)
        low, high = (math.exp(float(end - self._sizes.median())) for end in ends)
        return low, high

    def _features(self, update: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the first distance, those of the second, and those that change their sign with it."""
        least = _LEAST * _size(update)
        along, common, norms, products, skews, means = [], [], [], [], [], []
        for name, weight in self._weights.items():
            tensor = update[name].flatten().double()
            norm = tensor.norm() + least
            scaled = tensor / norm * math.sqrt(len(tensor))
            third = scaled.pow(3).mean()
            along.append(tensor @ _unit(weight) / norm)
            common.append(tensor @ self._mean[name] / norm)
            norms.append(norm.log())
            products.append(tensor @ weight)
            skews.append(third.sign() * third.abs().log1p())
            means.append(scaled.mean())
        profile, product = torch.stack(norms), torch.stack(products)
        looks = torch.cat([torch.stack([*along, *common]), profile - profile.mean()])
        odd = torch.stack([*along, *common, *skews, *means])
        return looks, product / (product.abs().sum() + least), odd

    def _sign(self, odd: Tensor) -> Literal["right", "reversed", "unclear"]:
        """Reversed: as none of the clients' own updates is, and clearly so."""
        score, worst = float(odd @ self._direction), float(self._signs.min())
        if score < min(_REVERSED, _SIGN_MARGIN * worst):
            return "reversed"
        return "right" if score > max(_UNCLEAR, -worst) else "unclear"


class _Distance:
    """A Mahalanobis distance from known points.

    Its unit lies beyond the farthest of the points that were kept apart, by half of the way, in logarithms,
    from their median to it, and at least `margin` times as far: a heavy tail reaches farther than was seen.
    """

    def __init__(self, known: Tensor, apart: Tensor, *, least: float, ridge: float, margin: float) -> None:
        self._center = known.mean(0)
        self._spread = known.std(0).clamp_min(least)
        scaled = (known - self._center) / self._spread
        values, self._vectors = torch.linalg.eigh(scaled.T @ scaled / len(scaled))
        self._values = values.clamp_min(0) + ridge
        self._unit = 1.0
        distances = torch.tensor([self.of(each) for each in apart])
        farthest = float(distances.max())
        self._unit = farthest * max(margin, (farthest / float(distances.median())) ** 0.5)

    def of(self, features: Tensor) -> float:
        turned = self._vectors.T @ ((features - self._center) / self._spread)
        return float((turned.square() / self._values).mean()) / self._unit


def _discriminant(odd: Tensor) -> Tensor:
    """Fisher's, between points and their negatives: about 1 at the points."""
    spread = odd.square().mean(0).sqrt().clamp_min(_SPREAD)
    scaled = odd / spread
    center = scaled.mean(0)
    within = (scaled - center).T @ (scaled - center) / len(scaled)
    direction: Tensor = torch.linalg.solve(within + _SIGN_RIDGE * torch.eye(len(center)).double(), center)
    return direction / (direction @ center).clamp_min(1e-12) / spread


def _size(update: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))


def _unit(tensor: Tensor) -> Tensor:
    scaled: Tensor = tensor / tensor.norm().clamp_min(1e-12)
    return scaled
