"""What findings say, in plain words: one wording for the page, the terminal and what machines are given."""

from __future__ import annotations

import shlex
from typing import Literal, NamedTuple

from fedkl.auditing.results import Audit, Exposure, Finding, Question

Tone = Literal["good", "bad", "open"]

QUESTIONS: dict[Question, str] = {
    "rebuilt": "Rebuilt as pictures",
    "identified": "Told from many others",
    "presence": "Recognized as trained on",
    "labels": "Class told",
}
"""What a share is of, as a table has it."""

_DONE: dict[Question, str] = {
    "rebuilt": "the server rebuilds {share} as pictures",
    "identified": "the server makes pictures by which {share} are told from many others",
    "presence": "the server recognizes {share} at 1 % false alarms",
    "labels": "the server tells the class of {share}",
}

THREAT_MODELS = {
    "A": "anyone who reads the update on its way, with nothing else",
    "B": "whoever reads the update and has basic knowledge of the training, like the server",
    "C": "whoever reads the update and knows how clients train, like the server",
    "D": "whoever reads the update, knows how clients train and has similar images, like the server",
    "E": "whoever reads the update, knows how clients train, and has similar images and statistics of theirs",
    "F": "a server that sends manipulated models and knows how clients train",
    "G": "a server that sends manipulated models, knows how clients train and has similar images",
    "H": "a server that sends manipulated models to clients that it chooses, and has similar images",
}
"""Who could do it, by letter.

Source:
    Carletti et al., "SoK: Gradient Inversion Attacks in Federated Learning", USENIX Security 2025; the table
    of threat models in the authors' repository, github.com/gparrella12/sok_gias_fl.
"""

NOT_SAFE = "Nothing found is not safe: other attacks, or more time, may find more."

NO_LEAK = "In what your clients really send, no leak was found"


class Verdict(NamedTuple):
    """The audit in one sentence, and how it sounds."""

    tone: Tone
    text: str


def sentence(finding: Finding) -> str:
    """A finding as one sentence, e.g. "Of your client's images, the server recognizes 67 % [61–72 %] …"."""
    share = _DONE[finding.question].format(share=interval(finding))
    area = finding.figures.get("auc")
    beside = f" (AUC {area:.2f})" if finding.question == "presence" and area is not None else ""
    return f"Of your client's images, {share}{beside}."


def interval(finding: Finding) -> str:
    """The share with its interval, e.g. "67 % [61–72 %]"."""
    return finding.found.percent.partition(", n")[0]


def verdict(audit: Audit) -> Verdict:
    """The worst that was found of what really happens; else what can be said at all."""
    found = _verdict(audit)
    if audit.summary is None:
        return Verdict(
            "bad" if found.tone == "bad" else "open", f"Interrupted, not all was tried. {found.text}"
        )
    return found


def _verdict(audit: Audit) -> Verdict:
    real = audit.headlines()
    bounds = [each for each in audit.worst_first() if each not in real and each.outcome == "leaks"]
    if real and real[0].outcome == "leaks":
        return Verdict("bad", sentence(real[0]))
    if not real:
        return Verdict("open", "This audit has no result for what your clients really send.")
    if bounds:
        title = audit.exposure(bounds[0].exposure).title
        return Verdict("open", f"{NO_LEAK}. Upper bound, {title}: {sentence(bounds[0])}")
    able = dict.fromkeys(each.attacker for each in real if each.outcome == "at the floor")
    if able:
        return Verdict(
            "good", f"{NO_LEAK} by {', '.join(able)}, which would find one where nothing is hidden."
        )
    return Verdict("open", f"{NO_LEAK}, but no attacker was shown to be able to find one.")


def failed(audit: Audit) -> list[str]:
    """Attackers that found no leak anywhere, by name."""
    names = dict.fromkeys(each.attacker for each in audit.findings)
    leaking = {each.attacker for each in audit.findings if each.outcome == "leaks"}
    return [name for name in names if name not in leaking]


