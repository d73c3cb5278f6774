"""The key-lock: a secret key generates the scale γ and shift β of normalization layers.

* layers.py: the lock layer, act(W k + b), as a parametrization of a norm's weight or bias
* norms.py: which norm types can be locked; what is inserted after a layer without a norm
* targets.py: which layers of a model are locked; all checks before the first change
* surgery.py: the change itself, and how it is undone
* functional.py: modules that call a norm as a function, which no lock can reach
* withholding.py: how modules keep private tensors out of states and pickles
* split.py: which tensors are private, which are public, and how states of either side move
* generation.py: how secrets become γ and β, without the model
* keylock.py: `lock`, `lock_` and the `Lock` they return
"""

from fedkl.locking.generation import KEY, Generation
from fedkl.locking.keylock import Lock, load_lock, load_memory, lock, lock_
from fedkl.locking.layers import Activation, Initialization
from fedkl.locking.norms import register_norm
from fedkl.locking.split import Split
from fedkl.locking.targets import Layers
from fedkl.locking.withholding import withhold, withhold_statistics

__all__ = [
    "KEY",
    "Activation",
    "Generation",
    "Initialization",
    "Layers",
    "Lock",
    "Split",
    "load_lock",
    "load_memory",
    "lock",
    "lock_",
    "register_norm",
    "withhold",
    "withhold_statistics",
]
