"""What an audit found, as typed records with a version; they are what its folder keeps and reports read.

audit.json      what was audited and how: `Settings`
results.jsonl   one `Finding` or `NotRun` a line, appended as it comes
pictures/       of a finding: originals and reconstructions, safetensors
summary.json    written last: an audit without it was interrupted
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from fedkl.errors import ConfigError, gathered
from fedkl.files import read_file
from fedkl.formats import check_version
from fedkl.parsing import parse_json_object
from fedkl.run_records import Count, Seconds, Share, Word
from fedkl.validation import problems_of

VERSION: Literal[1] = 1
_MAX_BYTES = 2**28
_ROUNDING = 1e-6  # of a share

Question = Literal["rebuilt", "identified", "presence", "labels"]
"""Of a client's images: which come out again as pictures; which are known from what comes out among many;
which of many are recognized as trained on; of which classes they are."""

Outcome = Literal["leaks", "at the floor", "says nothing"]
"""As `fedkl.attacking.verdict.Kind`: more than without the update; no more, by an attack that succeeds where
nothing is hidden; or neither can be said."""

Masking = Literal["none", "blind", "pairwise", "both"]
"""Mode of masks, see `fedkl.masking.Mode`."""

ThreatModel = Literal["A", "B", "C", "D", "E", "F", "G", "H"]
"""Carletti et al., "SoK: Gradient Inversion Attacks in Federated Learning", USENIX Security 2025.

Who sees updates (A), and knows what every participant does, such as sizes and normalization (B), how clients
train (C), has images of the same kind (D), knows the client's own statistics (E). F, G, H change the model.
"""

Cause = Literal["does not apply", "too large", "broke", "no time left"]

Name = Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")]  # names files too


class Record(BaseModel):
    """Frozen, strict, of known fields only.

    Attributes:
        later: Fields that older files lack. With their defaults they are not written either, so that files
            are as they ever were where nothing is new in them.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, extra="forbid")

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_what_is_usual(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            name: value
            for name, value in handler(self).items()
            if name not in self.later or value != fields[name].default
        }


AnyRecord = TypeVar("AnyRecord", bound=Record)


class Measured(Record):
    """A share with its 95 % interval, from n trials."""

    rate: Share
    low: Share
    high: Share
    n: Annotated[Count, Field(ge=1)]

    @model_validator(mode="after")
    def _check(self) -> Measured:
        if not self.low - _ROUNDING <= self.rate <= self.high + _ROUNDING:
            raise ValueError(
                f"expected low ≤ rate ≤ high, got low {self.low:g}, rate {self.rate:g}, high {self.high:g}"
            )
        return self

    @property
    def percent(self) -> str:
        """E.g. ``67 % [61–72 %], n = 300``."""
        return f"{100 * self.rate:.0f} % [{100 * self.low:.0f}–{100 * self.high:.0f} %], n = {self.n}"


class Exposure(Record):
    """What the server sees of clients at once.

    Attributes:
        name: Short; findings refer to it.
        title: In plain words, e.g. "your client: one epoch of 300 images".
        headline: Whether it is what really happens; else it is an upper bound.
        trained: Whether the weights are the subject's, or those of an untrained network.
        images: Of one client.
        steps: Local steps; 0 if a function of the user's trains.
        clients: Whose mean the server sees.
        norm_mode: Of the clients' norms.
    """

    name: Name
    title: Word
    headline: bool
    trained: bool = True
    images: Annotated[Count, Field(ge=1)]
    steps: Count
    clients: Annotated[Count, Field(ge=1)] = 1
    norm_mode: Literal["train", "eval"] = "train"

    @property
    def images_behind(self) -> int:
        """Of all its clients."""
        return self.images * self.clients


