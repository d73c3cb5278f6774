"""What a server could reconstruct: arms × trials, attacked and scored.

arms.py       what a client does, and what the server knows of it
updates.py    what a client computes
observing.py  what the server has after an update
simulating.py clients that the server plays itself
grid.py       every trial in every arm
"""

from fedkl.auditing.arms import MAIN_ARMS, Arm, standard_arms
from fedkl.auditing.grid import CANDIDATES, TrialResult, attack_arms
from fedkl.auditing.observing import Trial, observe, trials_of
from fedkl.auditing.simulating import SimulatedClients
from fedkl.auditing.updates import full_gradient, local_update, sent_statistics

__all__ = [
    "CANDIDATES",
    "MAIN_ARMS",
    "Arm",
    "SimulatedClients",
    "Trial",
    "TrialResult",
    "attack_arms",
    "full_gradient",
    "local_update",
    "observe",
    "sent_statistics",
    "standard_arms",
    "trials_of",
]
