"""What pydantic found wrong, in words: the place as in TOML, and the fields that there are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from fedkl.errors import printable
from fedkl.registration import Kinds

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")  # of dataclasses, of models


def problems_of(error: ValidationError, *, kind: Any = None) -> list[str]:
    """One line for each field that is not as expected; never long, whatever came.

    Args:
        error: What pydantic found.
        kind: The type that was expected. With it, places are as in TOML, and for an unknown field the line
            says which there are.
    """
    problems = []
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        place, owner = _place_of(each["loc"], kind)
        what = _known_fields(owner) if owner is not None and each["type"] in _UNKNOWN else each["msg"]
        problems.append(printable(f"{place}: {what}"))
    return problems


def _place_of(location: Sequence[int | str], kind: Any) -> tuple[str, type | None]:
    """A place as in TOML, and the class whose field it is; pydantic's has the tags of unions in it too."""
    parts: list[str] = []
    owner: type | None = None
    for part in location:
        members = _members(kind)
        tagged = {_tag(member): member for member in members} if len(members) > 1 else {}
        if part in tagged:
            kind = tagged[str(part)]
            continue
        parts.append(str(part))
        owner = members[0] if len(members) == 1 and isinstance(members[0], type) else None
        kind = None if owner is None else _hints(owner).get(str(part))
    return ".".join(parts), owner


def _members(kind: Any) -> list[Any]:
    """The types that a type allows, without None."""
    if get_origin(kind) is Annotated:
        first, *beside = get_args(kind)
        open_unions = [list(each) for each in beside if isinstance(each, Kinds)]
        return open_unions[0] if open_unions else _members(first)
    if get_origin(kind) in (Union, UnionType):
        return [member for member in get_args(kind) if member is not type(None)]
    return [] if kind is None else [kind]


def _tag(kind: Any) -> str | None:
    """What a class's field `type` has to be, if it has one."""
    tags: tuple[str, ...] = get_args(_hints(kind).get("type")) if isinstance(kind, type) else ()
    return tags[0] if tags else None


@cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _known_fields(owner: type) -> str:
    tag = _tag(owner)
    names = [
        name for name, hint in _hints(owner).items() if name != "type" and get_origin(hint) is not ClassVar
    ]
    subject = "no such field here" if tag is None else f"'{tag}' has no such field"
    return f"{subject}; expected one of {', '.join(names)}"
