"""What does my federated learning leak, and what stops it?

>>> import fedkl
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
>>> lock = fedkl.lock(model, key=fedkl.Key.generate())
>>> sorted(lock.public_gradient(lock.model(__import__("torch").rand(3, 4)).sum()))
['0.bias', '0.weight', '2.bias', '2.weight']
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedkl.auditing import Subject, audit
    from fedkl.errors import FedKLError
    from fedkl.keyfile import load_key, save_key
    from fedkl.keys import Key
    from fedkl.locking import Lock, load_lock, lock, lock_
    from fedkl.norms import register_norm
    from fedkl.protocol import Procedure
    from fedkl.update import PublicUpdate

__version__ = "0.2.0"

__all__ = [
    "FedKLError",
    "Key",
    "Lock",
    "Procedure",
    "PublicUpdate",
    "Subject",
    "audit",
    "load_key",
    "load_lock",
    "lock",
    "lock_",
    "register_norm",
    "save_key",
]

if not TYPE_CHECKING:  # a type checker would take any name from a module's __getattr__
    # PyTorch takes seconds to import; the command line's help must not wait for it.
    _HOMES = {
        "FedKLError": "errors",
        "Key": "keys",
        "Lock": "locking",
        "Procedure": "protocol",
        "PublicUpdate": "update",
        "Subject": "auditing",
        "audit": "auditing",
        "load_key": "keyfile",
        "load_lock": "locking",
        "lock": "locking",
        "lock_": "locking",
        "register_norm": "norms",
        "save_key": "keyfile",
    }

    # What pages call as fedkl.data.load(…) after `import fedkl`.
    _PACKAGES = frozenset(
        "aggregation attacking attacks auditing data defenses enrollment federated masking metrics modelfile "
        "models serving".split()
    )

    def __getattr__(name: str) -> object:
        """Imports a name of `__all__`, or a package, when it is first used."""
        if name in _PACKAGES:
            return import_module(f"{__name__}.{name}")  # which makes it an attribute
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """Every public name, imported or not."""
        return sorted({*globals(), *__all__})
