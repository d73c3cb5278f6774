"""`fedkl audit --recorded`: updates that real clients sent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import typer

from fedkl.cli.commands import given
from fedkl.cli.terminal import console, progress_bar

if TYPE_CHECKING:
    from fedkl.auditing import Audit, RecordedUpdate, Subject, Suspected

Kind = Literal["gradient", "difference", "weights"]
"""As `fedkl.auditing.RecordedKind`."""


class Recorded(NamedTuple):
    """What the flags say.

    Attributes:
        path: Of the updates.
        kind: Of files.
        anyway: Whether to attack what does not fit.
    """

    path: Path
    kind: Kind
    anyway: bool

    def updates(self) -> dict[str, RecordedUpdate]:
        """Reads them."""
        from fedkl import auditing

        return auditing.read_recorded(self.path, kind=self.kind)


def check(recorded: Path | None, *, members: Path | None, changed: bool, judged: bool) -> None:
    """Refuses flags that would do nothing.

    Args:
        recorded: Path of the updates; None: clients are simulated.
        members: File of whose images are whose.
        changed: Whether clients are to do otherwise than they did.
        judged: Whether figures are held against something, or written down for others.
    """
    idle = ("batch_size",) if members is not None else ("batch_size", "minutes")
    if recorded is None:
        if flags := given("members", "anyway", "kind"):
            raise typer.BadParameter(f"{flags}: of recorded updates. Give --recorded.")
    elif flags := given(*idle):
        raise typer.BadParameter(f"{flags}: changes nothing of these recorded updates. Leave it out.")
    elif changed:
        raise typer.BadParameter(
            "--recorded: what was recorded is as it is; neither --defense nor --masking."
        )
    elif members is None and judged:
        raise typer.BadParameter("--recorded: without --members there are no figures to judge or export.")


def audited(subject: Subject, recorded: Recorded, *, members: Path, options: dict[str, Any]) -> Audit:
    """The audit of recorded clients whose images are known."""
    from fedkl import auditing

    updates = recorded.updates()
    named = auditing.read_members(members, clients=updates)
    clients = [auditing.RecordedClient(update=each, members=named[name]) for name, each in updates.items()]
    return auditing.audit_recorded(subject, clients, anyway=recorded.anyway, **options)


def suspect(subject: Subject, recorded: Recorded, *, out: Path, seed: int) -> None:
    """Says how many images look trained on, and writes how much speaks for each."""
    import safetensors.torch
    import torch

    from fedkl import auditing
    from fedkl.files import PRIVATE_FILE, write_atomically

    updates = recorded.updates()
    with progress_bar("audit") as progress:
        found = auditing.suspect(
            subject, [*updates.values()], anyway=recorded.anyway, seed=seed, progress=progress
        )
    path = out / "scores.safetensors"
    tensors = {name: scores.contiguous() for name, scores in zip(updates, found.scores, strict=True)}
    tensors["threshold"] = torch.tensor(found.threshold)
    write_atomically(path, safetensors.torch.save(tensors), mode=PRIVATE_FILE)
    for line in [*_lines(updates, found), f"Written: {path}"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _lines(names: dict[str, RecordedUpdate], found: Suspected) -> list[str]:
    count = found.scores.shape[1]
    chance = f"about {found.by_chance:.0f} would by chance"
    lines = [
        f"{name}: {int(number)} of {count} images look trained on; {chance}."
        for name, number in zip(names, found.recognized, strict=True)
    ]
    return [*lines, "Nobody said which images were: --members FILE measures how often that is right."]
