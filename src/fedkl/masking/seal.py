"""Tags that add up: Poly1305's polynomial over words of which a sum does not overflow.

The polynomial of the blocks c₁ … c_q (16 bytes each) is P = Σ (c_j + 2¹²⁸) r^(q+1−j) modulo p = 2¹³⁰ − 5. A
tag is P + s modulo p. Where words do not overflow in a sum, blocks do not carry into one another and the
polynomials add up: Σᵢ Pᵢ = P(sum) + (n − 1) · Z with Z = Σ_k 2¹²⁸ r^k.

Tags are added, and masked, modulo p, so that the sum of n tags says nothing that the sum of the messages does
not. A sum as a whole number would say how often tags passed a limit; that is enough to test a guess of one.

Source:
    RFC 8439, section 2.5; the idea of homomorphic tags: Agrawal and Boneh 2009.
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography.hazmat.primitives.poly1305 import Poly1305

BLOCK = 16
SIZE = 32
"""Bytes of a tag in a message, and of s."""

PRIME = 2**130 - 5
_TOP = 2**128
_CLAMP = 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF


class Polynomial:
    """The polynomial of a message; feed it whole blocks.

    Poly1305 gives its lower 128 bits. The two above follow from a second one, over one more block.

    Args:
        r: Where it is evaluated, 16 bytes.
    """

    def __init__(self, r: bytes) -> None:
        self._point = number(r) & _CLAMP
        self._first, self._second = Poly1305(r + bytes(16)), Poly1305(r + bytes(16))

    def update(self, data: memoryview) -> None:
        """The next blocks."""
        self._first.update(data)
        self._second.update(data)

    def value(self) -> int:
        """Its value, from 0 to p − 1; false with probability 2⁻¹⁰⁴ (r from 1 to 3). Once."""
        self._second.update(bytes(BLOCK))
        low, following = number(self._first.finalize()), number(self._second.finalize())
        for candidate in range(low, PRIME, _TOP):
            if (candidate + _TOP) * self._point % PRIME % _TOP == following:
                return candidate
        raise AssertionError("one of the four fits")


def number(data: bytes) -> int:
    """Bytes as a number."""
    return int.from_bytes(data, "little")


def added(tag: bytes, value: int) -> bytes:
    """A tag and a number, added modulo p, 32 bytes."""
    return ((number(tag) + value) % PRIME).to_bytes(SIZE, "little")


def holds(*, total: bytes, pads: Iterable[bytes], own: int, r: bytes, blocks: int) -> bool:
    """Whether a sum of tags is that of a sum of messages.

    Args:
        total: The sum of the tags.
        pads: The s of every message in the sum.
        own: The polynomial of the summed messages.
        r: The first half of the key.
        blocks: How many blocks a message has.
    """
    ses = [number(pad) for pad in pads]
    padding = _geometric(number(r) & _CLAMP, blocks) * _TOP
    return (number(total) - sum(ses) - own - (len(ses) - 1) * padding) % PRIME == 0


def _geometric(point: int, terms: int) -> int:
    """``point + point² + … + point^terms`` modulo p."""
    if point == 1:  # drawn with probability 2⁻¹⁰⁶
        return terms % PRIME
    return point * (pow(point, terms, PRIME) - 1) * pow(point - 1, -1, PRIME) % PRIME
