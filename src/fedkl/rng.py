"""Seeded randomness for experiments: one seed, independent generators by purpose.

Keys and lock layers never come from here; see `fedkl.keys`.
"""

from __future__ import annotations

import hashlib

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
