"""What comes from elsewhere as it may stand in a message: in one line, no control codes, not too long."""

from __future__ import annotations

import os

_MOST = 300


def place(path: str | os.PathLike[str]) -> str:
    r"""A path; of a long one, the end.

    >>> print(place("train/cat/a\nb.png"))
    train/cat/a\nb.png
    """
    text = _printable(os.fspath(path))
    return text if len(text) <= _MOST else f"…{text[-_MOST:]}"


def told(error: BaseException) -> str:
    r"""What another library's error says; of a long text, the beginning.

    >>> print(told(ValueError("no\nimage")))
    ValueError: no\nimage
    """
    return f"{type(error).__name__}: {short(str(error))}"


def short(text: str) -> str:
    """A text of another program; of a long one, the beginning."""
    text = _printable(text)
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]
