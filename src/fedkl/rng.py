"""Seeded randomness for experiments: one seed, independent generators by purpose.

Keys and lock layers never come from here; see `fedkl.keys`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose only, not on what was drawn before.

    Args:
        seed: The experiment's seed.
        purpose: What the numbers are for, e.g. ``("client", 2, "batches")``.

    Returns:
        A freshly seeded `torch.Generator`.

    >>> a, b = generator(0, "start", 1), generator(0, "start", 2)
    >>> a.initial_seed() == b.initial_seed()
    False
    """
    text = "/".join([str(seed), *(str(part) for part in purpose)])
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def seeded(seed: int, *, device: torch.device | str = "cpu") -> Iterator[None]:
    """For code that draws from global generators, as others' networks and loops do.

    PyTorch's, Python's and NumPy's begin at the seed, and go on afterwards as before. All threads share them.

    Args:
        seed: At least 0.
        device: Its generator begins there, too.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what others' code uses)
    try:
        with torch.random.fork_rng(devices=[device] if on_cuda else []):
            torch.default_generator.manual_seed(seed)
            if on_cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
