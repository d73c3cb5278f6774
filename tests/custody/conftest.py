"""A client's folder, and the store that it is in."""

from __future__ import annotations

import pytest

from tests.custody.setting import client_of


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store" / "a"


@pytest.fixture
def store(folder):
    return client_of(folder.parent)
