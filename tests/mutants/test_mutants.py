"""The table of mutants follows the code. The mutants themselves are run by `make mutants`."""

from __future__ import annotations

import json
import re

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


def named_tests() -> list[tuple[str, str, str]]:
    """File, function and case of every test that docs/protections.md names."""
    text = (ROOT / "docs" / "protections.md").read_text(encoding="utf-8")
    found: list[tuple[str, str, str]] = []
    for name in re.findall(r"`([^`]*)`", text.partition("\n## ")[2]):
        match = re.fullmatch(r"(?:([a-z_/]+\.py)(?:::)?)?(test_\w+)?(?:\[(.+)\])?", name)
        if match and any(match.groups()):
            file, function, case = match.groups(default="")
            if not file:  # of the file, and the test, named before
                file = found[-1][0]
                function = function or found[-1][1]
            found.append((file, function, case))
    return found


def test_protections_name_tests_that_exist():
    named = named_tests()
    assert len(named) > 200
    for file, function, case in named:
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {function}(" in text or not function, f"{file}::{function}"
        assert json.dumps(case) in text or not case, f"{file}::{function}[{case}]"


def test_protections_name_every_refusal_of_masked_sums():
    from tests.masking.test_refusals import REFUSALS

    named = {case for file, _, case in named_tests() if file == "masking/test_refusals.py"}
    assert named - {""} == set(REFUSALS)
