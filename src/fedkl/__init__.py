"""What does my federated learning leak, and what stops it?

>>> import fedkl
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
>>> lock = fedkl.lock(model, key=fedkl.Key.generate())
>>> sorted(lock.public_gradient(lock.model(__import__("torch").rand(3, 4)).sum()))
['0.bias', '0.weight', '2.bias', '2.weight']
"""

from fedkl.errors import FedKLError
from fedkl.keys import Key
from fedkl.lockfile import load_key, save_key
from fedkl.locking import Lock, load_lock, lock, lock_
from fedkl.norms import register_norm
from fedkl.update import PublicUpdate

__version__ = "0.1.0"

__all__ = [
    "FedKLError",
    "Key",
    "Lock",
    "PublicUpdate",
    "load_key",
    "load_lock",
    "lock",
    "lock_",
    "register_norm",
    "save_key",
]
