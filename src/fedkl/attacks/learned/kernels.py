"""Kernel ridge regression on several views of the same things, chosen on held-out examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedkl.errors import AttackError

_WIDTHS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the kernel, in units of the median squared distance
_RIDGES = (1e-5, 1e-3, 1e-1)
_LARGEST_RIDGE = 1.0
_LEAST_DISTANCE = 1e-3  # smaller ones are rounding
_DIRECTIONS = 32  # random ones, along which targets are compared while views are chosen
_RANKED_ON = 500  # examples, for views alone
_COMPARED_ON = 1000  # for unions of views
_SKETCH = 4096  # numbers that a longer vector is hashed to


@dataclass(frozen=True, kw_only=True, eq=False)
class Views:
    """Vectors by name, some per update and some per image of it, as `of` makes them: directions only.

    Attributes:
        per_update: Shape ``(updates, at most 4,096)``, of length 1.
        per_image: Shape ``(updates × batch, at most 4,096)``, of length 1.
        batch: Images of an update.
    """

    per_update: Mapping[str, Tensor] = field(repr=False)
    per_image: Mapping[str, Tensor] = field(repr=False)
    batch: int

    @classmethod
    def of(cls, *, per_update: Mapping[str, Tensor], per_image: Mapping[str, Tensor], batch: int) -> Views:
        """The views of vectors of any length and norm."""
        lots = (
            {name: _direction(_sketched(vectors)) for name, vectors in lot.items()}
            for lot in (per_update, per_image)
        )
        return cls(per_update=next(lots), per_image=next(lots), batch=batch)

    @classmethod
    def joined(cls, parts: list[Views]) -> Views:
        """The views of several lots of updates as one; the list is emptied: there may be no room for two."""
        batch = parts[0].batch
        lots: tuple[dict[str, list[Tensor]], ...] = ({}, {})
        while parts:
            part = parts.pop(0)
            for lot, tensors in zip(lots, (part.per_update, part.per_image), strict=True):
                for name, rows in tensors.items():
                    lot.setdefault(name, []).append(rows)
        per_update, per_image = ({name: torch.cat(lot.pop(name)) for name in list(lot)} for lot in lots)
        return cls(per_update=per_update, per_image=per_image, batch=batch)

    @property
    def names(self) -> tuple[str, ...]:
        """All views, those per image first."""
        return (*self.per_image, *self.per_update)

    def __len__(self) -> int:
        return self.batch * len(next(iter(self.per_update.values())))

    def part(self, start: int, stop: int) -> Views:
        """The views of the updates from `start` to before `stop`."""
        each = slice(start * self.batch, stop * self.batch)
        return replace(
            self,
            per_update={name: rows[start:stop] for name, rows in self.per_update.items()},
            per_image={name: rows[each] for name, rows in self.per_image.items()},
        )

    def distances(self, others: Views, names: Sequence[str]) -> Float[Tensor, "own others"]:
        """Squared distances between the images of these and of others' updates, as mean over views; 0 to 4.

        Matrices as large as the fitted one are not kept for every view: there may be dozens.
        """
        total = torch.zeros(len(self), len(others), device=next(iter(self.per_update.values())).device)
        for name in names:
            if name in self.per_image:
                total += _distances(self.per_image[name], others.per_image[name])
            else:
                between = _distances(self.per_update[name], others.per_update[name])
                total += between.repeat_interleave(self.batch, 0).repeat_interleave(others.batch, 1)
        return total / len(names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Regression:
    """exp(−d² / width) against fitted weights, where d² is the mean over some views.

    Attributes:
        names: The views that count.
        width: Of the kernel.
        ridge: Added to its diagonal.
        mean: Of the targets.
        weights: Shape ``(examples, target)``.
        error: Squared error on the held-out examples, relative to that of the mean.
    """

    names: tuple[str, ...]
    width: float
    ridge: float
    mean: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    error: float

    def __call__(self, known: Views, asked: Views) -> Float[Tensor, "asked target"]:
        """Targets of other updates' images.

        Args:
            known: The examples that it was fitted on.
            asked: The other updates.
        """
        squared = asked.distances(known, self.names)
        return ((-squared / self.width).exp().double() @ self.weights).float() + self.mean


def best_regression(
    known: Views,
    targets: Float[Tensor, "examples target"],
    probes: Views,
    truth: Float[Tensor, "probes target"],
    *,
    like: Regression | None = None,
) -> Regression:
    """Fits on known examples what does best on the held-out ones.

    Views are ranked by how they do alone; then unions of the best 1, 2, 4, … are compared. Both are done on a
    part of the examples; the weights are then fitted on all.

    Args:
        known: The examples.
        targets: What they are about.
        probes: Held-out examples.
        truth: What those are about.
        like: A regression on examples of the same kind, whose views, width and ridge are taken over.
    """
    mean = targets.mean(0)
    y, y_probes = targets - mean, truth - mean
    directions = torch.randn(y.shape[1], _DIRECTIONS, generator=torch.Generator().manual_seed(0)).to(y)
    short, short_probes = y @ directions, y_probes @ directions

    def searched(names: Sequence[str], examples: int) -> tuple[float, float, float]:
        part = known.part(0, -(-examples // known.batch))
        there = slice(len(part))
        return _searched(
            part.distances(part, names), probes.distances(part, names), short[there], short_probes
        )

    if like is None:
        alone = {name: searched([name], _RANKED_ON)[0] for name in known.names}
        ranked = sorted(alone, key=lambda name: alone[name])
        sizes = sorted({min(2**power, len(ranked)) for power in range(len(ranked).bit_length() + 1)})
        unions = {size: searched(ranked[:size], _COMPARED_ON) for size in sizes}
        size = min(unions, key=lambda size: unions[size][0])
        _, width, ridge = unions[size]
        names = tuple(ranked[:size])
    else:
        names, width, ridge = like.names, like.width, like.ridge
    squared = known.distances(known, names)
    weights = _solved(squared, y, width=width, ridge=ridge)
    while weights is None and ridge < _LARGEST_RIDGE:  # enough for a part of the examples is not for all
        ridge *= 10
        weights = _solved(squared, y, width=width, ridge=ridge)
    if weights is None:
        raise AttackError(
            "Kernel regression: no width and ridge gave a usable fit; the examples are not finite or too few."
        )
    found = (-probes.distances(known, names) / width).exp().double() @ weights
    error = float((found - y_probes).square().mean() / y_probes.square().mean())
    return Regression(names=names, width=width, ridge=ridge, mean=mean, weights=weights, error=error)


def _searched(inner: Tensor, outer: Tensor, y: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """The least held-out error, and the width and ridge that gave it.

    Distances in float32 are those of points only up to rounding: where that makes a kernel indefinite, the
    ridge is too small to be of use.
    """
    unit = max(float(inner.median()), _LEAST_DISTANCE)
    found = [(math.inf, unit, _RIDGES[-1])]
    for share, ridge in itertools.product(_WIDTHS, _RIDGES):
        width = share * unit
        weights = _solved(inner, y, width=width, ridge=ridge)
        if weights is None:
            continue
        guess = (-outer / width).exp().double() @ weights
        found.append((float((guess - truth).square().mean()), width, ridge))
    return min(found)


def _solved(squared: Tensor, y: Tensor, *, width: float, ridge: float) -> Tensor | None:
    """Weights of shape (examples, target); None where rounding made the kernel indefinite."""
    kernel = (-squared / width).exp().double()
    kernel.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(kernel)
    return None if bool(failed) else torch.cholesky_solve(y.double(), factor)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return (2 - 2 * a @ b.T).clamp_min(0)


def _direction(vectors: Tensor) -> Tensor:
    directions: Tensor = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return directions


def _sketched(vectors: Tensor) -> Tensor:
    """Long vectors hashed to shorter ones, which keeps distances to about 2 % (count sketch)."""
    length = vectors.shape[1]
    if length <= _SKETCH:
        return vectors.float()
    generator = torch.Generator().manual_seed(length)  # the same for all vectors of a view
    bucket = torch.randint(_SKETCH, (length,), generator=generator)
    sign = torch.randint(2, (length,), generator=generator).float() * 2 - 1
    short = torch.zeros(len(vectors), _SKETCH, device=vectors.device)
    return short.index_add_(1, bucket.to(vectors.device), vectors.float() * sign.to(vectors.device))
