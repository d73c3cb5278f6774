"""Attacks: what an honest-but-curious server reconstructs from what it observed.

Attacks know nothing of clients, keys, data or defenses beyond the `Observation`. A new attack is a new file
with a frozen dataclass, added to the union `AnyAttack`.

    base.py        Knowledge, Observation, Reconstruction, and the base class
    objectives.py  gradient matching, for many problems at once
    priors.py      what an attacker knows about images
    batched.py     L-BFGS over a batch of independent problems
    parallel.py    problems shared out among threads
    labels.py      label inference
    generators.py  the generators that GGL searches; their weights: weights/
    descent.py     what attacks that descend share
    dlg.py idlg.py … one attack a file, named after its paper
    adaptive/      attackers who know how the defense works
"""

from fedkl.attacks.adaptive import (
    AdaptiveMatching,
    ClosedForm,
    FeatureInversion,
    GaussNewton,
    LearnedInversion,
    MeanMap,
    PriorOnly,
    Wiener,
)
from fedkl.attacks.base import Attack, Auxiliary, Knowledge, LocalSteps, Observation, Reconstruction
from fedkl.attacks.dlg import DLG
from fedkl.attacks.ggl import GGL
from fedkl.attacks.grnn import GRNN
from fedkl.attacks.idlg import IDLG
from fedkl.attacks.inverting import InvertingGradients
from fedkl.attacks.labels import infer_label, infer_labels, known_labels

AnyAttack = (
    DLG
    | IDLG
    | GGL
    | InvertingGradients
    | AdaptiveMatching
    | GRNN
    | ClosedForm
    | Wiener
    | MeanMap
    | LearnedInversion
    | FeatureInversion
    | GaussNewton
    | PriorOnly
)

__all__ = [
    "DLG",
    "GGL",
    "GRNN",
    "IDLG",
    "AdaptiveMatching",
    "AnyAttack",
    "Attack",
    "Auxiliary",
    "ClosedForm",
    "FeatureInversion",
    "GaussNewton",
    "InvertingGradients",
    "Knowledge",
    "LearnedInversion",
    "LocalSteps",
    "MeanMap",
    "Observation",
    "PriorOnly",
    "Reconstruction",
    "Wiener",
    "infer_label",
    "infer_labels",
    "known_labels",
]
