"""Whether an audit passes: limits on intervals of what really happens, or an earlier audit as the limit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

from fedkl.attacking.floor import CANDIDATES
from fedkl.auditing.attackers import PRESENCE
from fedkl.auditing.results import Audit, Cause, Finding, Question, Settings
from fedkl.errors import ConfigError, gathered, shown

State = Literal["crossed", "passed", "undecided", "missing"]

QUANTITIES: Mapping[str, Question] = {
    "recovered": "rebuilt",
    "identified": "identified",
    "presence_tpr": "presence",
    "presence_auc": "presence",
    "labels": "labels",
}
"""What can be limited, and the question whose share it is, or beside whose share it stands."""

_MANY = 10**6  # trials that nobody runs
_EVIDENCE: tuple[Cause, ...] = ("broke", "no time left")

_FLOORS = {
    "presence_tpr": (
        "of images that the client does not have",
        "the test is too rough for this limit. Give more images.",
    ),
    "identified": (
        "without the update",
        "the limit is below what chance gives. Raise it above that, or leave it out.",
    ),
    "recovered": (
        "without the update",
        "the images are so alike that a guess rebuilds them. Raise the limit above that, or leave it out.",
    ),
}
"""By quantity: what is found without a leak, in words, and what to do about a limit below it."""

_PICTURES = ("recovered", "identified")

_NOT_ALL = "not all attackers of pictures came to an end on what clients really send"

_CONTENTS = {
    "images_fingerprint": "images and labels",
    "training_fingerprint": "network and procedure",
}
"""Hashes of settings, and what they are of: what has to be the same in a baseline."""

_CAUSES: dict[Cause, str] = {
    "does not apply": "not applicable",
    "too large": "too large",
    "broke": "broken off",
    "no time left": "without time",
}


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Gate:
    """Limits by quantity, each in [0, 1]; none at all: only that there is evidence is asked.

    Raises:
        ConfigError: A quantity is unknown, or a limit is not in [0, 1].

    >>> Gate.parse("presence_tpr=0.2").limits["presence_tpr"]
    0.2
    """

    limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [
            f"{shown(name)}: no such quantity; expected one of {', '.join(QUANTITIES)}"
            for name in self.limits
            if name not in QUANTITIES
        ]
        problems += [
            f"{name}: expected a limit from 0 to 1, got {limit}"
            for name, limit in self.limits.items()
            if name in QUANTITIES and not 0 <= limit <= 1
        ]
        if problems:
            raise ConfigError(gathered(_UNUSABLE, problems, _REMEDY))
        object.__setattr__(self, "limits", MappingProxyType(dict(self.limits)))

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Reads ``name=limit,name=limit``.

        Raises:
            ConfigError: It is none, names a quantity twice, or one that there is not.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = (word.strip() for word in part.partition("="))
            try:
                limit = float(number)
            except ValueError:
                problem = f"{shown(part)}: expected a name and a number, e.g. presence_tpr=0.2"
                raise ConfigError(gathered(_UNUSABLE, [problem], _REMEDY)) from None
            if name in limits:
                raise ConfigError(gathered(_UNUSABLE, [f"{name}: named twice"], _REMEDY))
            limits[name] = limit
        return cls(limits)


_UNUSABLE = "The limits are not usable."
_REMEDY = "Give e.g. presence_tpr=0.2, or several as recovered=0.05,presence_tpr=0.2."


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure against one limit.

    Attributes:
        state: What came of it.
        text: In one sentence, with the numbers.
        quantity: What was limited; None: the audit as a whole.
        limit: Of that; None: it was compared with an earlier audit.
        finding: Whose figure it is; None where there is none.
    """

    state: State
    text: str
    quantity: str | None = None
    limit: float | None = None
    finding: Finding | None = None


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """What came of all checks."""

    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> Literal[0, 1, 3]:
        """1: a limit was crossed; 3: none was as far as can be said, but evidence is missing; 0: neither."""
        states = {check.state for check in self.checks}
        return 1 if "crossed" in states else 3 if states & {"undecided", "missing"} else 0

    @property
    def reasons(self) -> list[str]:
        """Why it did not pass: crossed limits first, then what evidence is missing."""
        states: tuple[State, ...] = ("crossed", "undecided", "missing")
        return [check.text for state in states for check in self.checks if check.state == state]

    @property
    def limits(self) -> list[Check]:
        """What came of each limit: the check that decides it; of several, that of the highest figure."""
        held = [check for check in self.checks if check.limit is not None]
        order: tuple[State, ...] = ("crossed", "undecided", "missing", "passed")
        return [
            min(
                (check for check in held if check.quantity == quantity),
                key=lambda check: (order.index(check.state), -_height(check)),
            )
            for quantity in dict.fromkeys(check.quantity for check in held)
        ]

    def crossed(self, finding: Finding) -> list[str]:
        """The limits that a finding crosses, in words."""
        return [each.text for each in self.checks if each.state == "crossed" and each.finding is finding]


