"""What a server could reconstruct: arms × trials, attacked and scored.

views.py      what a client does, and what the server knows of it
gradients.py  of batches; updates.py: what a client computes from them
observing.py  what the server has after an update; one_gradient.py: the same of one client at hand
simulating.py clients that the server plays itself
grid.py       every trial in every arm; victims.py: the clients, and the server's own data
floor.py      what a server scores that looks at no update
run.py        the same into a run directory; results.py: what it comes to
reconstructions.py  the images that were found, and the true ones, as files of the run
matrix.py     many attacks against many arrangements; arrangements.py: of what; attackers.py: which
records.py    their figures; verdict.py: what they say
"""

from fedkl.attacking.floor import CANDIDATES
from fedkl.attacking.gradients import full_gradient
from fedkl.attacking.grid import TrialResult, attack_arms
from fedkl.attacking.observing import Trial, observe, trials_of
from fedkl.attacking.one_gradient import observe_gradient
from fedkl.attacking.simulating import SimulatedClients
from fedkl.attacking.updates import local_update, sent_statistics
from fedkl.attacking.views import chosen_arms

__all__ = [
    "CANDIDATES",
    "SimulatedClients",
    "Trial",
    "TrialResult",
    "attack_arms",
    "chosen_arms",
    "full_gradient",
    "local_update",
    "observe",
    "observe_gradient",
    "sent_statistics",
    "trials_of",
]
