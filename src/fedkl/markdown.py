"""Tables and text in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]|<>])")


def escaped(text: str) -> str:
    r"""Text from elsewhere on one line, with nothing left that Markdown would take for its own.

    >>> print(escaped("a|b\n*c*"))
    a\|b \*c\*
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def table_lines(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, tight: bool = False
) -> Iterator[str]:
    r"""The lines of a table.

    Args:
        header: Names of the columns.
        rows: Cells, as they are: who has text from elsewhere escapes it.
        tight: Whether the line below the header has no spaces.

    >>> print(*table_lines(("a", "b"), [("1", "2")]), sep="\n")
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    yield _line(header)
    yield "|" + "---|" * len(header) if tight else _line(["---"] * len(header))
    for row in rows:
        yield _line(row)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
