"""The client's secret key: numbers from the operating system's CSPRNG that never leave the client."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import torch
from torch import Tensor

from fedkl.errors import LockError, SecretError

KeyDistribution = Literal["normal", "uniform"]


def secure_uniform(*shape: int) -> Tensor:
    """Uniform numbers in (0, 1) from the operating system's CSPRNG, float64.

    Args:
        shape: The shape of the result.
    """
    count = math.prod(shape)
    integers = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> 12  # 52 bits: adding 0.5 is exact
    return torch.from_numpy((integers.astype(np.float64) + 0.5) * 2.0**-52).reshape(shape)


def secure_normal(*shape: int) -> Tensor:
    """Standard normal numbers from the operating system's CSPRNG, float64.

    Args:
        shape: The shape of the result.
    """
    return normal(secure_uniform, *shape)


Uniform = Callable[..., Tensor]
"""Draws uniform numbers in (0, 1) of a shape, float64: `secure_uniform`, or what `imitated_uniform` gives."""


def normal(uniform: Uniform, *shape: int) -> Tensor:
    """Standard normal numbers from uniform ones, float64."""
    found: Tensor = torch.special.ndtri(uniform(*shape))
    return found


def imitated_uniform(generator: torch.Generator) -> Uniform:
    """Uniform numbers for the secrets of clients that an attacker plays: they repeat from its seed.

    Never for a client of one's own: whoever knows the seed knows the numbers.

    Args:
        generator: The attacker's.
    """

    def uniform(*shape: int) -> Tensor:
        integers = torch.randint(2**52, shape, generator=generator, dtype=torch.int64)
        return (integers.double() + 0.5) * 2.0**-52

    return uniform


class Key:
    """A client's private key k: the secret input of the lock layers.

    The values are fixed for the whole training. A key cannot be pickled, and copying one gives the same
    object: there is one place in memory that holds it besides the lock layers of its owner.

    Args:
        values: The numbers, shape ``(length,)``, floating-point, finite and not all zero. Use
            `Key.generate` for a new key; this constructor is for one that was saved.
        distribution: How the values were drawn; information only.

    Raises:
        LockError: The values are not one finite non-zero vector.
    """

    __slots__ = ("_distribution", "_values")

    def __init__(self, values: Tensor, *, distribution: KeyDistribution = "normal") -> None:
        if values.ndim != 1 or values.numel() < 1 or not values.is_floating_point():
            came = f"shape {tuple(values.shape)}, {values.dtype}"
            raise LockError(f"Key: expected one vector of floating-point numbers, got {came}.")
        numbers = values.detach().to(torch.float64, copy=True).cpu()  # first: of float8, nothing can be asked
        if not bool(torch.isfinite(numbers).all()) or not bool(numbers.abs().max() > 0):
            raise LockError("Key: expected finite values that are not all zero. Use Key.generate().")
        if distribution not in get_args(KeyDistribution):
            raise LockError(_unknown_distribution(distribution))
        self._values = numbers
        self._distribution = distribution

    @classmethod
    def generate(cls, *, length: int = 1024, distribution: KeyDistribution = "normal") -> Key:
        """Draws a new key from the operating system's CSPRNG.

        Args:
            length: How many secret numbers.
            distribution: ``"normal"``: Gaussian, shifted to zero mean and scaled to unit norm, so that two
                keys are nearly orthogonal and the gradient of a lock layer is not scaled by the key.
                ``"uniform"``: U[0, 1) as published (arXiv 2305.04095, section 4); any two such keys
                overlap (k·k′/‖k‖² ≈ 0.75) and ‖k‖² ≈ length / 3 multiplies the learning rate of γ and β.

        Raises:
            LockError: The length is below 2 or the distribution is unknown.

        >>> Key.generate(length=16)
        Key(length=16, distribution='normal', values=<secret>)
        """
        return cls.drawn(secure_uniform, length=length, distribution=distribution)

    @classmethod
    def drawn(cls, uniform: Uniform, *, length: int, distribution: KeyDistribution) -> Key:
        """As `generate`, from other random numbers: for clients that an attacker plays.

        Args:
            uniform: Where they come from; see `imitated_uniform`.
            length: As in `generate`.
            distribution: As in `generate`.

        Raises:
            LockError: The length is below 2 or the distribution is unknown.
        """
        if length < 2:
            raise LockError(f"Key.generate: length must be at least 2, got {length}.")
        if distribution == "uniform":
            return cls(uniform(length), distribution="uniform")
        if distribution == "normal":
            values = normal(uniform, length)
            values -= values.mean()
            return cls(values / values.norm(), distribution="normal")
        raise LockError(_unknown_distribution(distribution))

    @property
    def length(self) -> int:
        """How many secret numbers the key has."""
        return self._values.numel()

    @property
    def distribution(self) -> KeyDistribution:
        """How the values were drawn."""
        return self._distribution

    def reveal(self) -> Tensor:
        """A copy of the secret values, float64, shape ``(length,)``. For lock layers and key files only."""
        return self._values.clone()

    def __repr__(self) -> str:
        return f"Key(length={self.length}, distribution={self._distribution!r}, values=<secret>)"

    def __copy__(self) -> Key:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Key:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SecretError("A Key cannot be pickled. Save it with fedkl.save_key(...) or lock.save(...).")

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(2)


def _unknown_distribution(distribution: object) -> str:
    known: Sequence[str] = get_args(KeyDistribution)
    return f"Key: unknown distribution {distribution!r}. Choose one of {', '.join(known)}."