def _height(check: Check) -> float:
    """The figure that was held against the limit."""
    found = figure(check.finding, check.quantity) if check.finding and check.quantity else None
    return 0.0 if found is None else found.value


def judge(audit: Audit, gate: Gate, *, baseline: Audit | None = None) -> GateResult:
    """Holds an audit against limits.

    A limit counts as crossed where the interval's low end is above it, as kept where the high end is not;
    in between it is undecided. So it is where no more images are recognized than of those that clients do
    not have, or identified than without the update, and the verdict is not that it leaks: the limit is too
    low then. Upper bounds are not looked at. Of pictures evidence is missing where one of their attackers
    broke off or had no time; of presence where it was not measured on all that clients really send, whatever
    the cause. So it is in comparisons with an earlier audit. There "not worse" is undecided, too, where fewer
    images say it than then, and it may be worse.

    Args:
        audit: What was found.
        gate: The limits.
        baseline: An earlier audit of the same, of weights that may have changed: fails where something is
            surely worse now.

    Returns:
        The checks.

    Raises:
        ConfigError: The baseline is of something else.
    """
    checks = list(_evidence(audit))
    for quantity, limit in gate.limits.items():
        checks += _against(audit, quantity, limit)
    if baseline is not None:
        checks += _compared(audit, baseline)
    return GateResult(checks=tuple(checks))


def figure(finding: Finding, quantity: str) -> Interval | None:
    """A finding's figure of a quantity, if it has that one."""
    if finding.question != QUANTITIES[quantity]:
        return None
    if quantity != "presence_auc":
        return Interval(finding.found.rate, finding.found.low, finding.found.high)
    ends = [finding.figures.get(name) for name in ("auc", "auc_low", "auc_high")]
    numbers = [end for end in ends if end is not None]
    return Interval(*numbers) if len(numbers) == len(ends) else None


def _figures(audit: Audit, quantity: str) -> Iterator[tuple[Finding, Interval]]:
    for finding in audit.headlines():
        found = figure(finding, quantity)
        if found is not None:
            yield finding, found


def _evidence(audit: Audit) -> Iterator[Check]:
    if audit.summary is None:
        yield Check(state="missing", text="The audit was interrupted: not everything was tried.")
    if not audit.headlines():
        yield Check(
            state="missing",
            text=f"No attacker came to a result on what clients really send{_because(audit)}.",
        )


def _because(audit: Audit) -> str:
    """E.g. " (of attackers: 2 broken off, 1 without time)"."""
    real = [each for each in audit.not_run if audit.exposure(each.exposure).headline]
    counts = {kind: sum(each.kind == kind for each in real) for kind in dict.fromkeys(e.kind for e in real)}
    order = sorted(counts, key=lambda kind: kind not in _EVIDENCE)
    causes = ", ".join(f"{counts[kind]} {_CAUSES[kind]}" for kind in order)
    return f" (of attackers: {causes})" if causes else ""


