"""Text and tensors that came from elsewhere: parsed, or refused with a ValueError and nothing else.

The parsers below them raise what they please on hostile input (RecursionError, KeyError, OverflowError), or
need gigabytes for kilobytes. Whoever reads a file or a message goes through these functions and says what it
was.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any, NoReturn

import safetensors.torch
from torch import Tensor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_TOML_BYTES = 2**20
_MAX_DOTS = 200  # of a line: a key of n parts takes memory in n²


def parse_json(data: bytes | str) -> Any:
    r"""Strict JSON: UTF-8, finite numbers, text that can be written again, of a depth that Python can read.

    Raises:
        ValueError: It is none.

    >>> parse_json('{"round": 3}')
    {'round': 3}
    >>> parse_json("[NaN]")
    Traceback (most recent call last):
    ValueError: NaN is not JSON
    >>> parse_json('"\\ud83d\\ude00"'), len(parse_json('"\\ud83d\\ude00"'))
    ('😀', 1)
    >>> parse_json('"\\ud83d"')
    Traceback (most recent call last):
    ValueError: text that is no Unicode
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(text, parse_constant=_refuse_constant)
        if _HALF.search(text):  # JSON can escape half of a character, which no file or terminal takes
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("text that is no Unicode") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


_HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_json_object(data: bytes | str) -> dict[str, Any]:
    """Strict JSON that is an object.

    Raises:
        ValueError: It is none.
    """
    values = parse_json(data)
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got a {type(values).__name__}")
    return values


def parse_toml(text: str) -> dict[str, Any]:
    """TOML of moderate size and depth: at most 1 MiB, at most 200 dots in a line.

    Raises:
        ValueError: It is none.
    """
    if len(text) > MAX_TOML_BYTES:
        raise ValueError(f"expected at most {MAX_TOML_BYTES} characters, got {len(text)}")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > _MAX_DOTS:
            raise ValueError(f"line {number} has more than {_MAX_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the texts beside them.

    Raises:
        ValueError: It is none, or holds tensors of a kind that PyTorch does not have.
    """
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        beside = parse_json_object(data[8 : 8 + size]).get("__metadata__", {})
        texts = {str(name): str(text) for name, text in beside.items()}
    except Exception as error:  # the library raises KeyError, TypeError and others too
        raise ValueError(f"not a safetensors file that can be read ({type(error).__name__})") from error
    return tensors, texts
