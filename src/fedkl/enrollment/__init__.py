"""A client joins a trained federation, or changes its key: only what is private is fitted.

* fitting.py: lock layers, private layers and norm statistics, while public tensors stay as they are
* enrolling.py: `enroll`, a new client's lock
* rotating.py: `rotate` and `rotate_file`, another key for a lock
"""

from fedkl.enrollment.enrolling import enroll
from fedkl.enrollment.fitting import Enrolled, Fitting, Measured
from fedkl.enrollment.rotating import rotate, rotate_file

__all__ = ["Enrolled", "Fitting", "Measured", "enroll", "rotate", "rotate_file"]
