"""`fedkl store`: what a node holds of its clients, checked, backed up and restored."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from fedkl.cli.membership import PassphraseFileOption, WholeCommand, store_passphrase, tell, today

app = typer.Typer(help="A node's store of clients: check, backup, restore.", no_args_is_help=True)

_BACKUP_VARIABLE = "FEDKL_BACKUP_PASSPHRASE"

StoreArgument = Annotated[Path, typer.Argument(help="The folder of a node's clients (fedkl-store).")]
_MARKS = {"problem": "PROBLEM: ", "note": "Note: ", "fact": ""}


@app.command("check", cls=WholeCommand)
def store_check(
    store: StoreArgument,
    client: Annotated[str | None, typer.Option(help="Only this client.", show_default="all")] = None,
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Says what a store holds, worst first, and changes nothing. Exit code 2 if there is a problem.

    Its passphrase is in --passphrase-file, or FEDKL_PASSPHRASE, or is that of this user on this machine.
    """
    from fedkl.custody.check import check_store

    facts = check_store(store, passphrase=store_passphrase(passphrase_file), client=client, today=today())
    for fact in facts:
        where = f"{fact.client}: " if fact.client else ""
        tell(f"{where}{_MARKS[fact.level]}{fact.text}")
    if any(fact.level == "problem" for fact in facts):
        raise typer.Exit(2)


@app.command("backup", cls=WholeCommand)
def store_backup(
    store: StoreArgument,
    client: Annotated[str, typer.Option(help="The client.")],
    out: Annotated[Path, typer.Option("--out", help="The new file, on another disk.")],
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Writes a client's key, lock, ledger, journal and member into one encrypted file, and verifies it.

    The backup has a passphrase of its own, which is asked for, or taken from FEDKL_BACKUP_PASSPHRASE. Keep it
    elsewhere, on paper: without it the backup is worth nothing.
    """
    from fedkl.custody.backup import write_backup

    write_backup(
        store,
        client,
        out=out,
        passphrase=store_passphrase(passphrase_file),
        backup_passphrase=_backup_passphrase(confirm=True),
    )
    tell(f"{out}: written, read back and compared. It opens with the backup's own passphrase only.")
    tell("Not in it, on purpose: a member's memory of its cohorts. See docs/custody.md.")


@app.command("restore", cls=WholeCommand)
def store_restore(
    file: Annotated[Path, typer.Argument(help="A backup.")],
    out: Annotated[Path, typer.Option("--out", help="The store that it is put into.")],
    client: Annotated[
        str | None, typer.Option(help="Name of the client there.", show_default="as it was")
    ] = None,
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Puts a client from its backup into a store, encrypted with that store's passphrase: all, or nothing."""
    from fedkl.custody.backup import read_backup, restore
    from fedkl.masking.contents import free_from

    backup = read_backup(file, passphrase=_backup_passphrase(confirm=False))
    day: date = today()
    name = client or backup.client
    folder = restore(backup, out, client=name, passphrase=store_passphrase(passphrase_file), today=day)
    saved = "" if backup.saved is None else f", its lock saved {backup.saved} times"
    tell(f"{folder}: restored from the backup of {backup.made}{saved}.")
    if backup.member is not None:
        cohorts = ", ".join(sorted(backup.member.cohorts)) or "what it joins"
        tell(
            f"Member {backup.member.keys.name} opens sums of {cohorts}, and takes no part: what it has sent "
            f"since the backup is forgotten, and a mask could be used twice. From {free_from(day)} (UTC) on, "
            "have each cohort changed (`fedkl cohort change`), and join the new epoch."
        )
    tell("If the old machine still runs this client, stop it there.")


def _backup_passphrase(*, confirm: bool) -> str:
    given = os.environ.get(_BACKUP_VARIABLE)
    if given is not None:
        return given
    answer: str = typer.prompt("Passphrase of the backup", hide_input=True, confirmation_prompt=confirm)
    return answer
