"""Changes of bytes and of text that know nothing of a format."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from tests.fuzzing.sandbox import OUTSIDE

Change = Callable[[bytes, random.Random], bytes]

INTEGERS = (
    0, 1, 2, 3, 4, 7, 8, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**53, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
TOKENS = (
    b"\0", b"\xff" * 8, b"\x1b[31m", b"NaN", b"-Infinity", b"1e999", b"-1", b"1" + b"0" * 30, b"9" * 5000,
    OUTSIDE.encode(), b"/etc/passwd", b"..", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xc2\x85", b"\xe2\x80\xa8",
    b"[" * 1500, b'{"a":' * 1500, b"(" * 300, b"%s%n", b"$\\frac{", b"<script>", b"{{7*7}}", b"[bold]",
    b"null", b"true", b"[]", b"{}", b'""', b"'", b'"', b"\\", b"\r\n", b"PK\x03\x04", b"\x93NUMPY",
    b"\x80\x04", b"\x1f\x8b", b"FEDKLSEC", b"__class__", b"a" * 3000,
)  # fmt: skip


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """One small change somewhere."""
    at = rng.randrange(len(data) + 1)
    size = min(rng.choice((1, 1, 2, 4, 8, 32, 200)), len(data) - at)
    match rng.randrange(10):
        case 0 | 1 if at < len(data):
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        case 2 if at < len(data):
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 3:
            return data[:at] + rng.choice(TOKENS) + data[at:]
        case 4:
            token = rng.choice(TOKENS)
            return data[:at] + token + data[at + len(token) :]
        case 5:
            return data[:at] + data[at + size :]
        case 6:
            return data[: at + size] + data[at : at + size] * rng.choice((1, 2, 50)) + data[at + size :]
        case 7:
            return data[:at]
        case 8:
            width = rng.choice((1, 2, 4, 8))
            value = (rng.choice(INTEGERS) + rng.choice((-1, 0, 0, 1))) % 256**width
            return data[:at] + value.to_bytes(width, rng.choice(("big", "little"))) + data[at + width :]
        case _:
            return data[:at] + rng.randbytes(size) + data[at + size :]


def spliced(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one input and the end of another."""
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def mutated_text(data: bytes, rng: random.Random) -> bytes:
    """Lines and words that are moved, doubled, removed or replaced."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            del lines[at]
        case 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        case 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        case 3 | 4:
            lines[at] = _other_word(lines[at], rng)
        case _:
            return mutated_bytes(data, rng)
    return b"\n".join(lines)


def _other_word(line: bytes, rng: random.Random) -> bytes:
    """The line with one of its words or numbers replaced by a token, or by another of its words."""
    words = list(re.finditer(rb"[\w+\-.]+|\S", line))
    if not words:
        return rng.choice(TOKENS)
    word = rng.choice(words)
    new = rng.choice((*TOKENS, *(other[0] for other in words), *(b"%d" % value for value in INTEGERS)))
    return line[: word.start()] + new + line[word.end() :]
