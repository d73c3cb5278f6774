"""`fedkl audit`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedkl.cli import recordings
from fedkl.cli.commands import Continued
from fedkl.cli.options import DEFENSES, FirstSeedOption, one_of
from fedkl.cli.terminal import console, numbers, progress_bar

if TYPE_CHECKING:
    from fedkl.auditing.gate import GateResult
    from fedkl.auditing.plan import Planned
    from fedkl.auditing.results import Audit


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("audit", cls=Continued)(audit)


def audit(
    target: Annotated[
        str,
        typer.Argument(
            help="package.module:function, or path/to/file.py:function, that returns a fedkl.Subject."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the audit; what was finished is kept.")],
    defense: Annotated[
        str,
        typer.Option(
            help="One of `fedkl attack --list`, with options if you like: pruning:keep=0.1.",
            autocompletion=one_of(DEFENSES),
        ),
    ] = "none",
    masking: Annotated[
        Literal["none", "blind", "pairwise", "both"],
        typer.Option(help="Mask the updates, as the clients would."),
    ] = "none",
    batch_size: Annotated[
        str, typer.Option(help="Images behind one step, in settings that are easier to attack than yours.")
    ] = "1,16",
    minutes: Annotated[float, typer.Option(min=0.01, help="Time for all attackers together.")] = 10.0,
    seed: FirstSeedOption = 0,
    fail_above: Annotated[
        str | None,
        typer.Option(help="Limits, e.g. recovered=0.05,presence_tpr=0.2. Exit code 1 if one is crossed."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Folder of an earlier audit. Exit code 1 if this one is surely worse.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="File for JUnit XML.")] = None,
    sarif: Annotated[Path | None, typer.Option(help="File for SARIF 2.1.0.")] = None,
    summary: Annotated[Path | None, typer.Option(help="File for a Markdown summary.")] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(help="File or folder of updates that real clients sent: attack these."),
    ] = None,
    kind: Annotated[
        recordings.Kind, typer.Option(help="What the files of --recorded hold. RecordingMod's hold weights.")
    ] = "gradient",
    members: Annotated[
        Path | None,
        typer.Option(help="JSON file: which of the subject's images each recorded client trained on."),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Attack recorded updates that do not fit the subject, too.")
    ] = False,
) -> None:
    """What your own training leaks: attacks on what your clients send, a report, and limits for CI.

    Exit codes: 0 all limits kept, 1 one was crossed, 2 wrong usage, 3 too little evidence to say, 70 an
    error that nobody foresaw.
    """
    from fedkl import auditing, report
    from fedkl.auditing import gate
    from fedkl.auditing import target as targets
    from fedkl.auditing.results import Audit

    sizes = numbers(batch_size)
    if min(sizes) < 1:
        raise typer.BadParameter("--batch-size: expected numbers from 1.")
    if baseline is not None and baseline.resolve() == out.resolve():
        raise typer.BadParameter("--baseline: expected another folder than --out, which is written to.")
    limits = gate.Gate.parse(fail_above) if fail_above is not None else gate.Gate()
    earlier = Audit.read(baseline) if baseline is not None else None
    judged = any(each is not None for each in (fail_above, baseline, junit, sarif, summary))
    changed = (defense, masking) != ("none", "none")
    recordings.check(recorded, members=members, changed=changed, judged=judged)
    given = None if recorded is None else recordings.Recorded(recorded, kind, anyway)
    found = targets.load(target)
    if given is not None and members is None:
        recordings.suspect(found.subject, given, out=out, seed=seed)
        return
    options: dict[str, Any] = {"out": out, "minutes": minutes, "seed": seed, "planned": _show_plan}
    options |= {"target": found.name, "source": found.source, "line": found.line}
    options |= {} if earlier is None else {"baseline": earlier}  # of something else: refused before the work
    with progress_bar("audit") as progress:
        options |= {"progress": progress}
        done: Audit = (
            recordings.audited(found.subject, given, members=members, options=options)
            if given is not None and members is not None
            else auditing.audit(found.subject, defense=defense, masking=masking, batch_sizes=sizes, **options)
        )
    page = report.build(out).html
    result = gate.judge(done, limits, baseline=earlier)
    _show(done, result, page=page, files={"junit": junit, "sarif": sarif, "summary": summary})
    raise typer.Exit(result.exit_code)


def _show_plan(entries: Sequence[Planned]) -> None:
    """What will be run, and what not, before the work."""
    from fedkl.auditing.plan import shortfalls

    console.print("Plan, the first first, as far as the time goes:", highlight=False)
    for entry in entries:
        if entry.obstacle is None:
            line = f"  {entry.name}: {entry.exposure.title}; about {max(1, round(entry.seconds))} s at most"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    refused = [entry.obstacle for entry in entries if entry.obstacle is not None]
    names = ", ".join(dict.fromkeys(each.attacker for each in refused))
    if refused:
        line = f"  {len(refused)} pairs do not apply ({names}); the report says why of each."
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in shortfalls(entries):
        console.print(f"  {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _show(audit: Audit, result: GateResult, *, page: Path, files: dict[str, Path | None]) -> None:
    """Writes what was asked for beside the report, and says what was found and where it is."""
    from fedkl.auditing import exports
    from fedkl.files import write_atomically

    written = [page]
    for name, path in files.items():
        if path is not None:
            place = {"page": page} if name == "sarif" else {}
            write_atomically(path, getattr(exports, name)(audit, result, **place).encode())
            written.append(path)
    lines = [*exports.text(audit, result), f"Written: {', '.join(map(str, written))}"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
