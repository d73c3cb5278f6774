"""An audit: the plan carried out within the time given, into a folder from where it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from time import monotonic, process_time
from typing import Any, NamedTuple

import safetensors.torch
import torch
from pydantic import ValidationError

import fedkl
from fedkl.attacking.grid import NotRun as Unattacked
from fedkl.auditing.clients import Clients
from fedkl.auditing.defended import defense_of, text_of
from fedkl.auditing.findings import of_pictures, of_presence
from fedkl.auditing.gate import check_baseline
from fedkl.auditing.plan import CONTROL, Planned, exposures_of, plan
from fedkl.auditing.rebuilding import Rebuilt, rebuild
from fedkl.auditing.recognition import Pools, Recognized, recognize
from fedkl.auditing.results import Audit, Finding, Masking, NotRun, Settings, Summary
from fedkl.auditing.subject import Subject
from fedkl.defenses import Defense
from fedkl.errors import ConfigError, FolderError, gathered
from fedkl.files import PRIVATE_FILE, PRIVATE_FOLDER, exclusive, make_folder, write_atomically
from fedkl.study import Progress, silent
from fedkl.validation import problems_of

_LEFT_FOR_ONE = 0.25  # share of the time that is left, after which an attacker begins no further lot
_MOST_FOR_ONE = 0.5  # and after which it is ended in the middle of one; estimates of time are rough


def audit(
    subject: Subject,
    *,
    out: Path | str,
    defense: str | Defense = "none",
    masking: Masking = "none",
    batch_sizes: Sequence[int] = (1, 16),
    minutes: float = 10.0,
    seed: int = 0,
    target: str | None = None,
    source: str | None = None,
    line: int | None = None,
    baseline: Audit | None = None,
    planned: Callable[[Sequence[Planned]], None] = lambda entries: None,
    progress: Progress = silent,
) -> Audit:
    """Audits somebody's federated training; an interrupted audit goes on, a finished one is only read.

    Args:
        subject: What is audited.
        out: The audit's folder.
        defense: What clients do against a curious server; or its registered type, with options of its own as
            in ``"pruning:keep=0.1"``.
        masking: Mode of masks over it.
        batch_sizes: Images behind single gradients, for the upper bounds.
        minutes: For the attackers. The one that runs when they are over is ended at its next step, and
            presence on what clients really send is always measured.
        seed: Of everything that is drawn but clients' secrets.
        target: As it was named, for reports; the subject's name if None.
        source: File of the target, for reports.
        line: Where in it the target begins.
        baseline: An earlier audit that this one will be held against, see `fedkl.auditing.judge`.
        planned: Called with the plan before the work.
        progress: Called with the share of the time that is used up, of 1, and what is done or was found.

    Raises:
        ConfigError: An option is not usable, the baseline is of something else, or the folder holds something
            else.
        DataError: The network does not fit the images.
        TrainingError: A client cannot train.
    """
    if not 0 < 60 * minutes < math.inf or min(batch_sizes, default=1) < 1:
        raise ConfigError(
            "audit: expected minutes above 0 and no infinite number, and batch_sizes from 1, got "
            f"{minutes} and {tuple(batch_sizes)}."
        )
    subject.check()
    pools = Pools.of(subject.images, subject.labels, seed=seed)
    if copies := len(subject.images) - sum(len(pool.images) for pool in pools):
        progress(0, 1, f"{copies} of {len(subject.images)} images are copies of others: they are left out")
    defended = defense_of(defense)
    exposures = exposures_of(subject, defense=defended, masking=masking, batch_sizes=batch_sizes, seed=seed)
    settings = settings_of(
        subject,
        exposures,
        target=target or subject.name,
        source=source,
        line=line,
        defense=text_of(defended),
        masking=masking,
        seed=seed,
        minutes=minutes,
        batch_sizes=tuple(batch_sizes),
    )
    return run_all(settings, exposures, pools, out=out, baseline=baseline, planned=planned, progress=progress)


def settings_of(subject: Subject, exposures: Sequence[Clients], **given: Any) -> Settings:
    """An audit's settings, with what the subject and this machine say of themselves.

    Args:
        subject: What is audited.
        exposures: What is looked at.
        given: The other fields.

    Raises:
        ConfigError: One cannot stand in a file, a target of several lines, say.
    """
    try:
        return Settings(
            fedkl=fedkl.__version__,
            subject=subject.name,
            images=len(subject.images),
            classes=subject.classes,
            environment={"torch": torch.__version__},
            fingerprint=subject.fingerprint(),
            images_fingerprint=subject.images_fingerprint(),
            training_fingerprint=subject.training_fingerprint(),
            exposures=tuple(each.exposure for each in exposures),
            **given,
        )
    except ValidationError as error:
        raise ConfigError(
            gathered("The audit's settings are not usable.", problems_of(error), "Correct these.")
        ) from error


def run_all(
    settings: Settings,
    exposures: Sequence[Clients],
    pools: Pools,
    *,
    out: Path | str,
    baseline: Audit | None,
    planned: Callable[[Sequence[Planned]], None],
    progress: Progress,
) -> Audit:
    """Every attacker on every exposure, within the settings' minutes; arguments as of `audit`.

    Args:
        settings: What is audited, and how.
        exposures: What is looked at.
        pools: Whose images are whose.
        out: The audit's folder.
        baseline: An earlier audit; refused before anything is written where it is of something else.
        planned: Called with the plan before the work.
        progress: Called with the share of the time that is used up.
    """
    if baseline is not None:
        check_baseline(settings, baseline)
    folder = _Folder(Path(out))
    with exclusive(folder.path):
        present = folder.begin(settings)
        if present.summary is None:
            clock = _Clock(monotonic(), settings.minutes)
            entries = plan(
                exposures,
                pools=pools,
                within=clock.left,
                told=lambda text: progress(0, 1, f"planning: {text}"),
            )
            planned(entries)
            _carry_out(entries, pools, folder, present, clock, progress)
        return folder.audit()


class _Clock(NamedTuple):
    start: float
    minutes: float

    @property
    def used(self) -> float:
        """Share of the time."""
        return min(1.0, (monotonic() - self.start) / (60 * self.minutes))

    @property
    def left(self) -> float:
        """Seconds."""
        return (1 - self.used) * 60 * self.minutes

    def until(self, share: float) -> Callable[[], bool]:
        """Says whether so much of what is left now is used up."""
        end = monotonic() + share * self.left
        return lambda: monotonic() >= end


class _Folder:
    """An audit's folder; see results.py."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, settings: Settings) -> Audit:
        """What is there of this audit.

        Raises:
            FolderError: The folder holds another audit, or something else.
        """
        if (self.path / "audit.json").exists():
            present = self.audit()
            differing = _differing(present.settings, settings)
            if differing:
                raise FolderError(
                    f"{self.path}: holds an audit of something else or with other options: "
                    f"{', '.join(differing)}. Choose another folder, or remove this one."
                )
            if settings.minutes > present.settings.minutes:
                self._give_time(settings, present)
            elif settings.line != present.settings.line:
                self._write(present.settings.model_copy(update={"line": settings.line}))
            return self.audit()
        held = [each.name for each in self.path.iterdir() if not each.name.startswith(".")]
        if held:
            raise FolderError(f"{self.path}: expected an empty folder, it holds {held[0]!r}. Choose another.")
        self._write(settings)
        return Audit(settings=settings)

    def _write(self, settings: Settings) -> None:
        write_atomically(self.path / "audit.json", settings.model_dump_json(indent=2).encode())

    def _give_time(self, settings: Settings, present: Audit) -> None:
        """Forgets who had too little; whenever this is interrupted, the same command does the rest."""
        (self.path / "summary.json").unlink(missing_ok=True)
        again = _cut_short(present)
        kept: list[Finding | NotRun] = [e for e in present.findings if (e.attacker, e.exposure) not in again]
        kept += [each for each in present.not_run if each.kind != "no time left"]
        lines = "".join(f"{record.model_dump_json()}\n" for record in kept)
        write_atomically(self.path / "results.jsonl", lines.encode())
        self._write(settings)

    def audit(self) -> Audit:
        """What is there now."""
        return Audit.read(self.path)

    def append(self, *records: Finding | NotRun) -> None:
        """Adds all that one attacker came to at once, after the last whole line."""
        path = self.path / "results.jsonl"
        before = path.read_bytes() if path.exists() else b""
        whole = before[: before.rfind(b"\n") + 1]
        lines = "".join(f"{record.model_dump_json()}\n" for record in records)
        write_atomically(path, whole + lines.encode())

    def save_pictures(self, name: str, rebuilt: Rebuilt) -> str:
        """Keeps originals and what came out, for this user only; returns their place below the folder."""
        make_folder(self.path / "pictures", mode=PRIVATE_FOLDER)
        place = f"pictures/{name}.safetensors"
        tensors = {"truth": rebuilt.truth.contiguous(), "found": rebuilt.images.contiguous()}
        write_atomically(self.path / place, safetensors.torch.save(tensors), mode=PRIVATE_FILE)
        return place

    def finish(self, seconds: float) -> None:
        """Everything was tried."""
        present = self.audit()
        summary = Summary(
            seconds=seconds,
            findings=len(present.findings),
            not_run=len(present.not_run),
            date=datetime.now(timezone.utc).date().isoformat(),
            version=2,
        )
        write_atomically(self.path / "summary.json", summary.model_dump_json(indent=2).encode())


