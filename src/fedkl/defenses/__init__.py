"""Defenses: what a client does to its model and update so that the server learns less.

A new defense is a new file with a frozen dataclass under `register_defense`: here, or in a package of your
own. Its file says all that is known of it: what the client does, how a server imitates its clients, what its
control is, and what a server that knows it would try.
"""

from fedkl.defenses.arms import arms_of, own_arms
from fedkl.defenses.base import (
    DEFENSES,
    Arm,
    Defense,
    FilledIn,
    NoDefense,
    Regressed,
    plain_arm,
    register_defense,
)
from fedkl.defenses.changing import Draws, UpdateDefense
from fedkl.defenses.keylock import LOCK_SETTINGS, PUBLISHED_LOCK, KeyLock, PrivateNorm, PublicNorm
from fedkl.defenses.masked import MaskedUpload
from fedkl.defenses.private_layers import PrivateLayers
from fedkl.defenses.server_view import ServerView
from fedkl.registration import import_all

__all__ = [
    "DEFENSES",
    "LOCK_SETTINGS",
    "PUBLISHED_LOCK",
    "Arm",
    "Defense",
    "Draws",
    "FilledIn",
    "KeyLock",
    "MaskedUpload",
    "NoDefense",
    "PrivateLayers",
    "PrivateNorm",
    "PublicNorm",
    "Regressed",
    "ServerView",
    "UpdateDefense",
    "arms_of",
    "own_arms",
    "plain_arm",
    "register_defense",
]

import_all(__name__)
