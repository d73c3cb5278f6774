"""Versions of what fedkl writes: older ones are read, a newer one is named and left as it is.

All formats are in docs/file-formats.md.
"""

from __future__ import annotations

import re

from fedkl.errors import NewerFormatError, shown


def check_version(version: object, *, source: object, reads: int) -> None:
    """Checks that a file is not of a newer version than this fedkl reads.

    Args:
        version: What the file says. Anything but a whole number is let be: the file is damaged, and whoever
            reads it says so.
        source: The file, for the message.
        reads: The newest version that can be read.

    Raises:
        NewerFormatError: It is newer.

    >>> check_version(1, source="a.key", reads=1)
    """
    if type(version) is int and version > reads:
        numbers = f"format {shown(version)[1:-1]}; this one reads up to {reads}"
        raise NewerFormatError(f"{source}: written by a newer fedkl ({numbers}). Update fedkl.")


def version_of(text: object, *, name: str) -> int | None:
    """The version in a format's text; None if it is another format's.

    >>> version_of("fedkl-model-1", name="fedkl-model")
    1
    """
    match = re.fullmatch(rf"{re.escape(name)}-([1-9][0-9]{{0,8}})", text) if isinstance(text, str) else None
    return int(match[1]) if match else None
