"""Typed, length-prefixed bytes: two different lists of fields never give the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

PROTOCOL = "fedkl-masking/1"
"""Name and version of the protocol; part of every digest and of every key."""

Field: TypeAlias = "bytes | str | int | Sequence[Field]"


def canonical(label: str, *fields: Field) -> bytes:
    """A label and its fields as bytes.

    Args:
        label: What the bytes are for.
        fields: Bytes, text, whole numbers, and sequences of these.

    >>> canonical("a", b"bc") == canonical("ab", b"c")
    False
    """
    return _encoded((PROTOCOL, label, *fields))


def digest(label: str, *fields: Field) -> bytes:
    """SHA-256 of `canonical`, 32 bytes."""
    return hashlib.sha256(canonical(label, *fields)).digest()


def _encoded(field: Field) -> bytes:
    """One letter for the type, eight bytes for the length (of a sequence: of its items), the content."""
    if isinstance(field, (bytes, bytearray, memoryview)):
        return b"B" + len(field).to_bytes(8, "big") + bytes(field)
    if isinstance(field, str):
        text = field.encode()
        return b"S" + len(text).to_bytes(8, "big") + text
    if isinstance(field, int):  # a bool is the number that it equals
        number = int(field).to_bytes(16, "big", signed=True)
        return b"I" + len(number).to_bytes(8, "big") + number
    return b"L" + len(field).to_bytes(8, "big") + b"".join(_encoded(item) for item in field)