def not_tried(audit: Audit) -> list[str]:
    """Attackers that came to no figures anywhere, by name."""
    found = {each.attacker for each in audit.findings}
    return list(dict.fromkeys(each.attacker for each in audit.not_run if each.attacker not in found))


def caution(audit: Audit) -> str:
    """That nothing found is not safe: who failed, and who was not tried."""
    parts = [NOT_SAFE]
    if failed(audit):
        parts.append(f"Found nothing here: {', '.join(failed(audit))}.")
    if not_tried(audit):
        parts.append(f"Came to no result: {', '.join(not_tried(audit))}.")
    return " ".join(parts)


def next_steps(audit: Audit) -> list[str]:
    """What would help, as far as this audit measured it: nothing is said from hearsay."""
    leaks = [each for each in audit.headlines() if each.outcome == "leaks"]
    first = {each.question: each for each in reversed(leaks)}
    steps = [text for each in leaks if first[each.question] is each for text in _helps(audit, each)]
    if leaks:
        steps += [_of_defense(audit, leaks[0])]
    return steps


def _helps(audit: Audit, leak: Finding) -> list[str]:
    """Exposures of which the same attacker, and every other, gets surely less."""
    texts = []
    for exposure in audit.settings.exposures:
        found = [
            each
            for each in audit.findings
            if (each.question, each.exposure) == (leak.question, exposure.name) and exposure.trained
        ]
        if leak.attacker not in {each.attacker for each in found} or exposure.name == leak.exposure:
            continue
        worst = max(found, key=lambda each: each.found.low)
        if max(each.found.high for each in found) < leak.found.low:
            texts.append(
                f"{QUESTIONS[leak.question]}: {interval(leak)} became at most {interval(worst)} with "
                f"{exposure.title}{_changes(audit.exposure(leak.exposure), exposure)}."
            )
    return texts


def _changes(now: Exposure, then: Exposure) -> str:
    """E.g. " (16 images instead of 1)"."""
    counts = [
        f"{getattr(then, name)} {name} instead of {getattr(now, name)}"
        for name in ("images", "steps", "clients")
        if getattr(then, name) != getattr(now, name)
    ]
    return f" ({', '.join(counts)})" if counts else ""


def _of_defense(audit: Audit, leak: Finding) -> str:
    settings = audit.settings
    named = [word for word in (settings.defense, f"masking {settings.masking}") if not word.endswith("none")]
    defense = " and ".join(named)
    if not named:
        return "No defense was measured: fedkl audit with --defense or --masking does, on your model."
    if leak.control is None or leak.found.high >= leak.control.low:
        return (
            f"What was measured with {defense} leaks all the same: {interval(leak)}. Measure another defense."
        )
    control = leak.control.percent.partition(", n")[0]
    return f"With {defense}, {control} became {interval(leak)}: it helps, and it is not enough."


def command(audit: Audit) -> str:
    """What repeats the audit, on the command line or in Python."""
    settings = audit.settings
    changed = {
        name: getattr(settings, name) for name in ("defense", "masking") if getattr(settings, name) != "none"
    }
    if ":" not in settings.target:  # a subject that was never on the command line
        sizes = {} if settings.recorded else {"batch_sizes": settings.batch_sizes}
        values = {**changed, **sizes, "minutes": settings.minutes, "seed": settings.seed}
        options = "".join(f", {name}={value!r}" for name, value in values.items())
        call = "audit_recorded(subject, clients" if settings.recorded else "audit(subject"
        return f"fedkl.auditing.{call}, out=NEW{options})"
    words = ["fedkl", "audit", settings.target, "--out", "NEW"]
    for name, value in changed.items():
        words += [f"--{name}", value]
    words += ["--recorded", "UPDATES", "--members", "MEMBERS"] if settings.recorded else []
    words += ["--batch-size", ",".join(map(str, settings.batch_sizes))] if settings.batch_sizes else []
    words += ["--minutes", f"{settings.minutes:g}", "--seed", str(settings.seed)]
    return shlex.join(words)
