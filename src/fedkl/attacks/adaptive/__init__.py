"""Attackers who know how the defense works.

closed_form.py  γ, β and the image by linear algebra, layer by layer
descent.py      the way down: head, blocks, image
blind.py        the top of the way where the head is private
wiener.py       behind a lock per element, with images of the server's own
mean_map.py     behind a private first convolution, likewise; gaussian.py: what both know of images
access.py       what these need to have observed
norms.py        γ and β as moments; what a norm hides and what it does not
layers.py       a convolution's input by least squares
chain.py        reads a network as a chain of layers, norms and activations
activations.py  those that can be inverted
prior.py        smoothness
rank.py         equations against unknowns, beforehand
subspace.py     a convolution's input from its own gradient; features.py: where a network allows it
gauss_newton.py  images and secrets together, by nonlinear least squares; annealing.py: how
feature_inversion.py  the image from these, with images of the server's own
learned.py      an inversion learned from simulated clients; kernels.py: the regression behind it
structure.py    label, head input and dead channels, without any optimization
matching.py     gradient matching that uses them, and sent norm statistics
floor.py        the floor: a guess from the label alone
"""

from fedkl.attacks.adaptive.closed_form import ClosedForm, ClosedFormReconstruction, PassedLayer
from fedkl.attacks.adaptive.feature_inversion import FeatureInversion
from fedkl.attacks.adaptive.floor import PriorOnly
from fedkl.attacks.adaptive.gauss_newton import GaussNewton, GaussNewtonReconstruction
from fedkl.attacks.adaptive.learned import LearnedInversion
from fedkl.attacks.adaptive.matching import AdaptiveMatching
from fedkl.attacks.adaptive.mean_map import MeanMap
from fedkl.attacks.adaptive.rank import Passage, passable_layers
from fedkl.attacks.adaptive.structure import Structure, read_structure
from fedkl.attacks.adaptive.wiener import Wiener

__all__ = [
    "AdaptiveMatching",
    "ClosedForm",
    "ClosedFormReconstruction",
    "FeatureInversion",
    "GaussNewton",
    "GaussNewtonReconstruction",
    "LearnedInversion",
    "MeanMap",
    "Passage",
    "PassedLayer",
    "PriorOnly",
    "Structure",
    "Wiener",
    "passable_layers",
    "read_structure",
]
