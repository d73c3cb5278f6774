"""What somebody's own federated training leaks: subjects, attackers, a plan, findings.

subject.py    what is audited
target.py     the function that a user names, which returns it
results.py    what was found, as typed records
words.py      the same in plain words
gate.py       limits on it, and what came of them
exports/      JUnit XML, SARIF, Markdown, lines for a terminal
testing.py    the limits as an assertion
"""

from fedkl.auditing.subject import LocalLoop, Subject

__all__ = ["LocalLoop", "Subject"]