class Settings(Record):
    """What is audited, and how.

    Attributes:
        version: Of these records.
        fedkl: The package's version.
        target: As given, ``package.module:function``, or the subject's name.
        source: The target's file, as it may stand in a report: relative to where the audit was started.
        line: Where in it the target begins.
        subject: The subject's name.
        images: Whose images there are.
        classes: How many.
        defense: Its type and unusual options; see defended.py.
        masking: Mode, or ``"none"``.
        seed: Of everything that is drawn.
        minutes: Given.
        batch_sizes: Given.
        environment: Versions by name that the figures depend on, e.g. ``{"torch": "2.6.0"}``; audits of
            different ones are not compared.
        recorded: Hashes of the recorded updates and their members; none where clients are simulated.
        recorded_kind: What the recorded tensors are, see `RecordedKind`; None where clients are simulated, of
            several kinds, and in older files.
        anyway: Whether recorded updates were attacked that do not fit, too.
        fingerprint: Of weights, images, labels and procedure, see `Subject.fingerprint`; None in older files.
        images_fingerprint: Of images and labels alone; None in older files.
        training_fingerprint: Of what is trained and how, without weights, see
            `Subject.training_fingerprint`; None in older files.
        exposures: What is looked at.
    """

    later: ClassVar[frozenset[str]] = frozenset(
        {"recorded_kind", "anyway", "images_fingerprint", "training_fingerprint"}
    )

    version: Literal[1] = VERSION
    fedkl: Word
    target: Word
    source: Word | None = None
    line: Count | None = None
    subject: Word
    images: Count
    classes: Count
    defense: Word = "none"
    masking: Masking = "none"
    seed: int = 0
    minutes: Annotated[float, Field(gt=0)] = 10.0
    batch_sizes: tuple[Count, ...] = ()
    environment: dict[str, Word] = {}
    recorded: tuple[Word, ...] = ()
    recorded_kind: Literal["gradient", "difference", "weights"] | None = None
    anyway: bool = False
    fingerprint: Word | None = None
    images_fingerprint: Word | None = None
    training_fingerprint: Word | None = None
    exposures: tuple[Exposure, ...]

    @model_validator(mode="after")
    def _check(self) -> Settings:
        names = [each.name for each in self.exposures]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"exposures: expected each name once, got {', '.join(twice)} more than once")
        return self


class Finding(Record):
    """What one attacker got out of one exposure.

    Attributes:
        question: What was asked.
        attacker: Its name.
        exposure: The exposure's name.
        threat_model: Letter of Carletti et al., USENIX Security 2025.
        knew: What the attacker had beside model and update, in words.
        found: Share of the client's images.
        floor: What is found of the same images without the update.
        control: What the same attacker finds where nothing is hidden; None where it was not tried.
        outcome: The verdict.
        reason: Why, with the numbers.
        figures: Further numbers by name, e.g. ``auc``, ``auc_low``, ``psnr``.
        pictures: File below the audit's folder with ``truth`` and ``found``, both ``(images, channels,
            height, width)`` in [0, 1]; None if there are none.
        seconds: Of one core.
        cut_short: Whether the time was over before all was attacked: more minutes begin it anew. False in
            older files.
    """

    later: ClassVar[frozenset[str]] = frozenset({"cut_short"})

    event: Literal["finding"] = "finding"
    question: Question
    attacker: Name
    exposure: Name
    threat_model: ThreatModel
    knew: Word
    found: Measured
    floor: Measured | None = None
    control: Measured | None = None
    outcome: Outcome
    reason: Word
    figures: dict[str, float] = {}
    pictures: Annotated[str, Field(pattern=r"^pictures/[\w.-]{1,200}\.safetensors$")] | None = None
    seconds: Seconds
    cut_short: bool = False


class NotRun(Record):
    """An attacker that came to no figures, and why, in one sentence."""

    event: Literal["not-run"] = "not-run"
    attacker: Name
    exposure: Name
    kind: Cause
    reason: Word

    @classmethod
    def of(cls, attacker: str, exposure: Exposure, *, kind: Cause, reason: str) -> NotRun:
        """With the reason as one line of text, whoever wrote it."""
        line = "".join(c if c.isprintable() else " " for c in " ".join(reason.split()))
        return cls(attacker=attacker, exposure=exposure.name, kind=kind, reason=line[:1000])


class Summary(Record):
    """Written when everything was tried.

    Attributes:
        seconds: Used up.
        findings, not_run: How many.
        date: Of its end in UTC, e.g. ``"2026-11-29"``.
        version: 2 since there is a date; None in older files, which stay as they were.
    """

    later: ClassVar[frozenset[str]] = frozenset({"date", "version"})

    seconds: Seconds
    findings: Count
    not_run: Count
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None
    version: Literal[2] | None = None


_LINE: TypeAdapter[Finding | NotRun] = TypeAdapter(Annotated[Finding | NotRun, Field(discriminator="event")])
_SEVERITY: dict[Question, int] = {"rebuilt": 0, "identified": 1, "presence": 2, "labels": 3}


