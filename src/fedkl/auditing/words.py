"""What findings say, in plain words: one wording for the page, the terminal and what machines are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from fedkl.aggregation import MaskedAggregation
from fedkl.attacking.verdict import SHOWN
from fedkl.auditing.results import Audit, Finding, NotRun, Outcome, Question

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
    "presence": "the server recognizes {share} at {alarms} false alarms",
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

_DID: dict[Question, str] = {
    "rebuilt": "rebuilt",
    "identified": "told from many others",
    "presence": "recognized",
    "labels": "told the class of",
}
"""What an attacker did, before a number of images."""

OUTCOMES: dict[Outcome, str] = {outcome: SHOWN[outcome] for outcome in get_args(Outcome)}
"""Outcomes as readers are shown them."""

ATTACKERS = {
    "presence": "recognizing given images",
    "positions": "reading off a vision transformer's positions",
    "linear-rows": "reading off a linear layer",
    "disaggregation": "taking a sum of images apart",
    "closed-form": "solving layer by layer",
    "feature-inversion": "turning features back into images",
    "matching": "trying pictures until the gradient fits",
    "learned": "a network trained to rebuild",
    "gauss-newton": "solving for the pixels",
}
"""What attackers do, for those who know no term of the field; others have their own name."""

_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_MEMBERS = "Only the server was attacked. What members read of the sum was not tried."

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
MORE_THAN_CHANCE = "More images are recognized than by chance, but not surely at few false alarms."


class Verdict(NamedTuple):
    """The audit in one sentence, and how it sounds."""

    tone: Tone
    text: str


def sentence(finding: Finding) -> str:
    """A finding as one sentence, e.g. "Of your client's images, the server recognizes 67 % [61–72 %] …"."""
    share = _DONE[finding.question].format(share=interval(finding), alarms=_alarms(finding))
    area = finding.figures.get("auc")
    beside = f" (AUC {area:.2f})" if finding.question == "presence" and area is not None else ""
    return f"Of your client's images, {share}{beside}."


def plainly(finding: Finding) -> str:
    """The same for who reads no intervals, e.g. "… about 67 of 100 of a client's images (61 to 72) …"."""
    found = finding.found
    rate, low, high = (round(100 * each) for each in (found.rate, found.low, found.high))
    hits = round(found.rate * found.n)
    about = f"about {rate} of 100" if rate or not hits else f"{hits} of {found.n}"
    share = f"{about} of a client's images ({low} to {high})"
    said = _PLAINLY[finding.question].format(share=share)
    if finding.question == "presence" and finding.floor is not None:
        said += f" Of images that the client does not have: {round(100 * finding.floor.rate)} of 100."
    return said


def _alarms(finding: Finding) -> str:
    """As set, or as measured where that is more: few images set the threshold roughly."""
    return f"{max(1, round(100 * finding.figures.get('false_alarms', 0.0)))} %"


def judged(finding: Finding) -> str:
    """The outcome as it is shown; with the reason where nothing could be decided."""
    return f"{OUTCOMES[finding.outcome]}{because(finding)}"


def because(finding: Finding) -> str:
    """The reason, behind a colon, where nothing could be decided; else nothing."""
    return f": {finding.reason}" if finding.outcome == "says nothing" else ""


def attacker(name: str) -> str:
    """What an attacker does, e.g. "reading off a linear layer"."""
    return ATTACKERS.get(name, name)


def control(audit: Audit) -> str:
    """What attackers are held against here, e.g. "without masks"."""
    return f"without {_hidden_by(audit)}" if protections(audit) else "of one image alone"


def _hidden_by(audit: Audit) -> str:
    defense, masking = audit.settings.defense, audit.settings.masking
    names = [*([] if defense == "none" else [defense]), *([] if masking == "none" else ["masks"])]
    return " and ".join(names)


def reason(audit: Audit, finding: Finding) -> str:
    """Why it is judged so, with the name of what it is held against: readers know no control."""
    exposure = audit.exposure(finding.exposure)
    where = f"images {control(audit)}" if protections(audit) else "images sent alone"
    alone = exposure.images == exposure.clients == 1 and not protections(audit)
    missing = "no easier case shows whether the attack works" if alone else f"it was not tried on {where}"
    text = finding.reason.replace("its control was not attacked", missing)
    return text.replace("of its control", where).replace("from its control,", f"from {where},")


def counted(finding: Finding) -> str:
    """E.g. "0 of 96 rebuilt"."""
    found = finding.found
    return f"{round(found.rate * found.n)} of {found.n} {COUNTED[finding.question]}"


def told(audit: Audit, finding: Finding) -> str:
    """The outcome as a sentence, e.g. "It leaks: 88 of 100 told from many others."."""
    if finding.outcome == "says nothing":
        return f"Undecided: {counted(finding)}; {reason(audit, finding)}."
    said = "It leaks" if finding.outcome == "leaks" else "No leak is seen"
    easier = "" if audit.exposure(finding.exposure).headline else " in this easier case"
    return f"{said}{easier}: {counted(finding)}."


def title(audit: Audit) -> str:
    """What was audited, behind what, and when; e.g. "What does mine leak with blind masks? (2026-11-29)"."""
    day = audit.summary.date if audit.summary is not None else "interrupted"
    behind = f"with {' and '.join(protections(audit))}" if protections(audit) else "without a defense"
    return f"What does {audit.settings.subject} leak {behind}?{f' ({day})' if day else ''}"


def protections(audit: Audit) -> list[str]:
    """The defense and the masks, in words; empty where there are none."""
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
    if plain and found.tone == "good":
        found = Verdict("good", _seen(audit))
    if audit.summary is None:
        return Verdict(
            "bad" if found.tone == "bad" else "open", f"Interrupted, not all was tried. {found.text}"
        )
    return found


def _why_no_presence(audit: Audit) -> list[str]:
    """Presence is tried in any case: what kept it from a result, if anything did."""
    return [each.reason for each in _without_presence(audit)[:1]]


def _without_presence(audit: Audit) -> list[NotRun]:
    real = _real(audit)
    return [each for each in audit.not_run if each.attacker == "presence" and each.exposure in real]


def _real(audit: Audit) -> set[str]:
    """Names of what clients really send."""
    return {exposure.name for exposure in audit.settings.exposures if exposure.headline}


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
    if any(each.figures.get("auc_surely", 0.0) > 0.5 for each in real):
        return Verdict("open", f"{NO_LEAK} for sure. {MORE_THAN_CHANCE}")
    untested = _without_presence(audit)
    if untested:
        title = audit.exposure(untested[0].exposure).title
        because = untested[0].reason.rstrip(".")
        return Verdict("open", f"{NO_LEAK}, but presence was not tested on {title}. {because}.")
    able = failures(audit).able
    if able:
        return Verdict(
            "good", f"{NO_LEAK} by {', '.join(able)}, which would find one where nothing is hidden."
        )
    where = " in all of it" if len(_real(audit)) > 1 else ""
    return Verdict("open", f"{NO_LEAK}, but no attacker was shown to be able to find one{where}.")


def _seen(audit: Audit) -> str:
    """How many attackers could be tried, and the most that one of them saw; of an audit without a leak.

    E.g. "One of nine attackers could be tried on what your clients send. It recognized 0 to 1 of 100 images;
    without masks 61.".
    """
    real = audit.headlines()
    tried = len({each.attacker for each in real})
    every = len({each.attacker for each in audit.findings} | {each.attacker for each in audit.not_run})
    found_nothing = failures(audit)
    judged = [each for each in real if each.attacker in found_nothing.able]
    worst = max(judged, key=lambda each: each.found.high)
    low, high = (round(100 * each) for each in (worst.found.low, worst.found.high))
    who = "It" if tried == 1 else "The best of them"
    if found_nothing.undecided:
        who = "Of those that can be judged, the best"
    found = f"{who} {_DID[worst.question]} {low} to {high} of 100 images"
    if worst.control is not None:
        found += f"; {control(audit)} {round(100 * worst.control.rate)}"
    undecided = [each for each in real if each.outcome == "says nothing"]
    missing = "".join(f" Undecided, {attacker(each.attacker)}: {counted(each)}." for each in undecided)
    begin = f"{_spelled(tried).capitalize()} of {_spelled(every)} attackers could be"
    if tried == every:
        begin = "The only attacker was" if every == 1 else f"All {_spelled(every)} attackers were"
    return f"{begin} tried on what your clients send. {found}.{missing}"


def _spelled(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


class Failures(NamedTuple):
    """Attackers without a leak in what clients really send, by name: each is in one of the three.

    Of that there may be several things, e.g. single updates and sums: able is who found nothing in any of
    them, and undecided who was tried on some only.
    """

    able: list[str]
    undecided: list[str]
    no_result: list[str]


def failures(audit: Audit) -> Failures:
    """Who found nothing although able to, of whom nothing can be said, and who was not tried or broke."""
    real = _real(audit)
    outcomes: dict[str, set[Outcome]] = {}
    tried: dict[str, set[str]] = {}
    for finding in audit.findings:
        headline = finding.exposure in real
        outcomes.setdefault(finding.attacker, set()).update([finding.outcome] if headline else [])
        tried.setdefault(finding.attacker, set()).update([finding.exposure] if headline else [])
    for missing in audit.not_run:
        outcomes.setdefault(missing.attacker, set())
    quiet = {name: found for name, found in outcomes.items() if "leaks" not in found}
    able = [name for name, found in quiet.items() if found == {"at the floor"} and tried[name] == real]
    return Failures(
        able=able,
        undecided=[name for name, found in quiet.items() if found and name not in able],
        no_result=[name for name, found in quiet.items() if not found],
    )


def caution(audit: Audit, *, plain: bool = False) -> str:
    """That nothing found is not safe: who failed, of whom nothing can be said, and who was not tried.

    Args:
        audit: What was found.
        plain: Whether it is said what attackers do, in place of their names, and who was no attacker.
    """
    found = failures(audit)
    named = attacker if plain else str
    members = [_MEMBERS] if plain and audit.settings.masking in ("blind", "both") else []
    lists = {
        "Found nothing in your setting, although able to": found.able,
        "Undecided": found.undecided,
        "Not tried there, or without a result": found.no_result,
    }
    said = [f"{what}: {', '.join(map(named, names))}." for what, names in lists.items() if names]
    return " ".join([NOT_SAFE, *members, *said])
