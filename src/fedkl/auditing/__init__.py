"""What somebody's own federated training leaks: subjects, attackers, a plan, findings.

subject.py     what is audited
recorded.py    updates that another system saved
fitting.py     whether such an update fits a subject: naming.py (which tensor is which), playing.py (played
               clients), likeness.py (what they have in common), running.py (running statistics),
               explaining.py (what all that says, in sentences)
"""

from fedkl.auditing.explaining import Finding
from fedkl.auditing.fitting import Fit, fits
from fedkl.auditing.recorded import RecordedKind, RecordedUpdate
from fedkl.auditing.subject import LocalLoop, Subject

__all__ = ["Finding", "Fit", "LocalLoop", "RecordedKind", "RecordedUpdate", "Subject", "fits"]
