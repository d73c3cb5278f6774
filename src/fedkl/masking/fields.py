"""Fields of JSON objects that somebody else has written, each checked before it is used."""

from __future__ import annotations

import base64
from datetime import date
from typing import TypeVar

from fedkl.errors import printable, shown
from fedkl.masking.cards import check_name

_T = TypeVar("_T")


class Fields:
    """The fields of a JSON object, of which each is taken once, and none may be left.

    Args:
        values: The object.
        place: What it is, for messages.

    Raises:
        ValueError: It is no object.
    """

    def __init__(self, values: object, *, place: str) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{place}: expected an object")
        self._left = dict(values)
        self._place = place

    def take(self, name: str, kind: type[_T]) -> _T:
        """A field of exactly this type: a truth value is no number."""
        if name not in self._left:
            raise ValueError(f"{self._place}: {shown(name)} is missing")
        value = self._left.pop(name)
        if type(value) is not kind:
            raise self._wrong(name, f"a value of type {kind.__name__}")
        return value

    def text(self, name: str) -> str:
        """A short text."""
        value = self.take(name, str)
        if len(value) > 100 or printable(value) != value:
            raise self._wrong(name, "a short text")
        return value

    def member(self, name: str) -> str:
        """A member's name."""
        value = self.take(name, str)
        check_name(value)
        return value

    def number(self, name: str, *, most: int = 2**31) -> int:
        """A whole number from 0."""
        value = self.take(name, int)
        if not 0 <= value <= most:
            raise self._wrong(name, f"a number from 0 to {most}")
        return value

    def choice(self, name: str, choices: tuple[_T, ...]) -> _T:
        """One of several values."""
        value = self.take(name, type(choices[0]))
        if value not in choices:
            raise self._wrong(name, f"one of {', '.join(map(str, choices))}")
        return value

    def day(self, name: str) -> date:
        """A date, YYYY-MM-DD."""
        value = self.take(name, str)
        try:
            return date.fromisoformat(value)
        except ValueError as error:
            raise self._wrong(name, "a date, YYYY-MM-DD") from error

    def raw(self, name: str, size: int) -> bytes:
        """So many bytes, in base64."""
        text = self.take(name, str)
        try:
            value = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise self._wrong(name, f"{size} bytes in base64") from error
        if len(value) != size:
            raise self._wrong(name, f"{size} bytes in base64")
        return value

    def done(self) -> None:
        """Checks that nothing is left."""
        if self._left:
            raise ValueError(f"{self._place}: {shown(min(self._left))} is not known")

    def _wrong(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{self._place}: {shown(name)}: expected {expected}")
