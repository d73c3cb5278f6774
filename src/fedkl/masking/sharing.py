"""Shamir's secret sharing over the prime field of 2²⁵⁶ − 189.

Source:
    Shamir 1979.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedkl.errors import MaskingError

PRIME = 2**256 - 189
SIZE = 32
"""Bytes of a secret and of a share."""


def split(secret: bytes, *, points: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Shares of a secret: any `threshold` of them give it, fewer say nothing about it.

    Args:
        secret: 32 bytes; a number below the prime.
        points: Where the polynomial is evaluated, one for each share: different, from 1.
        threshold: How many shares are needed.

    Returns:
        The shares by point, 32 bytes each.

    Raises:
        MaskingError: The secret is no number of the field, points are repeated or 0, or the threshold is not
            1 to the number of points.
    """
    number = int.from_bytes(secret, "big")
    fits = len(secret) == SIZE and number < PRIME
    if not fits or len(set(points)) < len(points) or min(points, default=0) < 1:
        raise MaskingError("Sharing: expected 32 bytes below the prime and different points from 1.")
    if not 1 <= threshold <= len(points):
        raise MaskingError(f"Sharing: threshold: expected 1 to {len(points)} (points), got {threshold}.")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return {point: _evaluated(coefficients, number, point).to_bytes(SIZE, "big") for point in points}


def _evaluated(coefficients: Sequence[int], constant: int, point: int) -> int:
    value = 0
    for coefficient in coefficients:
        value = (value + coefficient) * point % PRIME
    return (value + constant) % PRIME


def is_share(share: bytes) -> bool:
    """Whether it may be a share: 32 bytes, a number below the prime."""
    return len(share) == SIZE and int.from_bytes(share, "big") < PRIME


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret of so many shares as its threshold; of false or too few ones, some other number.

    Args:
        shares: By point.

    Raises:
        MaskingError: There is none, or one is no number of the field.
    """
    if not shares or not all(map(is_share, shares.values())):
        raise MaskingError("Sharing: expected shares of 32 bytes, numbers below the prime.")
    numbers = [int.from_bytes(share, "big") for share in shares.values()]
    weights = _weights(tuple(shares))
    secret = sum(number * weight for number, weight in zip(numbers, weights, strict=True)) % PRIME
    return secret.to_bytes(SIZE, "big")


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's coefficients at 0; the same points come once for every member of a round."""
    weights = []
    for own in points:
        above, below = 1, 1
        for other in points:
            if other != own:
                above = above * other % PRIME
                below = below * (other - own) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