class Audit(Record):
    """An audit's results.

    Attributes:
        settings: What was audited, and how.
        findings: In the order in which they came.
        not_run: Attackers that came to nothing.
        summary: None where the audit was interrupted.
    """

    settings: Settings
    findings: tuple[Finding, ...] = ()
    not_run: tuple[NotRun, ...] = ()
    summary: Summary | None = None

    def exposure(self, name: str) -> Exposure:
        """The exposure of a finding."""
        return next(each for each in self.settings.exposures if each.name == name)

    def headlines(self) -> list[Finding]:
        """Of what really happens, worst first."""
        return [each for each in self.worst_first() if self.exposure(each.exposure).headline]

    def worst_first(self) -> list[Finding]:
        """Leaks first, of real clients before upper bounds, pictures before presence, high shares first."""
        return sorted(
            self.findings,
            key=lambda each: (
                each.outcome != "leaks",
                not self.exposure(each.exposure).headline,
                _SEVERITY[each.question],
                -each.found.low,
            ),
        )

    @classmethod
    def read(cls, folder: Path) -> Audit:
        """What an audit's folder holds; the last line may be half, where a machine stopped.

        Raises:
            ConfigError: It is no audit's folder, a file is damaged, or lines are not those that were counted
                at its end.
            NewerFormatError: A newer fedkl wrote it.
        """
        settings = _parsed(Settings, folder / "audit.json")
        found = list(_lines(folder / "results.jsonl"))
        done = folder / "summary.json"
        names = {each.name for each in settings.exposures}
        if any(each.exposure not in names for each in found):
            raise ConfigError(f"{folder}/results.jsonl: names an exposure that audit.json does not have.")
        audit = cls(
            settings=settings,
            findings=tuple(each for each in found if isinstance(each, Finding)),
            not_run=tuple(each for each in found if isinstance(each, NotRun)),
            summary=_parsed(Summary, done, reads=2) if done.exists() else None,
        )
        problems = audit._miscounted()
        if problems:
            remedy = "Repeat the audit into another folder."
            raise ConfigError(gathered(f"{folder}/results.jsonl: damaged.", problems, remedy))
        return audit

    def _miscounted(self) -> list[str]:
        """What is there twice, and what is not as many as its end says."""
        findings = Counter(f"{each.question} by {each.attacker} on {each.exposure}" for each in self.findings)
        skipped = Counter(f"{each.attacker} on {each.exposure}, not run" for each in self.not_run)
        counts = [*findings.items(), *skipped.items()]
        problems = [f"{what}: expected once, got {count} times" for what, count in counts if count > 1]
        if self.summary is not None:
            ends = {
                "findings": (self.summary.findings, len(self.findings)),
                "attackers that were not run": (self.summary.not_run, len(self.not_run)),
            }
            problems += [
                f"expected {said} {what}, as summary.json says, got {got}"
                for what, (said, got) in ends.items()
                if said != got
            ]
        return problems


def _parsed(kind: type[AnyRecord], path: Path, *, reads: int = VERSION) -> AnyRecord:
    try:
        values = parse_json_object(read_file(path, limit=_MAX_BYTES))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not there. Give the folder of a `fedkl audit`.") from error
    except (OSError, ValueError) as error:
        problem = f"{path}: cannot be read ({error}). Repeat the audit into another folder."
        raise ConfigError(problem) from error
    check_version(values.get("version"), source=path, reads=reads)
    if values.get("version", reads) != reads:
        raise ConfigError(f"{path}: of another version of fedkl. Read it with that, or repeat the audit.")
    try:
        return kind.model_validate_json(read_file(path, limit=_MAX_BYTES))
    except ValidationError as error:
        problems = problems_of(error)
        raise ConfigError(gathered(f"{path}: damaged.", problems, "Repeat the audit.")) from error


def _lines(path: Path) -> Iterator[Finding | NotRun]:
    if not path.exists():
        return
    whole, _, _ = read_file(path, limit=_MAX_BYTES).rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            yield _LINE.validate_json(line)
        except ValidationError as error:
            raise ConfigError(
                gathered(f"{path}, line {number}: damaged.", problems_of(error), "Repeat the audit.")
            ) from error
