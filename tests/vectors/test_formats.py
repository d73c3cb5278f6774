"""Each format has a vector that is read, and a newer version that is named and stays as it is."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import get_args

import pytest

import fedkl
from fedkl.errors import NewerFormatError, UpdateError
from fedkl.lockfile import FileKind
from tests.vectors.formats import FORMATS, HERE, WRITERS

PACKAGE = Path(fedkl.__file__).parent
DOCUMENT = PACKAGE.parents[1] / "docs" / "file-formats.md"
_WRITES = re.compile(r"(?<![.\w])(write_atomically|create_once|put|lockfile\.write)\(")


def _needs(name):
    if name.startswith("Flower") and sys.version_info < (3, 11):
        pytest.skip("Flower needs Python 3.11")


@pytest.fixture(params=FORMATS)
def form(request):
    _needs(request.param)
    return FORMATS[request.param]


@pytest.fixture
def copy(form, tmp_path):
    source, copy = HERE / form.vector, tmp_path / Path(form.vector).name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    return copy


def state(folder):
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    }


def test_what_is_there_is_read(form, copy):
    form.read(copy)


def test_a_newer_one_is_named_and_stays(form, copy, tmp_path):
    form.raise_version(copy / form.file)
    before = state(tmp_path)
    with pytest.raises((NewerFormatError, UpdateError)) as caught:
        form.read(copy)
    assert re.search(
        r"written by a newer fedkl \(format (\d+); this one reads up to \d+\)", str(caught.value)
    )
    assert str(caught.value).endswith("Update fedkl.")
    assert str(caught.value).count("\n") == 0
    assert state(tmp_path) == before


def test_every_kind_of_container_has_a_vector():
    assert set(get_args(FileKind)) <= set(FORMATS)


def test_every_module_that_writes_files_has_a_format():
    """A new one belongs into FORMATS, with a vector, and into docs/file-formats.md."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(_WRITES.search(line) for line in path.read_text().splitlines() if "def " not in line)
    }
    assert {*found, "privacy/ledgerfile.py"} == set(WRITERS)
    assert {what for what in WRITERS.values() if what and ":" not in what} <= set(FORMATS)


def test_the_document_has_every_format():
    rows = [line.split("|")[1].strip() for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    assert set(FORMATS) <= set(rows)


def test_a_newer_memory_is_not_replaced(tmp_path):
    """A member that took it for damaged would forget which masks it has used."""
    from fedkl.masking import MemberFile
    from tests.vectors.make import PASSPHRASE

    folder = tmp_path / "members"
    shutil.copytree(HERE / "generation-4", folder)
    FORMATS["memory"].raise_version(folder / "ward-a.memory")
    before = state(folder)
    with MemberFile.open(folder / "ward-a.secret", passphrase=PASSPHRASE) as file:
        with pytest.raises(NewerFormatError, match=r"ward-a\.memory"):
            file.memory()
    assert state(folder) == before


def test_a_newer_checkpoint_is_not_gone_back_behind(tmp_path):
    """The one before it is whole; going on from that would replace what the newer fedkl has trained."""
    form = FORMATS["checkpoint manifest"]
    shutil.copytree(HERE / form.vector, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "round-000001.json").exists()
    form.raise_version(tmp_path / "checkpoint" / form.file)
    with pytest.raises(NewerFormatError, match="round-000002"):
        form.read(tmp_path / "checkpoint")
