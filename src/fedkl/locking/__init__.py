"""The key-lock: a secret key generates the scale γ and shift β of normalization layers.

* activations.py: the activations act, and what each can represent
* layers.py: the lock layer, act(W k + b), as a parametrization of a norm's weight or bias
* chain.py: which lock's output is the next one's k; all of them generate at the start of a forward pass
* norms.py: what is inserted after a layer without a norm; fedkl.norms knows the norm types
* targets.py: which layers of a model are locked; all checks before the first change
* start.py: where γ and β start: a trained model keeps its own
* surgery.py: the change itself, and how it is undone
* elements.py: a γ and a β for every element of a sample
* functional.py: modules that call a norm as a function, which no lock can reach
* copying.py: copies of models, or why there is none
* withholding.py: how modules keep private tensors out of states and pickles
* split.py: which tensors are private, which are public, and how states of either side move
* private_layers.py: whole layers that stay with the client
* statistics.py: private norm statistics, counted anew for the weights that came back
* generation.py: how secrets become γ and β, without the model
* options.py: how a lock was made, as its file says
* relocking.py: a baked model is locked again: what was private stays so
* keylock.py: `Lock`, a locked model with its key, and how it is saved
* making.py: `lock` and `lock_`: a model becomes a `Lock`
* loading.py: a file becomes one again
"""

from fedkl.locking.activations import Activation
from fedkl.locking.copying import copied
from fedkl.locking.generation import KEY, Generation
from fedkl.locking.keylock import Lock
from fedkl.locking.layers import Initialization
from fedkl.locking.loading import SavedLock, load_lock, load_memory, read_lock
from fedkl.locking.making import lock, lock_
from fedkl.locking.norms import ElementwiseAffine, register_norm
from fedkl.locking.options import Granularity
from fedkl.locking.private_layers import OwnLayers, OwnSplit, find_layers, warn_about_frozen
from fedkl.locking.split import Split, frozen_names, tied_names
from fedkl.locking.start import Start, is_trained
from fedkl.locking.statistics import recalibrate_norms_
from fedkl.locking.targets import ExampleInputs, Layers
from fedkl.locking.withholding import is_private, make_public, withhold, withhold_statistics

__all__ = [
    "KEY",
    "Activation",
    "ElementwiseAffine",
    "ExampleInputs",
    "Generation",
    "Granularity",
    "Initialization",
    "Layers",
    "Lock",
    "OwnLayers",
    "OwnSplit",
    "SavedLock",
    "Split",
    "Start",
    "copied",
    "find_layers",
    "frozen_names",
    "is_private",
    "is_trained",
    "load_lock",
    "load_memory",
    "lock",
    "lock_",
    "make_public",
    "read_lock",
    "recalibrate_norms_",
    "register_norm",
    "tied_names",
    "warn_about_frozen",
    "withhold",
    "withhold_statistics",
]
