"""What a notebook says in its text, and what its cells printed."""

from __future__ import annotations

import re

from nbformat import NotebookNode

from tests.notebooks.executing import code_cells

_UNREAD = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def claimed(notebook: NotebookNode) -> set[str]:
    """Every number of the text, but for code and links."""
    texts = [_UNREAD.sub(" ", cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    return {number for text in texts for number in _NUMBER.findall(text)}


def printed(notebook: NotebookNode, cell: str | None = None) -> str:
    """What one cell, or all of them, printed, or gave as text.

    Args:
        notebook: With outputs.
        cell: Its id; None: all.
    """
    cells = [each for each in code_cells(notebook) if cell in (None, each.id)]
    if not cells:
        raise ValueError(f"no code cell has the id {cell!r}")
    return "\n".join(_text(output) for each in cells for output in each.outputs)


def numbers(notebook: NotebookNode) -> set[str]:
    """Every number that a cell printed."""
    return set(_NUMBER.findall(printed(notebook)))


def pictures(notebook: NotebookNode, cell: str | None = None) -> int:
    """How many pictures one cell, or all of them, gave."""
    cells = [each for each in code_cells(notebook) if cell in (None, each.id)]
    return sum("image/png" in output.get("data", {}) for each in cells for output in each.outputs)


def _text(output: NotebookNode) -> str:
    return output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