def _cut_short(present: Audit) -> set[tuple[str, str]]:
    """Who was cut short on what, or judged by a control that was, or by none because that had no time."""
    found = {(each.attacker, each.exposure) for each in present.findings if each.cut_short}
    late = {
        each.attacker for each in present.not_run if (each.kind, each.exposure) == ("no time left", CONTROL)
    }
    controls = {
        (each.attacker, each.question): (each.found, each.control)  # of sums beside masks: the latter
        for each in present.findings
        if each.cut_short and each.exposure == CONTROL
    }
    for each in present.findings:
        judged_by = controls.get((each.attacker, each.question), ())
        unjudged = not judged_by and each.control is None and each.attacker in late
        if unjudged or (each.control is not None and each.control in judged_by):
            found.add((each.attacker, each.exposure))
    return found


_ALIKE = frozenset({"minutes", "line", "anyway", "images_fingerprint", "training_fingerprint"})
"""Settings that make no other audit: more time goes on, code moves, what fits is attacked in any case, and
the fingerprint is of images and training, too."""


def _differing(present: Settings, wanted: Settings) -> list[str]:
    """The settings in which two audits differ, in words."""
    what = "weights, images, labels or procedure"
    unknown = "" if present.fingerprint else " (an older fedkl did not write down which)"
    words = {
        "fedkl": "fedkl's version",
        "fingerprint": what + unknown,
        "recorded_kind": "kind of the recorded updates",
    }
    return [
        words.get(name, name)
        for name in Settings.model_fields
        if name not in _ALIKE and getattr(present, name) != getattr(wanted, name)
        if not (name == "recorded_kind" and present.recorded_kind is None)  # an older file does not say
    ]


