"""Real images for the federated tests."""

from __future__ import annotations

import os

import pytest
import torch

from tests.federated.setting import sample


@pytest.fixture(scope="session")
def dataset():
    return sample()


@pytest.fixture
def two_threads(monkeypatch):
    """PyTorch on two threads and two processor cores, whatever the machine has."""
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
