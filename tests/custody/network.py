"""A small network with two norms, of which the first is locked."""

from __future__ import annotations

import torch
from torch import nn

from fedkl.defenses import KeyLock

DEFENSE = KeyLock(key_length=16)


def net():
    """The same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
