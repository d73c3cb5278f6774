"""The table of mutants follows the code. The mutants themselves are run by `make mutants`."""

from __future__ import annotations

import pytest

from tests.mutants.__main__ import ROOT, mutants

MUTANTS = mutants()


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_the_table_follows_the_code(mutant):
    text = (ROOT / "src" / "fedkl" / mutant.file).read_text(encoding="utf-8")
    assert mutant.applied(text) != text
    for test in mutant.tests:
        assert (ROOT / test.partition("::")[0]).exists()
