"""The key-lock: a secret key generates the scale γ and shift β of normalization layers.

* layers.py: the lock layer, act(W k + b), as a parametrization of a norm's weight or bias
* norms.py: which norm types can be locked; what is inserted after a layer without a norm
* surgery.py: which layers of a model are locked; all checks before the first change
* functional.py: modules that call a norm as a function, which no lock can reach
* split.py: which tensors are private, which are public, and how states of either side move
* keylock.py: `lock`, `lock_` and the `Lock` they return
"""

from fedkl.locking.keylock import Lock, load_lock, lock, lock_
from fedkl.locking.layers import Activation, Initialization
from fedkl.locking.norms import register_norm
from fedkl.locking.split import Split, withhold, withhold_statistics
from fedkl.locking.surgery import Layers

__all__ = [
    "Activation",
    "Initialization",
    "Layers",
    "Lock",
    "Split",
    "load_lock",
    "lock",
    "lock_",
    "register_norm",
    "withhold",
    "withhold_statistics",
]