def _carry_out(
    entries: Sequence[Planned],
    pools: Pools,
    folder: _Folder,
    present: Audit,
    clock: _Clock,
    progress: Progress,
) -> None:
    findings = list(present.findings)
    done = {(each.attacker, each.exposure) for each in findings}
    done |= {(each.attacker, each.exposure) for each in present.not_run}
    worked = False
    for entry in entries:
        if (entry.name, entry.exposure.name) in done:
            continue
        if entry.obstacle is not None:
            folder.append(entry.obstacle)
            continue
        optional = worked and not (entry.attacker is None and entry.exposure.headline)
        if optional and (not clock.left or entry.least > clock.left):
            times = f"{clock.left:.0f} s were left of {clock.minutes:g} minutes"
            first = f", its first images {entry.least:.0f}" if 0 < entry.least < entry.seconds else ""
            reason = f"It may take {entry.seconds:.0f} s{first}, and {times}."
            folder.append(NotRun.of(entry.name, entry.exposure, kind="no time left", reason=reason))
            continue
        progress(clock.used, 1, f"{entry.name}: {entry.exposure.title}")
        start, worked = process_time(), True
        found = _attempt(entry, pools, clock)
        seconds = round(process_time() - start, 3)
        if isinstance(found, NotRun):
            folder.append(found)
            continue
        if isinstance(found, Rebuilt):
            place = folder.save_pictures(f"{entry.name}-{entry.exposure.name}", found)
            new = of_pictures(entry, found, pools=pools, earlier=findings, pictures=place, seconds=seconds)
        else:
            new = [of_presence(entry, *found, pools=pools, earlier=findings, seconds=seconds)]
        folder.append(*new)
        findings += new
        for finding in new:
            progress(clock.used, 1, f"{entry.name}: {finding.question} {finding.found.percent}")
    folder.finish(clock.used * 60 * clock.minutes)


class _Presence(NamedTuple):
    """With the control, where something is hidden."""

    found: Recognized
    control: Recognized | None


def _attempt(entry: Planned, pools: Pools, clock: _Clock) -> Rebuilt | _Presence | NotRun:
    """Runs one attacker; what breaks ends neither the others nor the audit."""
    not_run = partial(NotRun.of, entry.name, entry.exposure)
    try:
        if entry.attacker is None:
            control = recognize(entry.clients.open(), pools=pools) if entry.clients.hides else None
            return _Presence(recognize(entry.clients, pools=pools), control)
        enough, over = (clock.until(share) for share in (_LEFT_FOR_ONE, _MOST_FOR_ONE))
        found = rebuild(entry.attacker, entry.clients, pools=pools, enough=enough, over=over)
    except (Exception, SystemExit) as error:  # the user's network and loop run in here
        return not_run(kind="broke", reason=f"{type(error).__name__}: {error}")
    if found is None:
        return not_run(kind="no time left", reason="The time for it was over before its first images.")
    return not_run(kind=found.kind, reason=found.reason) if isinstance(found, Unattacked) else found
