"""Attacks: what an honest-but-curious server reconstructs from what it observed.

Attacks know nothing of clients, keys, data or defenses beyond the `Observation`. A new attack is a new file
with a frozen dataclass, added to the union `AnyAttack`.

    base.py        Knowledge, Observation, Reconstruction, and the base class
    objectives.py  gradient matching, for many problems at once
    batched.py     L-BFGS over a batch of independent problems
    labels.py      label inference
    dlg.py idlg.py one attack a file, named after its paper
"""

from fedkl.attacks.base import Attack, Knowledge, Observation, Reconstruction
from fedkl.attacks.dlg import DLG
from fedkl.attacks.idlg import IDLG
from fedkl.attacks.labels import infer_label

AnyAttack = DLG | IDLG

__all__ = ["DLG", "IDLG", "AnyAttack", "Attack", "Knowledge", "Observation", "Reconstruction", "infer_label"]
