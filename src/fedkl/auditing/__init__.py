"""What somebody's own federated training leaks.

subject.py      what is audited; target.py: the function that a user names, which returns it
defended.py     what its clients do against a curious server, as one text
clients.py      its clients, real ones and those that the server plays
rows.py         what goes into and comes back out of layers
presence.py     whether an image was trained on; recognition.py: measured on clients that are known
attackers.py    who rebuilds images, in which order; rebuilding.py: how many
plan.py         who is run on what, and why not the others
run.py          the plan carried out, within minutes, into a folder
findings.py     verdicts; results.py: typed records; words.py: in plain words; advice.py: what to do next
gate.py         limits, and what came of them; testing.py: as an assertion
exports/        JUnit XML, SARIF, Markdown, lines for a terminal
recorded/       updates that another system saved, and whether they fit a subject; recordings.py: audited
"""

from fedkl.auditing.advice import next_steps
from fedkl.auditing.gate import Gate, GateResult, judge
from fedkl.auditing.recorded import (
    Fit,
    RecordedKind,
    RecordedUpdate,
    Remark,
    fits,
    read_members,
    read_recorded,
)
from fedkl.auditing.recordings import RecordedClient, Suspected, audit_recorded, suspect
from fedkl.auditing.results import Audit, Exposure, Finding, Measured, NotRun
from fedkl.auditing.run import audit
from fedkl.auditing.subject import LocalLoop, Subject
from fedkl.auditing.testing import assert_no_leak
from fedkl.auditing.words import Verdict, caution, verdict

__all__ = [
    "Audit",
    "Exposure",
    "Finding",
    "Fit",
    "Gate",
    "GateResult",
    "LocalLoop",
    "Measured",
    "NotRun",
    "RecordedClient",
    "RecordedKind",
    "RecordedUpdate",
    "Remark",
    "Subject",
    "Suspected",
    "Verdict",
    "assert_no_leak",
    "audit",
    "audit_recorded",
    "caution",
    "fits",
    "judge",
    "next_steps",
    "read_members",
    "read_recorded",
    "suspect",
    "verdict",
]
