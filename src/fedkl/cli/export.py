"""`fedkl export`."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedkl.cli.commands import Command
from fedkl.cli.membership import opened
from fedkl.cli.terminal import console
from fedkl.errors import ConfigError, printable

if TYPE_CHECKING:
    from fedkl.export import Exported

Form = Literal["state", "torch", "onnx"]


class _ExportCommand(Command):
    kept = "Every file is whole or not there. The command again:"


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("export", cls=_ExportCommand)(export)


def export(
    source: Annotated[
        Path, typer.Argument(help="Run directory of fedkl train, or folder of rounds of a Guard on Flower.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    client: Annotated[
        str | None,
        typer.Option(help="Of a run directory: write this client's lock too, beside --out as NAME.lock."),
    ] = None,
    member: Annotated[
        Path | None,
        typer.Option(help="Of a Guard's rounds with masks: the secret file of a member, who can open them."),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(
            help="Of --member: a file with its passphrase.",
            show_default="FEDKL_PASSPHRASE, or this machine's",
        ),
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option(
            "--for",
            help="With --client: write its own whole model instead, to serve. It is private, not to be sent.",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace files that are there.")] = False,
) -> None:
    """Writes a training's newest public tensors to a file, and says how they are used.

    A lock is encrypted as the run's checkpoints are: with FEDKL_PASSPHRASE, or else a passphrase of this user
    on this machine.
    """
    from fedkl import export as exporting

    if passphrase_file is not None and member is None:
        raise ConfigError(
            "--passphrase-file is of --member. A lock is encrypted as the run's checkpoints are: set "
            "FEDKL_PASSPHRASE for it."
        )
    if form is not None:
        if client is None or member is not None:
            raise ConfigError(
                "--for writes the model of one client of a run directory: give --client, no --member."
            )
        rounds = exporting.export_client(source, out=out, client=client, form=form, replace=replace)
        lines = _lines_of_client(out, client, form, rounds)
    else:
        with nullcontext() if member is None else opened(member, passphrase_file) as file:
            done = exporting.export(source, out=out, client=client, member=file, replace=replace)
        lines = _lines(done, source)
    for line in lines:
        console.print(printable(line, limit=None), markup=False, highlight=False, soft_wrap=True)


def _lines_of_client(out: Path, client: str, form: Form, rounds: int) -> list[str]:
    name = repr(str(out))
    use = {
        "state": [f"model.load_state_dict(safetensors.torch.load_file({name}))"],
        "torch": [f"torch.export.load({name}).module()(images)"],
        "onnx": [
            f"session = onnxruntime.InferenceSession({name})",
            "session.run(None, {session.get_inputs()[0].name: images})",
        ],
    }
    return [
        f"{out}: the whole model of {client} after {rounds} round{'s' * (rounds > 1)}",
        "Private: what the client keeps (γ, β, norm statistics …) is in it, not encrypted. Never send it.",
        "Use it:",
        *(f"    {line}" for line in use[form]),
    ]


def _lines(done: Exported, source: Path) -> list[str]:
    from fedkl.export import defense_of

    lines = [f"{done.model}: the public tensors after {done.rounds} round{'s' * (done.rounds > 1)}"]
    if not done.read_by_server:
        lines.append("The server of this training could not read them; its members have them.")
    plain = f"model.load_state_dict(safetensors.torch.load_file({str(done.model)!r}))"
    if done.lock is not None:
        lines.append(f"{done.lock}: this client's lock, encrypted. To be kept secret; it is of this round.")
        return [*lines, "Its model, where Net() builds the network that was trained:", f"    {_locked(done)}"]
    defense = defense_of(source)
    if defense is not None and defense.changes_network:
        defense = next(part for part in getattr(defense, "parts", (defense,)) if part.changes_network)
        made = f"from {type(defense).__module__} import {type(defense).__name__}"
        use = "Use it in the network that the defense makes of the one that was trained, Net():"
        return [
            *lines,
            use,
            *(f"    {line}" for line in (made, f"model = {defense!r}.prepare(Net()).model", plain)),
        ]
    if done.whole:
        return [*lines, "Use it in a model of the network that was trained:", f"    {plain}"]
    if done.whole is None:
        lines.append(
            "If clients have locks, this is not their model: γ, β and what else they keep is missing."
        )
        return [*lines, "With a lock:", f"    {_locked(done)}", "Without locks:", f"    {plain}"]
    again = f"fedkl export {shlex.quote(str(source))} --out FILE --client client-0"
    return [
        *lines,
        "This alone is no client's model: what clients keep (γ, β, norm statistics …) is not in it.",
        f"A client's lock: {again}",
        "With it:",
        f"    {_locked(done, lock='client-0.lock')}",
    ]


def _locked(done: Exported, *, lock: str = "lock.fedkl") -> str:
    passphrase = "…"  # noqa: S105 (stands for one)
    if done.lock is not None:
        lock, passphrase = str(done.lock), "fedkl.lockfile.default_passphrase()"  # it was encrypted with that
    return (
        f"fedkl.load_lock({lock!r}, Net(), passphrase={passphrase}, public={str(done.model)!r}).model.eval()"
    )
