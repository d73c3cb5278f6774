"""The paper's figures are written down once: in the tables of `fedkl.paper`."""

from __future__ import annotations

import tokenize
from pathlib import Path

import fedkl
from fedkl.paper.published import published

SOURCES = sorted(Path(fedkl.__file__).parent.rglob("*.py"))


def printed_figures():
    """Those of four digits, which stand nowhere by chance."""
    accuracies = [each for row in published("table1").values() for each in row["expected"].values()]
    pairs = [pair for row in published("table6").values() for pair in row.get("printed", {}).values()]
    return {f"{each:.2f}" for each in [*accuracies, *(each for pair in pairs for each in pair)] if each >= 10}


def test_no_figure_that_the_paper_prints_stands_in_the_code_too():
    figures = printed_figures()
    assert {"98.09", "32.71"} <= figures
    for path in SOURCES:
        with path.open("rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        numbers = {token.string for token in tokens if token.type == tokenize.NUMBER}
        assert not numbers & figures, path
