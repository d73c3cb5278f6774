"""A node with a store, and Flower's own environment kept off this machine."""

from __future__ import annotations

import sys

import pytest

if sys.version_info < (3, 11):  # which Flower needs
    collect_ignore_glob = ["test_*.py"]
else:
    from fedkl.flower import in_process


@pytest.fixture(autouse=True)
def _node(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDKL_PASSPHRASE", "correct horse")
    monkeypatch.setenv("FEDKL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    with in_process._identity():  # who messages are from
        yield
