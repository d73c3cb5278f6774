"""Updates that another system saved, and whether they fit a subject.

update.py      what was saved; reading.py: by folder, and whose images it was trained on
fitting.py     whether it fits: naming.py (which tensor is which), playing.py (played clients), likeness.py
               (what these have in common), running.py (running statistics), explaining.py (what all that
               says, in sentences)
"""

from fedkl.auditing.recorded.explaining import Remark
from fedkl.auditing.recorded.fitting import Fit, fits
from fedkl.auditing.recorded.reading import read_members, read_recorded
from fedkl.auditing.recorded.update import RecordedKind, RecordedUpdate

__all__ = ["Fit", "RecordedKind", "RecordedUpdate", "Remark", "fits", "read_members", "read_recorded"]
