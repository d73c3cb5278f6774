"""Which defense clients have in an audit, as one text: what --defense takes and an audit's folder keeps."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from fedkl.defenses import DEFENSES, Defense
from fedkl.defenses.masked import MaskedUpload
from fedkl.errors import ConfigError, gathered, shown
from fedkl.parsing import parse_toml
from fedkl.validation import problems_of

_KIND = Annotated[Defense, DEFENSES]
_ADAPTER: TypeAdapter[Defense] = TypeAdapter(_KIND)
_WORD = re.compile(r"(?<==)(?!(?:true|false|inf|nan)(?:,|$))[A-Za-z][\w-]*(?=,|$)")


def defense_of(given: str | Defense) -> Defense:
    """What clients do against a curious server.

    Args:
        given: A defense; or a registered type, with its usual options or with those that follow it, as TOML
            has them: ``"pruning:keep=0.1"``. A single word needs no quotes: ``"private-layers:layers=stem"``.

    Raises:
        ConfigError: There is no such defense, an option is not usable, or it is named as masks are.
    """
    if isinstance(given, Defense):
        _check_type(given.type)
        return given
    name, _, options = given.partition(":")
    _check_type(name)
    try:
        fields = _options(options)
        return _ADAPTER.validate_python({**fields.pop("options"), "type": name, **fields})
    except ValidationError as error:
        problems = problems_of(error, kind=_KIND)
    except ValueError:
        problems = [f"expected {name}:NAME=VALUE,…, got {shown(given)}"]
    remedy = "See `fedkl attack --list`; an example is pruning:keep=0.1."
    raise ConfigError(gathered(f"defense: {name} is not usable so.", problems, remedy))


def _options(text: str) -> dict[str, Any]:
    try:
        return parse_toml(f"options = {{{text}}}")
    except ValueError:  # a shell takes the quotes away
        return parse_toml(f"options = {{{_WORD.sub(_quoted, text)}}}")


def _quoted(word: re.Match[str]) -> str:
    return json.dumps(word[0])


def text_of(defense: Defense) -> str:
    """What `defense_of` makes the same defense of: its type, and what differs from its usual options.

    >>> from fedkl.defenses import KeyLock
    >>> text_of(KeyLock()), text_of(KeyLock(layers="all", key_length=64))
    ('keylock', 'keylock:layers="all",key_length=64')
    """
    own, usual = (_ADAPTER.dump_python(each, mode="json") for each in (defense, type(defense)()))
    changed = {name: value for name, value in own.items() if value != usual[name]}
    return f"{defense.type}:{_inline(changed)[1:-1]}" if changed else defense.type


def _check_type(name: str) -> None:
    if name == MaskedUpload.type:
        raise ConfigError("defense: masks are `masking`, over any defense. Give masking = 'blind', say.")
    if name not in DEFENSES.names():
        known = ", ".join(each for each in DEFENSES.names() if each != MaskedUpload.type)
        raise ConfigError(f"defense: expected one of {known}, got {shown(name)}.")


def _inline(value: Any) -> str:
    """TOML in one line; it has no null: fields that are not set are left out."""
    if isinstance(value, dict):
        given = [f"{name}={_inline(each)}" for name, each in value.items() if each is not None]
        return f"{{{','.join(given)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_inline, value))}]"
    return json.dumps(value, ensure_ascii=False)
