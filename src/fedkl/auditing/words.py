"""What findings say, in plain words: one wording for the page, the terminal and what machines are given."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from fedkl.aggregation import MaskedAggregation
from fedkl.attacking.verdict import SHOWN
from fedkl.auditing.results import Audit, Exposure, Finding, Masking, Outcome, Question

Tone = Literal["good", "bad", "open"]

QUESTIONS: dict[Question, str] = {
    "rebuilt": "Rebuilt as pictures",
    "identified": "Told from many others",
    "presence": "Recognized as trained on",
    "labels": "Class told",
}
"""What a share is of, as a table has it."""

_NO_RESULT = "This audit has no result for what your clients really send."

_DONE: dict[Question, str] = {
    "rebuilt": "the server rebuilds {share} as pictures",
    "identified": "the server makes pictures by which {share} are told from many others",
    "presence": "the server recognizes {share} at 1 % false alarms",
    "labels": "the server tells the class of {share}",
}

_PLAINLY: dict[Question, str] = {
    "rebuilt": "The server rebuilds {share} as pictures.",
    "identified": "The server makes pictures by which {share} are told from many others.",
    "presence": "The server recognizes {share} as trained on.",
    "labels": "The server tells the class of {share}.",
}

COUNTED: dict[Question, str] = {
    "rebuilt": "rebuilt",
    "identified": "told from many others",
    "presence": "recognized",
    "labels": "told by class",
}
"""What happened to images that are counted, e.g. "0 of 96 rebuilt"."""

OUTCOMES: dict[Outcome, str] = {outcome: SHOWN[outcome] for outcome in get_args(Outcome)}
"""Outcomes as readers are shown them."""

_LEFT: dict[Masking, str] = {
    "none": "",
    "blind": "members see the sum, a member who works with the server reads every update",
    "pairwise": "everyone sees the sum, a member who works with the server the sum less its own update",
    "both": "members see the sum, a member who works with the server the sum less its own update",
}
"""What masks leave to be seen, by their mode; source: the table of modes in docs/masked.md."""

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


def plainly(finding: Finding) -> str:
    """The same for who reads no intervals, e.g. "… about 67 of 100 of a client's images (61 to 72) …"."""
    found = finding.found
    rate, low, high = (round(100 * each) for each in (found.rate, found.low, found.high))
    share = f"about {rate} of 100 of a client's images ({low} to {high})"
    return _PLAINLY[finding.question].format(share=share)


def judged(finding: Finding) -> str:
    """The outcome as it is shown; with the reason where nothing could be decided."""
    return f"{OUTCOMES[finding.outcome]}{because(finding)}"


def because(finding: Finding) -> str:
    """The reason, behind a colon, where nothing could be decided; else nothing."""
    return f": {finding.reason}" if finding.outcome == "says nothing" else ""


def title(audit: Audit) -> str:
    """What was audited, behind what, and when; e.g. "What does mine leak with blind masks? (2026-11-29)"."""
    day = audit.summary.date if audit.summary is not None else "interrupted"
    behind = f"with {' and '.join(_protections(audit))}" if _protections(audit) else "without a defense"
    return f"What does {audit.settings.subject} leak {behind}?{f' ({day})' if day else ''}"


def _protections(audit: Audit) -> list[str]:
    defense, masking = audit.settings.defense, audit.settings.masking
    masks = [] if masking == "none" else [MaskedAggregation(mode=masking).describe()]
    return [*([] if defense == "none" else [defense]), *masks]


def interval(finding: Finding) -> str:
    """The share with its interval, e.g. "67 % [61–72 %]"."""
    return finding.found.percent.partition(", n")[0]


def verdict(audit: Audit, *, plain: bool = False) -> Verdict:
    """The worst that was found of what really happens; else what can be said at all.

    Args:
        audit: What was found.
        plain: Whether shares are said without percent, false alarms and AUC.
    """
    found = _verdict(audit, plainly if plain else sentence)
    if audit.summary is None:
        return Verdict(
            "bad" if found.tone == "bad" else "open", f"Interrupted, not all was tried. {found.text}"
        )
    return found


def _why_no_presence(audit: Audit) -> list[str]:
    """Presence is tried in any case: what kept it from a result, if anything did."""
    real = {exposure.name for exposure in audit.settings.exposures if exposure.headline}
    missing = [each for each in audit.not_run if each.attacker == "presence" and each.exposure in real]
    return [each.reason for each in missing[:1]]


def _verdict(audit: Audit, said: Callable[[Finding], str]) -> Verdict:
    real = audit.headlines()
    bounds = [each for each in audit.worst_first() if each not in real and each.outcome == "leaks"]
    if real and real[0].outcome == "leaks":
        return Verdict("bad", said(real[0]))
    if not real:
        return Verdict("open", " ".join([_NO_RESULT, *_why_no_presence(audit)]))
    if bounds:
        title = audit.exposure(bounds[0].exposure).title
        return Verdict("open", f"{NO_LEAK}. Upper bound, {title}: {said(bounds[0])}")
    able = dict.fromkeys(each.attacker for each in real if each.outcome == "at the floor")
    if able:
        return Verdict(
            "good", f"{NO_LEAK} by {', '.join(able)}, which would find one where nothing is hidden."
        )
    return Verdict("open", f"{NO_LEAK}, but no attacker was shown to be able to find one.")


class Failures(NamedTuple):
    """Attackers without a leak in what clients really send, by name: each is in one of the three."""

    able: list[str]
    undecided: list[str]
    no_result: list[str]


def failures(audit: Audit) -> Failures:
    """Who found nothing although able to, of whom nothing can be said, and who was not tried or broke."""
    outcomes: dict[str, set[Outcome]] = {}
    for finding in audit.findings:
        real = audit.exposure(finding.exposure).headline
        outcomes.setdefault(finding.attacker, set()).update([finding.outcome] if real else [])
    for missing in audit.not_run:
        outcomes.setdefault(missing.attacker, set())
    quiet = {name: found for name, found in outcomes.items() if "leaks" not in found}
    return Failures(
        able=[name for name, found in quiet.items() if found == {"at the floor"}],
        undecided=[name for name, found in quiet.items() if "says nothing" in found],
        no_result=[name for name, found in quiet.items() if not found],
    )


def caution(audit: Audit) -> str:
    """That nothing found is not safe: who failed, of whom nothing can be said, and who was not tried."""
    found = failures(audit)
    lists = {
        "Found nothing in your setting, although able to": found.able,
        "Undecided": found.undecided,
        "Not tried there, or without a result": found.no_result,
    }
    return " ".join([NOT_SAFE, *(f"{what}: {', '.join(names)}." for what, names in lists.items() if names)])


class Step(NamedTuple):
    """Advice, and the command that it comes down to, if there is one."""

    text: str
    command: str | None = None


def next_steps(audit: Audit) -> list[Step]:
    """What would help, as far as this audit measured it: nothing is said from hearsay."""
    leaks = [each for each in audit.headlines() if each.outcome == "leaks"]
    first = {each.question: each for each in reversed(leaks)}
    steps = [Step(text) for each in leaks if first[each.question] is each for text in _helps(audit, each)]
    if leaks and _protections(audit):
        steps += [_of_defense(audit, leaks[0])]
    if leaks and audit.settings.masking == "none":
        text = "Ask your engineers to repeat this audit with masks:"
        steps += [Step(text, command(audit, masking="blind"))]
    if audit.settings.masking != "none":
        left = _LEFT[audit.settings.masking]
        steps += [Step(f"What masks leave: {left}. Look after the members' keys: docs/masked.md.")]
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


def _of_defense(audit: Audit, leak: Finding) -> Step:
    defense = " and ".join(_protections(audit))
    if leak.control is None or leak.found.high >= leak.control.low:
        return Step(
            f"What was measured with {defense} leaks all the same: {interval(leak)}. Measure another defense."
        )
    control = leak.control.percent.partition(", n")[0]
    return Step(f"With {defense}, {control} became {interval(leak)}: it helps, and it is not enough.")


def command(audit: Audit, *, masking: Masking | None = None) -> str:
    """What repeats the audit, on the command line or in Python.

    Args:
        audit: Which.
        masking: Repeats it with masks instead, on clients that are simulated: recorded updates have none.
    """
    settings = audit.settings
    if masking is not None:
        settings = settings.model_copy(update={"masking": masking, "recorded": ()})
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
