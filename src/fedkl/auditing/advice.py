"""What to do next, from what an audit measured, and the command that repeats it."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from fedkl.auditing import words
from fedkl.auditing.results import Audit, Exposure, Finding, Masking, Settings

_LEFT: dict[Masking, str] = {
    "none": "",
    "blind": "members see the sum, a member who works with the server reads every update",
    "pairwise": "everyone sees the sum, a member who works with the server the sum less its own update",
    "both": "members see the sum, a member who works with the server the sum less its own update",
}
"""What masks leave to be seen, by their mode; source: the table of modes in docs/masked.md."""

_KEYS = "Look after the members' keys: “The protocol of masked sums” (docs/masked.md)."


class Step(NamedTuple):
    """Advice, and the command that it comes down to, if there is one."""

    text: str
    command: str | None = None


def next_steps(audit: Audit) -> list[Step]:
    """What would help, as far as this audit measured it: nothing is said from hearsay."""
    leaks = [each for each in audit.headlines() if each.outcome == "leaks"]
    first = {each.question: each for each in reversed(leaks)}
    steps = [Step(text) for each in leaks if first[each.question] is each for text in _helps(audit, each)]
    if leaks and words.protections(audit):
        steps += [_of_defense(audit, leaks[0])]
    if leaks and audit.settings.masking == "none":
        text = "Ask your engineers to repeat this audit with masks:"
        steps += [Step(text, command(audit, masking="blind"))]
    return [*steps, *_of_masks(audit)]


def _of_masks(audit: Audit) -> list[Step]:
    """What is left to those who have keys, and how it is measured or kept from them."""
    masking = audit.settings.masking
    if masking == "none":
        return []
    steps = [Step(f"Decide who may be a member, for masks leave this: {_LEFT[masking]}. {_KEYS}")]
    if masking == "blind":
        text = "Where a member may work with the server, train with both kinds of masks, blind and pairwise."
        steps += [Step(text)]
    if masking != "pairwise":
        text = "What members read of the sum is measured with pairwise masks, where it is in the open:"
        steps += [Step(text, command(audit, masking="pairwise"))]
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
                f"{words.QUESTIONS[leak.question]}: {words.interval(leak)} became at most "
                f"{words.interval(worst)} with {exposure.title}"
                f"{_changes(audit.exposure(leak.exposure), exposure)}."
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
    defense = " and ".join(words.protections(audit))
    if leak.control is None or leak.found.high >= leak.control.low:
        return Step(
            f"What was measured with {defense} leaks all the same: {words.interval(leak)}. Measure another "
            "defense."
        )
    control = leak.control.percent.partition(", n")[0]
    return Step(f"With {defense}, {control} became {words.interval(leak)}: it helps, and it is not enough.")


def command(audit: Audit, *, masking: Masking | None = None) -> str:
    """What repeats the audit, on the command line or in Python.

    Args:
        audit: Which.
        masking: Repeats it with these masks, on clients that are simulated: recorded updates have none.
    """
    settings = audit.settings
    if masking is not None:
        settings = settings.model_copy(update={"masking": masking, "recorded": (), "anyway": False})
    changed = {
        name: getattr(settings, name) for name in ("defense", "masking") if getattr(settings, name) != "none"
    }
    anyway = {"anyway": True} if settings.anyway else {}
    if not _is_of_the_command_line(settings):
        sizes = {} if settings.recorded else {"batch_sizes": settings.batch_sizes}
        values = {**changed, **sizes, **anyway, "minutes": settings.minutes, "seed": settings.seed}
        options = "".join(f", {name}={value!r}" for name, value in values.items())
        call = "audit_recorded(subject, clients" if settings.recorded else "audit(subject"
        return f"fedkl.auditing.{call}, out=NEW{options})"
    parts = ["fedkl", "audit", settings.target, "--out", "NEW"]
    for name, value in changed.items():
        parts += [f"--{name}", value]
    if settings.recorded:
        parts += ["--recorded", "UPDATES", "--members", "MEMBERS"]
        kind = settings.recorded_kind or "gradient"
        parts += ["--kind", kind] if kind != "gradient" else []
        parts += ["--anyway"] if settings.anyway else []
    parts += ["--batch-size", ",".join(map(str, settings.batch_sizes))] if settings.batch_sizes else []
    parts += ["--minutes", f"{settings.minutes:g}", "--seed", str(settings.seed)]
    return shlex.join(parts)


def _is_of_the_command_line(settings: Settings) -> bool:
    """Whether the target can be given there; else it is the name of a subject, which may have colons, too."""
    place, _, name = settings.target.rpartition(":")
    return bool(place) and name.isidentifier() and settings.target != settings.subject
