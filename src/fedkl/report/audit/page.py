"""What the report of an audit consists of; HTML and Markdown are two renderings of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedkl.auditing import words
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
    "Shown an image, the server says whether this client trained on it. It is allowed to be wrong about 1 in "
    "100 images that the client does not have. AUC: how often it ranks an image of the client above one "
    "that the client does not have. 0.5 is guessing, 1 is always."
)

WORDS_NOTES = (
    "In brackets: the 95 % interval. Floor: what is found of the same images without the update. Control: "
    "what the same attacker finds where nothing is hidden.",
    "Leaks: more than the floor. At the floor: no more, by an attacker that succeeds on the control; of "
    "images that are recognized, surely less than half of what it gets there. Says nothing: neither can "
    "be said.",
)

PICTURES_NOTE = (
    "Left an image of a client, right what the server computed from that client's update. The server never "
    "saw the left one."
)


class Bar(NamedTuple):
    """One finding in the figure."""

    finding: Finding
    question: str
    title: str
    tone: words.Tone

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
        opening_note: Whose they are.
        presence: Whether images are recognized, in one sentence; None where that was not measured.
        who: Who could do it, and what they need.
        steps: What to do next, as measured.
        caution: What the audit does not say.
        real: Of what clients really send.
        bounds: Upper bounds.
        galleries: Further pictures.
        findings: All figures.
        not_run: Attackers without figures.
        command: What repeats it.
        versions: Seed and versions, in one line.
    """

    title: str
    verdict: words.Verdict
    opening: Gallery | None
    opening_note: str
    presence: str | None
    who: list[str]
    steps: list[str]
    caution: str
    real: list[Bar]
    bounds: list[Bar]
    galleries: list[tuple[str, Gallery]]
    findings: Table
    not_run: Table
    command: str
    versions: str


def audit_page(audit: Audit, folder: Path) -> AuditPage:
    """Everything that the page shows, from the results and the pictures below `folder`."""
    ordered = audit.worst_first()
    pictured = [each for each in ordered if each.pictures]
    leaking = [each for each in pictured if each.outcome == "leaks"]
    opening = gallery(folder, leaking[0], most=OPENING) if leaking else None
    others = [each for each in pictured if each not in leaking[:1]]
    presence = [each for each in audit.headlines() if each.question == "presence"]
    bars = [
        Bar(each, words.QUESTIONS[each.question], _place(audit, each), _TONES[each.outcome])
        for each in ordered
    ]
    return AuditPage(
        title=f"What does {audit.settings.subject} leak?",
        verdict=words.verdict(audit),
        opening=opening,
        opening_note=_whose(audit, opening) if opening else "",
        presence=_presence(presence[0]) if presence else None,
        who=_who(audit),
        steps=words.next_steps(audit),
        caution=words.caution(audit),
        real=[bar for bar in bars if audit.exposure(bar.finding.exposure).headline],
        bounds=[bar for bar in bars if not audit.exposure(bar.finding.exposure).headline],
        galleries=[
            (_whose(audit, found), found)
            for found in (gallery(folder, each, most=BESIDE) for each in others[:GALLERIES])
        ],
        findings=_findings(audit, ordered),
        not_run=_not_run(audit),
        command=words.command(audit),
        versions=_versions(audit),
    )


def _presence(finding: Finding) -> str:
    """A share that is no leak must not read like one."""
    beside = "" if finding.outcome == "leaks" else f" {finding.outcome.capitalize()}: {finding.reason}."
    return f"{words.sentence(finding)}{beside}"


def _place(audit: Audit, finding: Finding) -> str:
    return f"{finding.attacker}; {audit.exposure(finding.exposure).title}"


def _whose(audit: Audit, shown: Gallery) -> str:
    """E.g. "The first 8 of 30: gauss-newton; your client: one image"."""
    exposure = audit.exposure(shown.finding.exposure)
    bound = "" if exposure.headline else "Upper bound, not your clients. "
    count = f"The first {len(shown.pairs)} of {shown.total}: " if len(shown.pairs) < shown.total else ""
    return f"{bound}{count}{_place(audit, shown.finding)}. {shown.finding.outcome}: {shown.finding.reason}"


def _who(audit: Audit) -> list[str]:
    """For attackers that got something of what clients really send: who that could be, and what they knew."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for each in audit.headlines():
        if each.outcome == "leaks":
            groups.setdefault((each.threat_model, each.knew), {})[each.attacker] = None
    return [
        f"{', '.join(names)}: {words.THREAT_MODELS[letter]} (threat model {letter}). "
        f"Known beside model and update: {knew}."
        for (letter, knew), names in groups.items()
    ]


def _findings(audit: Audit, ordered: list[Finding]) -> Table:
    header = ["Of a client's images", "Share", "Verdict", "Attacker", "Setting", "Bound", "Floor", "Control"]
    header += ["Threat model", "Also", "Core seconds", "Why"]
    rows = []
    for each in ordered:
        exposure = audit.exposure(each.exposure)
        cells = [words.QUESTIONS[each.question], each.found.percent, each.outcome, each.attacker]
        cells += [exposure.title, "real" if exposure.headline else "upper bound"]
        cells += [NONE if mark is None else mark.percent for mark in (each.floor, each.control)]
        also = ", ".join(f"{name} {number(value, digits=2)}" for name, value in each.figures.items())
        rows.append([*cells, each.threat_model, also or NONE, number(each.seconds), each.reason])
    title = "All findings, the worst first"
    return Table(title=title, header=header, rows=rows, narrow=(0, 1, 2, 3, 4, 5), notes=[*WORDS_NOTES])


def _not_run(audit: Audit) -> Table:
    rows = [
        [each.attacker, audit.exposure(each.exposure).title, each.kind, each.reason] for each in audit.not_run
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
