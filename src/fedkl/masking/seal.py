"""Tags that add up: Poly1305 over words of which a sum does not overflow.

Poly1305 of the blocks c₁ … c_q (16 bytes each) is Σ (c_j + 2¹²⁸) r^(q+1−j) modulo p = 2¹³⁰ − 5, of which the
lower 128 bits plus s are the tag. Where words do not overflow in a sum, blocks do not carry into one another
and the polynomials add up: Σᵢ Pᵢ = P(sum) + (n − 1) · Z with Z = Σ_k 2¹²⁸ r^k. Every tag is short of its
polynomial by k · 2¹²⁸ with 0 ≤ k ≤ 3, and adding s may have taken 2¹²⁸ off once more. For n uploads and the
sum itself, 4n + 4 multiples of 2¹²⁸ are thus right.

Source:
    RFC 8439, section 2.5; the idea of homomorphic tags: Agrawal and Boneh 2009.
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography.hazmat.primitives.poly1305 import Poly1305

BLOCK = 16
_P = 2**130 - 5
_TOP = 2**128
_CLAMP = 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF


def tagger(r: bytes, s: bytes = bytes(16)) -> Poly1305:
    """Poly1305 with a key of two halves, 16 bytes each; feed it whole blocks."""
    return Poly1305(r + s)


def number(tag: bytes) -> int:
    """A tag, or a half of a key, as a number."""
    return int.from_bytes(tag, "little")


def holds(*, total: int, pads: Iterable[bytes], own: bytes, r: bytes, blocks: int) -> bool:
    """Whether a sum of tags is that of a sum of messages.

    Args:
        total: The sum of the tags, as numbers, without reduction.
        pads: The s of every message in the sum.
        own: Poly1305 of the summed messages, with s = 0.
        r: The first half of the key.
        blocks: How many blocks a message has.
    """
    ses = [number(pad) for pad in pads]
    count = len(ses)
    point = number(r) & _CLAMP
    padding = _geometric(point, blocks) * _TOP
    difference = (total - sum(ses) - number(own) - (count - 1) * padding) % _P
    return any(difference == k * _TOP % _P for k in range(-4 * count, 4))


def _geometric(point: int, terms: int) -> int:
    """``point + point² + … + point^terms`` modulo p."""
    if point == 1:  # never drawn: clamped, it has zero bits there
        return terms % _P
    return point * (pow(point, terms, _P) - 1) * pow(point - 1, -1, _P) % _P
