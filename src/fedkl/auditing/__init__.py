"""What somebody's own federated training leaks: subjects, attackers, a plan, findings.

subject.py    what is audited
"""

from fedkl.auditing.subject import LocalLoop, Subject

__all__ = ["LocalLoop", "Subject"]