def _against(audit: Audit, quantity: str, limit: float) -> Iterator[Check]:
    found = list(_figures(audit, quantity))
    if not found:
        yield Check(
            state="missing",
            text=f"{quantity}: nothing was measured on what clients really send{_because(audit)}.",
            quantity=quantity,
            limit=limit,
        )
    for finding, interval in found:
        place = f"{quantity}, {finding.attacker} on {finding.exposure}: {interval}"
        floor = finding.floor if quantity in _FLOORS else None
        leaks = finding.outcome == "leaks"
        if interval.low > limit and floor is not None and interval.low <= floor.high and not leaks:
            state: State = "undecided"
            what, remedy = _FLOORS[quantity]
            known = Interval(floor.rate, floor.low, floor.high)
            text = f"{place} is above the limit {limit:g}, but no more than {what}, {known}: {remedy}"
        elif interval.low > limit:
            state = "crossed"
            text = f"{place} is above the limit {limit:g}."
        elif interval.high <= limit and (unsaid := _unsaid(finding, quantity)):
            state = "missing"
            text = f"{place} is not above the limit {limit:g}, but {unsaid}."
        elif interval.high <= limit:
            state = "passed"
            unknown = finding.outcome == "says nothing"
            by = f", by an attacker of whom nothing else is known: {finding.reason}" if unknown else ""
            text = f"{place} is not above the limit {limit:g}{by}."
        else:
            state = "undecided"
            text = (
                f"{place} may be on either side of the limit {limit:g}; {_needed(finding, interval, limit)}."
            )
        yield Check(state=state, text=text, quantity=quantity, limit=limit, finding=finding)
    if found and quantity in _PICTURES and (counts := _untried(audit)):
        yield Check(
            state="missing",
            text=f"{quantity}: {_NOT_ALL} ({counts}). Give more minutes, or leave this limit out.",
            quantity=quantity,
            limit=limit,
        )
    if found and QUANTITIES[quantity] == "presence":
        yield from _untested(audit, quantity, limit)


def _unsaid(finding: Finding, quantity: str) -> str:
    """Why a share of pictures that is low says nothing; empty if it does."""
    broke, candidates = (int(finding.figures.get(name, 0)) for name in ("broke", "candidates"))
    if quantity in _PICTURES and broke:
        return f"the attack broke on {broke} of {finding.found.n} images"
    if quantity == "identified" and 0 < candidates < CANDIDATES:
        return f"it is told from {candidates} images, not from {CANDIDATES}. Give more images"
    return ""


def _untried(audit: Audit) -> str:
    """How many attackers of pictures could have found more, had they come to an end; empty if none."""
    kinds = dict.fromkeys(_EVIDENCE, 0)
    for each in audit.not_run:
        if each.kind in kinds and each.attacker != PRESENCE and audit.exposure(each.exposure).headline:
            kinds[each.kind] += 1
    return ", ".join(f"{count} {_CAUSES[kind]}" for kind, count in kinds.items() if count)


def _untested(audit: Audit, quantity: str, limit: float | None) -> Iterator[Check]:
    """What clients really send and presence was not measured of: no cause says that nothing leaks there."""
    measured = {finding.exposure for finding, _ in _figures(audit, quantity)}
    for exposure in audit.settings.exposures:
        if exposure.headline and exposure.name not in measured:
            causes = [
                f" ({_CAUSES[each.kind]}). {each.reason.rstrip('.')}"
                for each in audit.not_run
                if (each.attacker, each.exposure) == (PRESENCE, exposure.name)
            ]
            text = f"{quantity}: nothing was measured on {exposure.name}{''.join(causes)}."
            text += " Correct this." if limit is None else " Correct this, or leave this limit out."
            yield Check(state="missing", text=text, quantity=quantity, limit=limit)


