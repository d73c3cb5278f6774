"""Attacks: what an honest-but-curious server reconstructs from what it observed.

Attacks know nothing of clients, keys, data or defenses beyond the `Observation`. A new attack is a new file
with a frozen dataclass under `register_attack`: in one of the folders below, or in a package of your own.

    base.py      Reconstruction, and the base class
    matching/    images are sought whose update is the observed one
    algebraic/   images are computed, layer by layer
    learned/     images are guessed by what was learned from the server's own
    generators/  what GGL searches
    priors.py smoothness.py gaussian.py  what an attacker knows about images
    labels.py    label inference
    parallel.py  problems shared out among threads
    memory.py    how much there is
"""

from fedkl.attacks.algebraic.closed_form import ClosedForm
from fedkl.attacks.algebraic.disaggregation import Disaggregation
from fedkl.attacks.algebraic.feature_inversion import FeatureInversion
from fedkl.attacks.algebraic.linear_rows import LinearRows
from fedkl.attacks.algebraic.mean_map import MeanMap
from fedkl.attacks.algebraic.positions import Positions
from fedkl.attacks.algebraic.wiener import Wiener
from fedkl.attacks.base import (
    ATTACKS,
    Attack,
    Needs,
    Reason,
    Reconstruction,
    Refusal,
    RefusedError,
    register_attack,
)
from fedkl.attacks.labels import infer_label, infer_labels, known_labels
from fedkl.attacks.learned.inversion import LearnedInversion
from fedkl.attacks.learned.prior_only import PriorOnly
from fedkl.attacks.matching.dlg import DLG
from fedkl.attacks.matching.gauss_newton import GaussNewton
from fedkl.attacks.matching.ggl import GGL
from fedkl.attacks.matching.grnn import GRNN
from fedkl.attacks.matching.idlg import IDLG
from fedkl.attacks.matching.inverting import InvertingGradients
from fedkl.attacks.matching.structured import AdaptiveMatching
from fedkl.protocol import Auxiliary, Knowledge, Observation, Procedure
from fedkl.registration import import_all

__all__ = [
    "ATTACKS",
    "DLG",
    "GGL",
    "GRNN",
    "IDLG",
    "AdaptiveMatching",
    "Attack",
    "Auxiliary",
    "ClosedForm",
    "Disaggregation",
    "FeatureInversion",
    "GaussNewton",
    "InvertingGradients",
    "Knowledge",
    "LearnedInversion",
    "LinearRows",
    "MeanMap",
    "Needs",
    "Observation",
    "Positions",
    "PriorOnly",
    "Procedure",
    "Reason",
    "Reconstruction",
    "Refusal",
    "RefusedError",
    "Wiener",
    "infer_label",
    "infer_labels",
    "known_labels",
    "register_attack",
]

for _folder in ("matching", "algebraic", "learned"):
    import_all(f"{__name__}.{_folder}")
