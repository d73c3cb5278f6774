"""A node with a store, and Flower's own environment kept off this machine."""

from __future__ import annotations

import functools
import sys

import jaxtyping
import pytest

from fedkl.secret_search import SecretSearch

if sys.version_info < (3, 11):  # which Flower needs
    collect_ignore_glob = ["test_*.py"]
else:
    from fedkl.flower import in_process


@pytest.fixture(scope="module", autouse=True)
def _searched_without_type_checks():
    """Inside the search of every reply, checks took ten times as long as the search; it has its own tests."""
    among = SecretSearch._among

    @functools.wraps(among)
    def unchecked(self, numbers):
        before = jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return among(self, numbers)
        finally:
            jaxtyping.config.update("jaxtyping_disable", before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecretSearch, "_among", unchecked)
        yield


@pytest.fixture(autouse=True)
def _node(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDKL_PASSPHRASE", "correct horse")
    monkeypatch.setenv("FEDKL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    with in_process._identity():  # who messages are from
        yield
