"""The notebooks run from a clean kernel, and what is stored in them belongs to what is there."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from tests.notebooks.executing import NOTEBOOKS, ROOT, code_cells, executed, fingerprint, read
from tests.notebooks.reading import claimed, numbers, pictures, printed

AGAIN = "Execute and store it again: make notebooks"
_MAX_BYTES = 500_000
_PLACE = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|usr|var|opt|work|mnt|Users|private)/|[A-Za-z]:\\\\|file://"
)
_LIKENESS = re.compile(r"^\s*(-?\d\.\d+)  (.+)$", re.MULTILINE)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Each notebook executed, by name; a cell that raises fails what asks for it."""
    done = {}

    def one(path):
        if path not in done:
            done[path] = executed(read(path), folder=tmp_path_factory.mktemp(path.stem), seed=0)
        return done[path]

    return one


def both(fresh, name):
    """A notebook as it is stored, and as it comes out now."""
    path = next(each for each in NOTEBOOKS if each.stem == name)
    return read(path), fresh(path)


def test_there_are_both():
    assert [path.stem for path in NOTEBOOKS] == ["audit-your-own", "first-leak"]


@each_notebook
def test_stored_outputs_are_those_of_its_cells(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.fedkl.executed == fingerprint(notebook), AGAIN
    assert [cell.execution_count for cell in code_cells(notebook)] == [
        *range(1, len(code_cells(notebook)) + 1)
    ]
    kinds = [(each.output_type, each.get("name")) for cell in code_cells(notebook) for each in cell.outputs]
    assert not [kind for kind in kinds if kind[0] == "error" or kind[1] == "stderr"]
    assert pictures(notebook) > 0


@each_notebook
def test_it_is_small_and_says_nothing_of_the_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < _MAX_BYTES
    notebook = read(path)
    outputs = json.dumps([cell.outputs for cell in code_cells(notebook)])
    assert not _PLACE.search(outputs)
    assert set(notebook.metadata) == {"fedkl", "kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert not [cell.id for cell in notebook.cells if cell.metadata]


@each_notebook
def test_its_cells_are_short_and_come_with_words(path):
    cells = read(path).cells
    assert max(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code") <= 16
    kinds = [cell.cell_type for cell in cells]
    assert not [place for place in range(1, len(kinds)) if kinds[place - 1] == kinds[place] == "code"]


@each_notebook
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    assert targets
    assert not [target for target in targets if not (path.parent / target).exists()]


@each_notebook
def test_it_runs_and_gives_what_is_stored(path, fresh):
    stored, now = read(path), fresh(path)
    assert not [cell.id for cell in code_cells(now) if cell.execution_count is None]
    # Whether an attacker of pictures had time within the audit's minutes depends on what else is running.
    certain = [cell.id for cell in code_cells(stored) if cell.id != "pictures"]
    printing = [cell for cell in certain if printed(stored, cell)]
    assert [cell for cell in certain if printed(now, cell)] == printing


@each_notebook
def test_every_number_of_its_text_is_printed_by_a_cell(path, fresh):
    notebook = read(path)
    assert claimed(notebook) <= numbers(notebook)
    assert claimed(notebook) <= numbers(fresh(path))


def test_the_lock_holds_against_one_attacker_and_not_the_other_and_masks_against_both(fresh):
    for notebook in both(fresh, "first-leak"):
        likeness = {title: float(value) for value, title in _LIKENESS.findall(printed(notebook, "likeness"))}
        assert len(likeness) == 5
        assert likeness["as it is, DLG"] > 0.95
        assert likeness["locked, DLG"] < 0.5
        assert likeness["locked, the closed form"] > 0.9
        assert max(abs(likeness[title]) for title in likeness if title.startswith("masked")) < 0.5
        shown = ("image", "plain", "locked", "opened", "masks-picture")
        assert [pictures(notebook, cell) for cell in shown] == [1] * len(shown)


def test_the_audit_finds_a_leak_and_masks_pass_its_limit(fresh):
    for notebook in both(fresh, "audit-your-own"):
        assert re.search(r"^presence .*, leaks$", printed(notebook, "findings"), re.MULTILINE)
        assert re.search(r"no leak was found by .*presence", printed(notebook, "masked"))
        assert "open: exit code 1" in printed(notebook, "gate")
        assert "masked: exit code 0" in printed(notebook, "gate")


def test_pictures_that_leak_are_stored():
    notebook = read(ROOT / "examples" / "notebooks" / "audit-your-own.ipynb")
    assert pictures(notebook, "pictures") == 1


def test_a_cell_that_raises_is_an_error(tmp_path):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        executed(broken, folder=tmp_path)


def test_an_edited_cell_no_longer_fits_its_outputs():
    notebook = read(NOTEBOOKS[0])
    code_cells(notebook)[0].source += "\n# edited"
    assert notebook.metadata.fedkl.executed != fingerprint(notebook)


def test_numbers_of_text_are_found_beside_code_and_links():
    cells = [
        nbformat.v4.new_markdown_cell("It took 3.5 of 1,000, `not 7`, [see](https://a.example/99)."),
        nbformat.v4.new_code_cell("print(3.5)"),
    ]
    assert claimed(nbformat.v4.new_notebook(cells=cells)) == {"3.5", "1,000"}
