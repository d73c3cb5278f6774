"""Numbers as words: whole numbers that are not negative, and whose sums over a cohort do not overflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedkl.errors import MaskingError

MAX_SAMPLES = 2**20
"""Most samples that an update may stand for."""

MAX_MEMBERS = 1000
"""Most members of a roster."""

WordBits = Literal[64, 32]
_SHORT_WEIGHT = 12  # bits of a weight in short words


@dataclass(frozen=True, kw_only=True)
class Words:
    """How a floating-point number becomes a word.

    A number v with weight u is ``round(u · v · 2^fraction) + u · limit · 2^fraction``: a word from 0 to
    ``2 · u · limit · 2^fraction``. A sum of words gives the weighted mean once the sum of the weights is
    known. Its error is at most ``2^−(fraction + 1)`` divided by the mean weight.

    Attributes:
        bits: Of a word.
        members: Of the roster, at most `MAX_MEMBERS`: so many words add up without overflow.
        max_samples: Most samples of a member, at most `MAX_SAMPLES`.

    Raises:
        MaskingError: A field is out of range.
    """

    bits: WordBits
    members: int
    max_samples: int

    def __post_init__(self) -> None:
        if not (
            self.bits in (64, 32)
            and 1 <= self.members <= MAX_MEMBERS
            and 1 <= self.max_samples <= MAX_SAMPLES
        ):
            raise MaskingError(
                f"Words: expected 64 or 32 bits, 1 to {MAX_MEMBERS} members and 1 to {MAX_SAMPLES} samples, "
                f"got bits={self.bits}, members={self.members}, max_samples={self.max_samples}."
            )

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of a word in a message."""
        return np.dtype(f"<u{self.bits // 8}")

    @property
    def fraction(self) -> int:
        """Fraction bits: a sum of as many short words as there are members stays below 2³²."""
        return 20 if self.bits == 64 else 16 - self.members.bit_length()

    @property
    def limit(self) -> int:
        """Numbers lie between minus this and this."""
        return 2**10 if self.bits == 64 else 2**3

    def weight(self, samples: int) -> int:
        """The weight of so many samples; for short words it has 12 bits, rounded where there are more."""
        most = 1 << _SHORT_WEIGHT
        if self.bits == 64 or self.max_samples <= most:
            return samples
        return max(1, round(samples * most / self.max_samples))

    def scale(self, weight: int) -> int:
        """What a number is multiplied by before it is rounded."""
        return weight * (1 << self.fraction)

    def offset(self, weight: int) -> int:
        """What is added afterwards; words reach to its double."""
        return self.scale(weight) * self.limit
