"""FedKL on Flower (extra ``fedkl[flower]``): a client mod, a guard around any strategy, a run in one process.

A Flower user changes two lines of the ClientApp::

    app = ClientApp(mods=[fedkl.flower.LockMod(Net)])
    ...
    model = fedkl.flower.current_client().model     # in place of Net()

and one or two of the ServerApp::

    strategy = fedkl.flower.Guard(FedAvg(), checkpoints="checkpoints")
    strategy.start(grid=grid, initial_arrays=fedkl.flower.public_arrays(Net()), num_rounds=5)

Where the server must not read what clients send, their nodes mask it (docs/masked.md)::

    app = ClientApp(mods=[fedkl.flower.MaskMod(), fedkl.flower.LockMod(Net)])
    strategy = fedkl.flower.Guard(FedAvg(), aggregation=fedkl.flower.Masked())

A defense that changes updates and keeps nothing private takes ``TransformMod(defense)`` instead.
``RecordingMod(folder)`` writes what a node gets and sends to its disk, to be audited (docs/recorded.md).
"""

from fedkl.custody import ClientStore, StoredClient
from fedkl.errors import ConfigError

try:
    import flwr as _flwr
except ImportError as error:
    raise ConfigError(
        "fedkl.flower: Flower is not installed. Install it with pip install 'fedkl[flower]' "
        "(Python 3.11 or later)."
    ) from error

from fedkl.flower.guard import Guard
from fedkl.flower.in_process import InProcessGrid, run_in_process
from fedkl.flower.mask_mod import MaskMod
from fedkl.flower.masked import Masked
from fedkl.flower.mod import LockMod, current_client
from fedkl.flower.recording_mod import RecordingMod
from fedkl.flower.records import public_arrays
from fedkl.flower.transforming import TransformMod

del _flwr

__all__ = [
    "ClientStore",
    "Guard",
    "InProcessGrid",
    "LockMod",
    "MaskMod",
    "Masked",
    "RecordingMod",
    "StoredClient",
    "TransformMod",
    "current_client",
    "public_arrays",
    "run_in_process",
]
