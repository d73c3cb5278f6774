"""A file too many or too few in what is released is noticed."""

from __future__ import annotations

import io
import tarfile
import zipfile

import pytest

from tests.distribution import contents
from tests.distribution.contents import METADATA, problems

TRACKED = {"README.md", ".gitignore", "src/conftest.py", "src/fedkl/__init__.py", "src/fedkl/py.typed"}


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Writes a wheel and a source distribution with these names beside, and without those."""
    monkeypatch.setattr(contents, "tracked", lambda: TRACKED)

    def build(more=(), less=()):
        names = {"fedkl/__init__.py", "fedkl/py.typed", *(f"fedkl-1.0.dist-info/{name}" for name in METADATA)}
        wheel, source = tmp_path / "fedkl-1.0-py3-none-any.whl", tmp_path / "fedkl-1.0.tar.gz"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in (names | set(more)) - set(less):
                archive.writestr(name, "")
        with tarfile.open(source, "w:gz") as tar:
            for name in (TRACKED | {"PKG-INFO"} | set(more)) - set(less):
                tar.addfile(tarfile.TarInfo(f"fedkl-1.0/{name}"), io.BytesIO())
        return wheel, source

    return build


def test_all_that_is_tracked_and_nothing_else_is_right(built):
    assert problems(*built()) == []


@pytest.mark.parametrize("name", ["fedkl/__pycache__/x.pyc", "runs/a/config.toml", "site-a.secret"])
def test_what_is_not_tracked_is_named(built, name):
    found = problems(*built(more=[name]))
    assert [line.partition(" has ")[2] for line in found] == 2 * [f"{name}, which is not tracked"]


def test_what_is_missing_is_named(built):
    assert problems(*built(less=["fedkl/py.typed"])) == ["fedkl-1.0-py3-none-any.whl lacks fedkl/py.typed"]
    assert problems(*built(less=["README.md"])) == ["fedkl-1.0.tar.gz lacks README.md"]
