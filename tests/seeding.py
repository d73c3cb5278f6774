"""Where what tests draw comes from: the global generators, keys and lock layers."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SEED = int(os.environ.get("FEDKL_TEST_SEED", "0"))
"""Another one shows which tests pass by chance only."""

SECRETS = random.Random()
"""Keys and lock layers are drawn from it, in place of the operating system."""


def seed(number: int = SEED) -> None:
    """What is drawn from now on is the same in every run."""
    torch.manual_seed(number)
    SECRETS.seed(number + 1)


@contextmanager
def seeded(purpose: str) -> Iterator[None]:
    """The same within, whoever comes first to what several tests share; draws go on after it as before."""
    before = SECRETS.getstate()
    with torch.random.fork_rng(devices=[]):
        seed(SEED + sum(purpose.encode()))
        yield
    SECRETS.setstate(before)
