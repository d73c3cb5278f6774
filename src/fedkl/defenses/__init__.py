"""Defenses: what a client does to its model and update so that the server learns less.

A new defense is a new file with a frozen dataclass, added to the union `AnyDefense`.
"""

from fedkl.defenses.base import Defense, Granted, ServerView
from fedkl.defenses.keylock import KeyLock
from fedkl.defenses.none import NoDefense
from fedkl.defenses.norms import PrivateNorm, PublicNorm
from fedkl.defenses.private_layers import PrivateLayers

AnyDefense = NoDefense | KeyLock | PublicNorm | PrivateNorm | PrivateLayers

__all__ = [
    "AnyDefense",
    "Defense",
    "Granted",
    "KeyLock",
    "NoDefense",
    "PrivateLayers",
    "PrivateNorm",
    "PublicNorm",
    "ServerView",
]
