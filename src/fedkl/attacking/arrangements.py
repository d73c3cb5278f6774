"""What clients keep to themselves: the arrangements that the ladder is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedkl.defenses import PUBLISHED_LOCK, KeyLock, PrivateLayers, plain_arm

# A short key keeps the lock layers small: γ and β have thousands of entries, and the same distribution.
_PER_ELEMENT = KeyLock(granularity="element", key_length=128)

ARRANGEMENTS: Mapping[str, KeyLock | PrivateLayers] = {
    "first": PUBLISHED_LOCK,
    "all": replace(PUBLISHED_LOCK, layers="all"),
    "first-default": KeyLock(),
    "all-default": KeyLock(layers="all"),
    "element": _PER_ELEMENT,
    "signed": replace(_PER_ELEMENT, activation="tanh"),
    "classifier": KeyLock(layers="classifier"),
    "sandwich": replace(_PER_ELEMENT, activation="tanh", private=("head",)),
    "private-head": PrivateLayers(layers="head"),
    "private-stem": PrivateLayers(layers="stem"),
}
"""By name: the published lock and ours, in the first layer and in all; ours per element, with signs, in front
of the classifier, and with signs and a private classifier; whole layers without a lock."""

CONTROL = plain_arm().name
"""The plain network: on it a rung must succeed before it says anything about private layers."""

LOCK_CONTROL = PUBLISHED_LOCK.control().name
"""The same for a lock: its network, inserted norms included, with public γ and β."""


def control_of(arrangement: str) -> str:
    """Name of what an arrangement is compared with: its own network with nothing private."""
    return f"{LOCK_CONTROL}, {arrangement}" if is_lock(arrangement) else CONTROL


def is_lock(arrangement: str) -> bool:
    """Whether there is a key-lock; else whole layers are private."""
    return isinstance(ARRANGEMENTS[arrangement], KeyLock)
