"""What clients do and what a server has: the ground on which training, attacks and audits meet.

    procedure.py    what a client does between receiving a model and sending an update
    local_training.py  carried out; not imported from here, since attacks do not see `fedkl.data`
    per_example.py  the images' gradients, clipped one by one
    private_gradient.py  carried out, with noise; not imported from here either
    differentiable.py  the same as a function of the images
    sending.py      what a client has at hand when it sends
    transforms.py   what everybody knows of what a defense does to it
    kept.py         of updates of which a part was sent
    observation.py  all that a server has afterwards, and what it was granted

Nothing here knows an attack or a defense.
"""

from fedkl.protocol.kept import Kept, only_kept
from fedkl.protocol.observation import Auxiliary, Knowledge, Observation
from fedkl.protocol.per_example import PerExample
from fedkl.protocol.procedure import Procedure, trained_parameters
from fedkl.protocol.sending import Sending
from fedkl.protocol.transforms import InTurn, Rescaling, Transform, in_turn, rescales

__all__ = [
    "Auxiliary",
    "InTurn",
    "Kept",
    "Knowledge",
    "Observation",
    "PerExample",
    "Procedure",
    "Rescaling",
    "Sending",
    "Transform",
    "in_turn",
    "only_kept",
    "rescales",
    "trained_parameters",
]
