"""Changes of JSON and TOML: wrong types, odd numbers, missing or doubled keys, deep nesting, odd names."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tomli_w

from tests.fuzzing.bits import INTEGERS, mutated_bytes, mutated_text
from tests.fuzzing.sandbox import OUTSIDE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_DEPTH = 1500
# What no Python value is written as; put in as text for a string of the same number.
_JSON_RAW = (
    "NaN", "-Infinity", "1e999", "-0", "1e-400", "1" + "0" * 20, "1" + "0" * 400, "9" * 5000, "01", "tru", "",
    "[" * _DEPTH, "[" * _DEPTH + "]" * _DEPTH, '{"a":' * _DEPTH + "1" + "}" * _DEPTH, "[" * 40_000,
    '"\\ud800"', '"\\u001b[31m"', '"\\u0000"', '"open', "{", "]", ",", '{"a": 1, "a": 2}',
)  # fmt: skip
_TOML_RAW = (
    "nan", "-inf", "1e999", "1" + "0" * 20, "1" + "0" * 400, "9" * 5000, "0x" + "f" * 5000, "[" * _DEPTH,
    "[" * _DEPTH + "]" * _DEPTH, "{a=" * _DEPTH + "1" + "}" * _DEPTH, "1979-05-27T07:32:00Z", "07:32:00",
    "1979-05-27", '"\\u001b[31m"', '"\\u0000"', '"\\ud800"', "'''a\nb'''", "[[]]", "{}", "1_000", "01", "",
    "2000-02-30", '"open',
)  # fmt: skip
_TOML_LINES = (
    "a." * _DEPTH + "a = 1", "training." + "a." * _DEPTH + "a = 1", "[" + "a." * _DEPTH + "a]", "[[data]]",
    "[data]", "[training.local]", "data = 1", "type = 'train'", "type = 'attack'", "\ufeff", "\x1b = 1",
    "seed = 1", "seed = true", "[training.partition]", "'\\u001b' = 1", '"\\u001b[31m" = 1', "= 1", "[",
    "x = [" + "1," * 5000 + "]", "trials = 99999999999999999999", "arms = ['lock', 'lock']", "arms = [[]]",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.0, 0.5, -1.5, 1e308, 5e-324, "", "a", "a" * 5000, "\x1b[31m", "a\nb", "\0",
    "1", "nan", OUTSIDE, "/etc/passwd", "..", ".", "$x$", "<b>", "{{1}}", [], {}, [[]], [None], [1, 2], [1.5],
    ["a"], {"": {}}, {"type": "x"}, {"a": [{}]}, *INTEGERS, -(2**63), 10**20,
)  # fmt: skip
_KEYS = (
    "",
    "a",
    "type",
    "\x1b[31m",
    "a" * 3000,
    "\0",
    "0",
    "-1",
    "a.b",
    "a/b",
    "💥",
    "__class__",
    "\n",
    "shape",
)

Place = tuple[Any, Any]
"""A container, and a key or index in it."""


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """Changes a JSON document; one that is none already is changed as text."""
    try:
        tree = changed(json.loads(data), rng, raw=len(_JSON_RAW))
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.8)
    except (ValueError, RecursionError, TypeError):
        return mutated_text(data, rng)
    return _with_raw(text, _JSON_RAW).encode("utf-8", "surrogatepass")


def mutated_lines(data: bytes, rng: random.Random) -> bytes:
    """Changes one line of JSON, or which lines there are."""
    lines = data.split(b"\n")
    if rng.random() < 0.3:
        return mutated_text(data, rng)
    at = rng.randrange(len(lines))
    lines[at] = mutated_json(lines[at], rng)
    return b"\n".join(lines)


def mutated_toml(data: bytes, rng: random.Random) -> bytes:
    """Changes a TOML document, as values or as lines."""
    if rng.random() < 0.4:
        return _mutated_toml_lines(data, rng)
    try:
        tree = changed(tomllib.loads(data.decode()), rng, raw=len(_TOML_RAW))
        return _with_raw(tomli_w.dumps(tree), _TOML_RAW).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, TypeError, AttributeError):
        return mutated_text(data, rng)


def _mutated_toml_lines(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutated_text(data, rng)
    lines = data.split(b"\n")
    new = rng.choice(_TOML_LINES).encode("utf-8", "surrogatepass")
    lines.insert(rng.randrange(len(lines) + 1), new)
    return b"\n".join(lines)


def mutated_manifest(data: bytes, rng: random.Random) -> bytes:
    """Changes JSON that holds a digest of itself, and mostly seals it again."""
    text = mutated_json(data, rng)
    return sealed(text) if rng.random() < 0.9 else text


def sealed(text: bytes) -> bytes:
    """The JSON with the digest that fits it, where it has one at all."""
    try:
        values = json.loads(text)
        values.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return json.dumps({"sha256": digest, **values}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return text


def changed(tree: Any, rng: random.Random, *, raw: int) -> Any:
    """Changes one value or key of plain values.

    Args:
        tree: Dicts, lists, texts and numbers; changed in place.
        rng: Draws the change.
        raw: How many texts that are no values may stand for one.
    """
    root = [tree]
    places = list(_places(root))
    container, key = rng.choice(places)
    match rng.randrange(10):
        case 0 | 1 | 2:
            container[key] = _value(rng, raw)
        case 3:
            container[key] = _like(container[key], rng)
        case 4 if container is not root:
            del container[key]
        case 5 if isinstance(container, dict):
            container[_key(places, rng)] = container.pop(key)
        case 6 if isinstance(container, dict):
            container[_key(places, rng)] = _value(rng, raw) if rng.random() < 0.5 else container[key]
        case 7:
            other, place = rng.choice(places)
            container[key] = json.loads(json.dumps(other[place]))
        case 8:
            container[key] = rng.choice((lambda v: [v], lambda v: {"a": v}, lambda v: [v, v]))(container[key])
        case _:
            container[key] = _like(container[key], rng)
    return root[0]


def _places(container: Any) -> Iterator[Place]:
    keys: Sequence[Any] = list(container) if isinstance(container, dict) else range(len(container))
    for key in keys:
        yield container, key
        if isinstance(container[key], (dict, list)):
            yield from _places(container[key])


def _value(rng: random.Random, raw: int) -> Any:
    return f"@raw{rng.randrange(raw)}@" if rng.random() < 0.3 else rng.choice(_VALUES)


def _like(value: Any, rng: random.Random) -> Any:
    """A value of the same type that is a little off."""
    if isinstance(value, bool):
        return rng.choice((not value, int(value)))
    if isinstance(value, (int, float)):
        near: tuple[Callable[[Any], Any], ...] = (lambda v: v + 1, lambda v: v - 1, lambda v: -v, float, str)
        return rng.choice((*near, lambda v: v * 1000, lambda v: v / 7))(value)
    if isinstance(value, str):
        return _like_text(value, rng)
    if isinstance(value, list):
        return rng.choice((value * 2, value[1:], value[::-1], value * 300))
    return {} if isinstance(value, dict) else value


def _like_text(value: str, rng: random.Random) -> str:
    """Documents within documents are changed as such: our safetensors metadata are JSON texts."""
    if value[:1] in ("{", "["):
        return mutated_json(value.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    if rng.random() < 0.3:
        return value + rng.choice(("\x1b[31m", "\n", "\0", "a" * 3000, "/..", "\ud800", " ", "é"))
    data = value.encode("utf-8", "surrogatepass")
    return mutated_bytes(data, rng).decode("utf-8", "replace")


def _key(places: Sequence[Place], rng: random.Random) -> str:
    known = [key for _, key in places if isinstance(key, str)]
    return rng.choice(known) if known and rng.random() < 0.6 else rng.choice(_KEYS)


def _with_raw(text: str, raw: Sequence[str]) -> str:
    for number, replacement in enumerate(raw):
        if f"@raw{number}@" in text:
            text = text.replace(f'"@raw{number}@"', replacement)
    return text