def _needed(finding: Finding, interval: Interval, limit: float) -> str:
    """How many trials would decide it, if the value stays: an interval's width goes with 1/√n."""
    distance = abs(interval.value - limit)
    reach = abs((interval.high if limit > interval.value else interval.low) - interval.value)
    trials = math.inf if distance == 0 else finding.found.n * (reach / distance) ** 2
    if trials > _MANY:
        return "no number of trials that can be run would decide it"
    digits = 1 - math.floor(math.log10(trials))
    rounded = math.ceil(trials * 10.0**digits) / 10.0**digits
    more = "minutes" if finding.cut_short else "images"
    return f"about {rounded:.0f} trials would decide it, {finding.found.n} were run: give more {more}"


def check_baseline(settings: Settings, baseline: Audit) -> None:
    """Whether an audit may be held against an earlier one; its settings suffice, so this is known before it.

    Weights may differ: a network that was trained further is what a baseline is for.

    Args:
        settings: What is audited, and how.
        baseline: The earlier audit.

    Raises:
        ConfigError: That is of something else; the message lists what differs.
    """
    differences = _differences(settings, baseline.settings)
    if differences:
        raise ConfigError(
            gathered(
                "The baseline is of something else.",
                differences,
                "Give the folder of an audit of the same, or make a new baseline.",
            )
        )


def _compared(audit: Audit, baseline: Audit) -> Iterator[Check]:
    check_baseline(audit.settings, baseline)
    for quantity in QUANTITIES:
        now, then = ({_key(f): (f, i) for f, i in _figures(each, quantity)} for each in (audit, baseline))
        for key in dict.fromkeys([*now, *then]):
            place = f"{quantity}, {key[0]} on {key[1]}"
            if key not in now or key not in then:
                which = "this audit" if key not in now else "the baseline"
                finding = now[key][0] if key in now else None
                text = f"{place}: {which} has no such figure to compare."
                yield Check(state="missing", text=text, quantity=quantity, finding=finding)
                continue
            (finding, interval), before = now[key], then[key][1]
            state, text = _grown(finding, interval, earlier=then[key][0], before=before, quantity=quantity)
            yield Check(state=state, text=f"{place}: {text}", quantity=quantity, finding=finding)
        if now and QUANTITIES[quantity] == "presence":
            yield from _untested(audit, quantity, None)
    if counts := _untried(audit):
        said = (
            f"{_NOT_ALL[0].upper()}{_NOT_ALL[1:]} ({counts}): whether more is found than before is not known."
        )
        yield Check(state="missing", text=f"{said} Give more minutes, or mend what broke.")


def _grown(
    finding: Finding, interval: Interval, *, earlier: Finding, before: Interval, quantity: str
) -> tuple[State, str]:
    """Whether a figure is worse than before, and that in words."""
    if interval.low > before.high:
        return "crossed", f"{interval}, worse than before, {before}."
    text = f"{interval}, not surely worse than before, {before}"
    if unsaid := _unsaid(finding, quantity):
        return "missing", f"{text}, but {unsaid}."
    now, then = finding.found.n, earlier.found.n
    if interval.high > before.high and now < then:
        return "undecided", f"{text}, but {now} images say so, {then} then. Give more minutes."
    return "passed", f"{text}."


def _key(finding: Finding) -> tuple[str, str]:
    return finding.attacker, finding.exposure


def _differences(now: Settings, then: Settings) -> list[str]:
    """What is not the same of two audits whose figures shall be compared."""
    names = ("subject", "images", "classes", "defense", "masking", "fedkl")
    found = {name: (getattr(now, name), getattr(then, name)) for name in names}
    for name in sorted({*now.environment, *then.environment}):
        found[name] = (now.environment.get(name), then.environment.get(name))
    texts = [f"{name}: {a} now, {b} then" for name, (a, b) in found.items() if a != b]
    for name, what in _CONTENTS.items():
        prints = getattr(now, name), getattr(then, name)
        if None not in prints and prints[0] != prints[1]:  # older files have none
            texts.append(f"{what}: not those of then")
    ours, theirs = ({each.name: each for each in each.exposures} for each in (now, then))
    texts += [
        f"exposure {name}: {'not in one of them' if name not in ours or name not in theirs else 'differs'}"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
    return texts
