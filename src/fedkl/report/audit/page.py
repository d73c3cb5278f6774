"""What the report of an audit consists of; HTML and Markdown are two renderings of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedkl.auditing import advice, words
from fedkl.auditing.results import Audit, Finding, Measured
from fedkl.report.audit.pictures import Gallery, gallery
from fedkl.report.page import Table
from fedkl.wording import NONE, number

OPENING, BESIDE, GALLERIES = 6, 6, 4
"""Pictures that a page opens with; of each further finding; and of how many. So a page stays below 3 MB."""

_TONES: dict[str, words.Tone] = {"leaks": "bad", "at the floor": "good", "says nothing": "open"}

BOUNDS_NOTE = (
    "Upper bounds are settings other than yours, as a rule easier for the server. They are not what happens "
    "at your clients. They show what the attackers can do, and what your settings hide."
)

PRESENCE_NOTE = (
    "Shown an image, the server says whether this client trained on it. It is set to be wrong about 1 in 100 "
    "images that the client does not have; with few images it is wrong more often."
)

AUC_NOTE = (
    "AUC, of images that are recognized: how often the server ranks an image of the client above one that "
    "the client does not have. 0.5 is guessing, 1 is always. Their share is counted at 1 % false alarms."
)

WORDS_NOTE = (
    "Leaks: more than the floor. At the floor: no more, by an attacker that succeeds on the control; of "
    "images that are recognized, surely less than half of what it gets there. Undecided: neither can "
    "be said."
)

NO_PICTURE = "×: no picture that can be seen."

REBUILT = "the server's attempt"
"""What stands below a picture: whether it is the original again, its figures say."""


class Bar(NamedTuple):
    """One finding in the figure."""

    finding: Finding
    question: str
    title: str
    tone: words.Tone
    reason: str

    @classmethod
    def of(cls, audit: Audit, finding: Finding) -> Bar:
        """The same with what it says in words."""
        question, tone = words.QUESTIONS[finding.question], _TONES[finding.outcome]
        return cls(finding, question, _place(audit, finding), tone, words.reason(audit, finding))

    @property
    def alt(self) -> str:
        """The same for those who do not see it."""
        marks = [f"{name} {each.percent}" for name, each in self.marks]
        return "; ".join([f"{self.question}: {self.finding.found.percent}", *marks])

    @property
    def marks(self) -> list[tuple[str, Measured]]:
        """Floor and control, where they were measured."""
        both = (("floor", self.finding.floor), ("control", self.finding.control))
        return [(name, each) for name, each in both if each is not None]


@dataclass(frozen=True, kw_only=True)
class AuditPage:
    """The whole report, in its order.

    Attributes:
        title: Its heading.
        verdict: In one sentence.
        opening: The pictures that it opens with, if pictures leak.
        opening_label: What they show, before they are looked at.
        opening_note: Whose they are, and what came of them.
        presence: Whether images are recognized, in one sentence; None where that was not measured.
        who: Who could do it, and what they need.
        steps: What to do next, as measured.
        caution: What the audit does not say.
        control: What attackers are held against, e.g. "without masks".
        real: Of what clients really send.
        bounds: Upper bounds.
        galleries: Further pictures.
        findings: All shares with their verdicts.
        further: What else was measured of them.
        not_run: Attackers without figures.
        command: What repeats it.
        versions: Seed and versions, in one line.
    """

    title: str
    verdict: words.Verdict
    opening: Gallery | None
    opening_label: str
    opening_note: str
    presence: str | None
    who: list[str]
    steps: list[advice.Step]
    caution: str
    control: str
    real: list[Bar]
    bounds: list[Bar]
    galleries: list[tuple[str, Gallery]]
    findings: Table
    further: Table
    not_run: Table
    command: str
    versions: str


def audit_page(audit: Audit, folder: Path) -> AuditPage:
    """Everything that the page shows, from the results and the pictures below `folder`."""
    ordered = audit.worst_first()
    pictured = [each for each in ordered if each.pictures]
    leaking = [each for each in pictured if each.outcome == "leaks"]
    opening = gallery(folder, leaking[0], most=OPENING) if leaking else None
    shown = {each.pictures for each in leaking[:1]}
    others = {each.pictures: each for each in reversed(pictured) if each.pictures not in shown}
    presence = [each for each in audit.headlines() if each.question == "presence"]
    bars = [Bar.of(audit, each) for each in ordered]
    return AuditPage(
        title=words.title(audit),
        verdict=words.verdict(audit, plain=True),
        opening=opening,
        opening_label=_label(audit, leaking[0]) if leaking else "",
        opening_note=_whose(audit, opening) if opening else "",
        presence=_presence(audit, presence[0]) if presence else None,
        who=_who(audit),
        steps=advice.next_steps(audit),
        caution=words.caution(audit, plain=True),
        control=words.control(audit),
        real=[bar for bar in bars if audit.exposure(bar.finding.exposure).headline],
        bounds=[bar for bar in bars if not audit.exposure(bar.finding.exposure).headline],
        galleries=[
            (_whose(audit, found), found)
            for found in (gallery(folder, each, most=BESIDE) for each in [*others.values()][::-1][:GALLERIES])
        ],
        findings=_findings(audit, ordered),
        further=_further(audit, ordered),
        not_run=_not_run(audit),
        command=advice.command(audit),
        versions=_versions(audit),
    )


def _presence(audit: Audit, finding: Finding) -> str:
    """A share that is no leak must not read like one."""
    said = words.plainly(finding)
    if finding.outcome == "says nothing":
        return f"{said} Undecided: {words.reason(audit, finding)}."
    if finding.outcome == "at the floor" and finding.control is not None:
        share = round(100 * finding.control.rate)
        return f"{said} No leak is seen: {words.control(audit)} it recognizes {share} of 100."
    return said


def _label(audit: Audit, shown: Finding) -> str:
    """What the pictures show; of upper bounds also what the same question came to in what really happens."""
    exposure = audit.exposure(shown.exposure)
    if exposure.headline:
        return f"What the server made of what your clients really send: {words.counted(shown)}"
    easier = f"An easier case than yours: {exposure.title}. In your setting:"
    found = [each for each in audit.headlines() if each.question == shown.question]
    if not found:
        return f"{easier} no attacker that rebuilds pictures came to a result"
    worst = next((each for each in found if each.attacker == shown.attacker), found[0])
    worst = found[0] if found[0].outcome == "leaks" else worst
    return f"{easier} {words.counted(worst)}, {words.OUTCOMES[worst.outcome]}"


def _place(audit: Audit, finding: Finding) -> str:
    return f"{words.attacker(finding.attacker)}; {audit.exposure(finding.exposure).title}"


def _whose(audit: Audit, shown: Gallery) -> str:
    """Whose pictures they are, by which attacker, and what came of all its images."""
    exposure = audit.exposure(shown.finding.exposure)
    count = exposure.clients
    seen = "that client's update" if count == 1 else f"the sum of {count} clients' updates"
    left = f"an image of a client, right what the server computed from {seen}"
    if not exposure.headline:
        alone = exposure.images == exposure.clients == 1
        sent = "sent alone" if alone else f"sent in {exposure.title}"
        left = f"a test image, {sent}; right what the server computed from it"
    same = [each for each in audit.worst_first() if each.pictures == shown.finding.pictures]
    lost = [NO_PICTURE] if any(pair.found is None for pair in shown.pairs) else []
    parts = [
        f"Left {left}, by {words.attacker(shown.finding.attacker)}. The server never saw the left one.",
        *lost,
        *(words.told(audit, each) for each in same),
    ]
    return " ".join(parts)


def _who(audit: Audit) -> list[str]:
    """For attackers that got something of what clients really send: who that could be, and what they knew."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for each in audit.headlines():
        if each.outcome == "leaks":
            groups.setdefault((each.threat_model, each.knew), {})[each.attacker] = None
    return [
        f"{_capital(', '.join(map(words.attacker, names)))}: {words.THREAT_MODELS[letter]} (threat model "
        f"{letter}). "
        f"Known beside model and update: {knew}."
        for (letter, knew), names in groups.items()
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _findings(audit: Audit, ordered: list[Finding]) -> Table:
    """Six columns, which a sheet of paper has room for."""
    control = words.control(audit)
    header = [
        "Of a client's images",
        "Share",
        "Verdict",
        "By whom, and where",
        "Floor",
        f"Control, {control}",
    ]
    rows = []
    for each in ordered:
        verdict = f"{words.OUTCOMES[each.outcome]}: {words.reason(audit, each)}"
        marks = [NONE if mark is None else mark.percent for mark in (each.floor, each.control)]
        where = _where(audit, each)
        rows.append([words.QUESTIONS[each.question], each.found.percent, verdict, where, *marks])
    notes = [
        "In brackets: the 95 % interval. Floor: what is found of the same images without the update. "
        f"Control: what the same attacker finds {control}.",
        WORDS_NOTE,
    ]
    title = "All findings, the worst first"
    return Table(title=title, header=header, rows=rows, narrow=(0, 1, 2, 3), notes=notes)


def _further(audit: Audit, ordered: list[Finding]) -> Table:
    header = ["Of a client's images", "By whom, and where", "Threat model", "Also", "Core seconds"]
    rows = []
    for each in ordered:
        also = ", ".join(f"{name} {number(value, digits=2)}" for name, value in each.figures.items())
        cells = [words.QUESTIONS[each.question], _where(audit, each), each.threat_model]
        rows.append([*cells, also or NONE, number(each.seconds)])
    title = "What else was measured of the same findings"
    return Table(title=title, header=header, rows=rows, notes=[AUC_NOTE])


def _where(audit: Audit, finding: Finding) -> str:
    exposure = audit.exposure(finding.exposure)
    bound = "" if exposure.headline else "Upper bound: "
    return f"{bound}{_named(finding.attacker)}; {exposure.title}"


def _named(attacker: str) -> str:
    """What it does, and its name, by which it is looked up."""
    plain = words.attacker(attacker)
    return plain if plain == attacker else f"{plain} ({attacker})"


def _not_run(audit: Audit) -> Table:
    rows = [
        [_named(each.attacker), audit.exposure(each.exposure).title, each.kind, each.reason]
        for each in audit.not_run
    ]
    header = ["Attacker", "Setting", "Came to nothing", "Why"]
    return Table(title="Attackers without figures", header=header, rows=rows)


def _versions(audit: Audit) -> str:
    settings = audit.settings
    versions = {"fedkl": settings.fedkl} | settings.environment
    others = ", ".join(f"{name} {value}" for name, value in versions.items())
    return (
        f"Seed {settings.seed}; {others}. {settings.images} images of {settings.classes} classes; defense: "
        f"{settings.defense}; masking: {settings.masking}; {settings.minutes:g} minutes."
    )
