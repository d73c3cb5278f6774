"""The one writer of tables in Markdown, in the two forms that files have."""

from __future__ import annotations

import doctest
from pathlib import Path

import fedkl
from fedkl import markdown


def test_a_table_in_both_forms():
    rows = [("1", ""), ("", "x | y")]
    assert list(markdown.table_lines(("a", "b"), rows)) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 |  |",
        "|  | x | y |",
    ]
    assert list(markdown.table_lines(("a", "b"), [], tight=True)) == ["| a | b |", "|---|---|"]
    assert doctest.testmod(markdown).failed == 0


def test_nobody_else_writes_the_line_below_the_header():
    others = [
        path.name
        for path in Path(fedkl.__file__).parent.rglob("*.py")
        if '---|"' in path.read_text(encoding="utf-8") or '"---"' in path.read_text(encoding="utf-8")
    ]
    assert others == ["markdown.py"]
