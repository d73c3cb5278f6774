"""Changes of safetensors and NumPy files that still agree with themselves, so that their content is read."""

from __future__ import annotations

import ast
import json
import math
import random
import struct
from dataclasses import dataclass, replace
from typing import Any

from tests.fuzzing.bits import INTEGERS, mutated_bytes
from tests.fuzzing.trees import mutated_json

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "I16": 16,
    "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_SHAPES: tuple[tuple[int, ...], ...] = (
    (), (0,), (1,), (1, 1), (2,), (3, 0), (1,) * 70, (2**40, 0), (2**63, 2), (2**31,), (5,),
)  # fmt: skip
_NAMES = (
    "",
    "a",
    "key",
    "__metadata__",
    "\x1b[31m",
    "a" * 3000,
    "private/",
    "memory/a/dict/b",
    "a/b/c",
    "\n",
    "/",
)
_NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3.4e38, -3.4e38, 1.0)
_DESCRIPTIONS = (
    "<f4", ">f4", "<f2", "<f8", "<f16", "<c8", "<i8", ">i8", "|b1", "|u1", "<u2", "<u8", "|O", "|S5", "<U3",
    "<M8[s]", "<m8[ns]", "|V8", "f4", "<f3", "", "<f4,<i4", "|S0", "<U0",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: bytes


def read_safetensors(data: bytes) -> tuple[Any, list[Entry]] | None:
    """Metadata and tensors; None for what is no sound file."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        body = data[8 + size :]
        meta = header.pop("__metadata__", None)
        return meta, [_entry(name, each, body) for name, each in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError):
        return None


def _entry(name: str, each: dict[str, Any], body: bytes) -> Entry:
    shape = tuple(each["shape"])
    if not all(type(number) is int for number in shape) or not isinstance(each["dtype"], str):
        raise TypeError("not a tensor's shape or dtype")
    return Entry(name, each["dtype"], shape, body[slice(*each["data_offsets"])])


def written_safetensors(meta: Any, entries: list[Entry]) -> bytes:
    """The file, with offsets that fit."""
    header: dict[str, Any] = {} if meta is None else {"__metadata__": meta}
    body = b""
    for entry in entries:
        end = len(body) + len(entry.content)
        offsets = [len(body), end]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        body += entry.content
    return _with_header(json.dumps(header).encode("utf-8", "surrogatepass"), body)


def _with_header(text: bytes, body: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Changes the tensors, the metadata, or the header's text."""
    read = read_safetensors(data)
    draw = rng.random()
    if read is None or draw < 0.1:
        return mutated_bytes(data, rng)
    meta, entries = read
    if draw < 0.25 or not entries:
        size = int.from_bytes(data[:8], "little")
        return _with_header(mutated_json(data[8 : 8 + size], rng), data[8 + size :])
    if draw < 0.45 and isinstance(meta, dict) and meta:
        return written_safetensors(_mutated_meta(meta, rng), entries)
    return written_safetensors(meta, _mutated_entries(entries, rng))


def _mutated_meta(meta: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Its values are texts, often of JSON."""
    name = rng.choice(list(meta))
    value = str(meta[name]).encode("utf-8", "surrogatepass")
    return {**meta, name: mutated_json(value, rng).decode("utf-8", "replace")}


def _mutated_entries(entries: list[Entry], rng: random.Random) -> list[Entry]:
    at = rng.randrange(len(entries))
    entry, other = entries[at], rng.choice(entries)
    match rng.randrange(8):
        case 0:
            return entries[:at] + entries[at + 1 :]
        case 1:
            return [*entries, replace(entry, name=_name(entries, rng))]
        case 2:
            new = replace(entry, name=_name(entries, rng))
        case 3:
            new = _fitted(replace(entry, dtype=rng.choice(list(_BITS))))
        case 4 | 5:
            new = _fitted(replace(entry, shape=_shape(entry.shape, rng)))
        case 6:
            new = replace(entry, content=_filled(entry, rng))
        case _:
            new = replace(other, name=entry.name)
    return [*entries[:at], new, *entries[at + 1 :]]


def _name(entries: list[Entry], rng: random.Random) -> str:
    known = rng.choice(entries).name
    return rng.choice((known, f"{known}\x1b", f"{known}/a", known.partition("/")[2], *_NAMES))


def _shape(shape: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    return rng.choice(
        (*_SHAPES, (*shape, 1), (1, *shape), shape[1:], shape[::-1], tuple(2 * n for n in shape))
    )


def _fitted(entry: Entry) -> Entry:
    """With as much content as shape and dtype say, where that is not too much."""
    size = math.prod(entry.shape) * _BITS.get(entry.dtype, 8) // 8
    if size > 1 << 14:
        return entry
    pattern = entry.content or b"\0"
    return replace(entry, content=(pattern * (size // len(pattern) + 1))[:size])


def _filled(entry: Entry, rng: random.Random) -> bytes:
    """The same amount of content, of odd numbers."""
    count = len(entry.content)
    form = {"F32": "<f", "F64": "<d", "F16": "<e"}.get(entry.dtype)
    if form is None or rng.random() < 0.3:
        return rng.choice((b"\0" * count, b"\xff" * count, b"\x7f" * count, rng.randbytes(count)))
    try:
        number = struct.pack(form, rng.choice(_NUMBERS))
    except OverflowError:
        return b"\xff" * count
    if rng.random() < 0.5:
        return (number * count)[:count]
    at = len(number) * rng.randrange(max(1, count // len(number)))
    return (entry.content[:at] + number + entry.content[at + len(number) :])[:count]


def mutated_npy(data: bytes, rng: random.Random) -> bytes:
    """Changes header or numbers of a NumPy file."""
    read = _read_npy(data)
    draw = rng.random()
    if read is None or draw < 0.2:
        return mutated_bytes(data, rng)
    fields, body = read
    if draw < 0.3:
        return _npy(mutated_bytes(_literal(fields), rng), body, version=rng.choice((1, 2, 3)))
    if draw < 0.55:
        entry = Entry(
            "", {"<f4": "F32", "<f8": "F64", "<f2": "F16"}.get(str(fields.get("descr")), ""), (), body
        )
        return _npy(_literal(fields), _filled(entry, rng), version=1)
    fields, body = _mutated_fields(fields, body, rng)
    return _npy(_literal(fields), body, version=rng.choice((1, 1, 1, 2, 3, 9)))


def _mutated_fields(fields: dict[str, Any], body: bytes, rng: random.Random) -> tuple[dict[str, Any], bytes]:
    shape = fields.get("shape")
    match rng.randrange(4):
        case 0:
            fields = {**fields, "descr": rng.choice(_DESCRIPTIONS)}
        case 1 | 2:
            old = shape if isinstance(shape, tuple) else ()
            new = _shape(old, rng)
            fields = {**fields, "shape": rng.choice((new, new, (-1,), (2**62,), [2], "a", (True,), 3))}
        case _:
            odd = rng.choice(({"fortran_order": True}, {"fortran_order": 1}, {"more": 1}))
            fields = {**fields, **odd}
    size = _npy_size(fields)
    if size is not None and size < 1 << 14 and rng.random() < 0.8:
        body = ((body or b"\0") * (size // max(1, len(body)) + 1))[:size]
    return fields, body


def _npy_size(fields: dict[str, Any]) -> int | None:
    width, shape = str(fields.get("descr"))[2:], fields.get("shape")
    if not width.isdigit() or not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
        return None
    return math.prod(shape) * int(width)


def _read_npy(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    width = {1: 2, 2: 4, 3: 4}.get(data[6] if len(data) > 10 else 0)
    if not data.startswith(b"\x93NUMPY") or width is None:
        return None
    start = 8 + width
    end = start + int.from_bytes(data[8:start], "little")
    try:
        fields = ast.literal_eval(data[start:end].decode("latin1").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
    return (fields, data[end:]) if isinstance(fields, dict) and end < 10_000 else None


def _literal(fields: dict[str, Any]) -> bytes:
    return repr(fields).encode("utf-8", "replace")


def _npy(header: bytes, body: bytes, *, version: int) -> bytes:
    width = 2 if version == 1 else 4
    header += b" " * (-(8 + width + len(header) + 1) % 64) + b"\n"
    size = min(len(header), 256**width - 1).to_bytes(width, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + body


__all__ = [
    "INTEGERS",
    "Entry",
    "mutated_npy",
    "mutated_safetensors",
    "read_safetensors",
    "written_safetensors",
]
