"""A client's folder, and the store that it is in."""

from __future__ import annotations

from datetime import datetime, time, timezone

import pytest

from fedkl.custody import backup, journal
from tests.custody.setting import client_of
from tests.masking.cohorts import TODAY


@pytest.fixture
def clock(monkeypatch):
    """Backups are made on TODAY, whatever day the tests run on."""
    noon = datetime.combine(TODAY, time(12), tzinfo=timezone.utc)
    monkeypatch.setattr(journal, "_now", lambda: noon)
    monkeypatch.setattr(backup, "now", lambda: noon.isoformat(timespec="seconds"))
    return noon


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store" / "a"


@pytest.fixture
def store(folder):
    return client_of(folder.parent)
