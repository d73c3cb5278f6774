"""`fedkl key`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

import fedkl
from fedkl.cli import enrollment
from fedkl.cli.commands import Command, given
from fedkl.cli.terminal import console
from fedkl.errors import ConfigError

app = typer.Typer(help="Key files: new, info, rotate, passphrase.", no_args_is_help=True)
_NEW_PASSPHRASE_VARIABLE = "FEDKL_NEW_PASSPHRASE"  # noqa: S105 (a name, not a passphrase)

PlainOption = Annotated[
    bool, typer.Option("--unencrypted", help="The file has no passphrase: whoever reads it has the key.")
]
PassphraseFileOption = Annotated[
    Path | None,
    typer.Option(help="File with the passphrase.", show_default="FEDKL_PASSPHRASE, or it is asked for"),
]


class _KeyCommand(Command):
    kept = "Every file is whole: the old one or the new one. The command again:"


def _passphrase(*, unencrypted: bool, confirm: bool, file: Path | None) -> str | None:
    from fedkl.passphrases import PASSPHRASE_VARIABLE

    if unencrypted and file is not None:
        raise ConfigError(f"--unencrypted and --passphrase-file {file} exclude each other. Leave one out.")
    if unencrypted:
        return None
    return _told(file, variable=PASSPHRASE_VARIABLE, prompt="Passphrase", confirm=confirm)


def _told(file: Path | None, *, variable: str, prompt: str, confirm: bool) -> str:
    """What is in the file, or the variable, or what is answered."""
    from fedkl.passphrases import read_passphrase

    if file is not None:
        return read_passphrase(file)
    given = os.environ.get(variable)
    if given is not None:
        return given
    answer: str = typer.prompt(prompt, hide_input=True, confirmation_prompt=confirm)
    return answer


@app.command("new", cls=_KeyCommand)
def key_new(
    path: Annotated[Path, typer.Argument(help="Where to write the key.")],
    length: Annotated[int, typer.Option(help="How many secret numbers.")] = 1024,
    distribution: Annotated[
        str, typer.Option(help="normal (zero mean, unit norm) or uniform (published).")
    ] = "normal",
    unencrypted: PlainOption = False,
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Draws a new key, and writes it to a file that a passphrase protects."""
    if path.exists():  # before a passphrase is asked for; whether it is there later is asked again
        raise ConfigError(f"{path}: exists already. Use `fedkl key rotate` or another path.")
    key = fedkl.Key.generate(length=length, distribution=distribution)  # type: ignore[arg-type]
    passphrase = _passphrase(unencrypted=unencrypted, confirm=True, file=passphrase_file)
    fedkl.save_key(key, path, passphrase=passphrase, replace=False)
    console.print(f"{path}: {key}", highlight=False, soft_wrap=True)


@app.command("info", cls=_KeyCommand)
def key_info(
    path: Annotated[Path, typer.Argument(help="A key file.")],
    unencrypted: PlainOption = False,
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Checks that a key file opens, and says what it holds without showing it."""
    passphrase = _passphrase(unencrypted=unencrypted, confirm=False, file=passphrase_file)
    key = fedkl.load_key(path, passphrase=passphrase)
    console.print(f"{path}: {key}", highlight=False, soft_wrap=True)


@app.command("rotate", cls=_KeyCommand)
def key_rotate(
    path: Annotated[Path | None, typer.Argument(help="A key file, or a lock file with --target.")] = None,
    unencrypted: PlainOption = False,
    target: Annotated[
        str | None, typer.Option(help="Of a lock: file.py:function that returns a fedkl.Subject.")
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="Of a lock: the public model, or a run directory of fedkl train.")
    ] = None,
    keep_function: Annotated[
        bool, typer.Option("--keep-function", help="Of a lock: leave γ and β as they are.")
    ] = False,
    store: enrollment.StoreOption = None,
    client: enrollment.ClientOption = None,
    held_out: enrollment.HeldOutOption = 0.2,
    epochs: enrollment.EpochsOption = 40,
    lr: enrollment.RateOption = 0.02,
    seed: enrollment.SeedOption = 0,
    passphrase_file: enrollment.PassphraseFileOption = None,
) -> None:
    """Replaces a key by a new one of the same length and distribution. The old file is kept beside it.

    A key file: lock layers must be trained again. Locks that were trained with the old key still need it.

    A lock file (--target, --public) or a client of a store: the lock is drawn anew and fitted to the client's
    images. Do so where the old one may have been seen. With --keep-function γ and β stay, and the model
    computes what it did. Whoever has seen them knows them still.
    """
    if target is None and public is None and store is None and path is not None:
        _refuse_options_of_locks()
        _rotate_key(path, _passphrase(unencrypted=unencrypted, confirm=False, file=passphrase_file))
        return
    if target is None or public is None:
        raise typer.BadParameter("Of a lock give --target and --public; of a key file its path only.")
    from fedkl.enrollment import Fitting

    enrollment.rotate_lock(
        path,
        target=target,
        public=public,
        store=store,
        client=client,
        keep_function=keep_function,
        fitting=Fitting(epochs=epochs, lr=lr, held_out=held_out, seed=seed),
        passphrase_file=passphrase_file,
        unencrypted=unencrypted,
    )


_OF_A_LOCK = ("keep_function", "client", "held_out", "epochs", "lr", "seed")


def _refuse_options_of_locks() -> None:
    flags = given(*_OF_A_LOCK)
    if flags:
        raise typer.BadParameter(
            f"{flags}: of a lock, and this is a key file. Leave it out, or give --target and --public too."
        )


def _rotate_key(path: Path, passphrase: str | None) -> None:
    from fedkl import lockfile

    old = fedkl.load_key(path, passphrase=passphrase)
    key = fedkl.Key.generate(length=old.length, distribution=old.distribution)
    copy = lockfile.keep_copy(path)
    fedkl.save_key(key, path, passphrase=passphrase)
    console.print(f"{path}: replaced by a new {key}", highlight=False, soft_wrap=True)
    console.print(f"{copy}: the old one", highlight=False, soft_wrap=True)


@app.command("passphrase", cls=_KeyCommand)
def key_passphrase(
    path: Annotated[
        Path, typer.Argument(help="A key file, or a lock or secret file, e.g. <store>/<client>/lock.fedkl.")
    ],
    unencrypted: Annotated[
        bool, typer.Option("--unencrypted", help="The file is not encrypted yet; it will be.")
    ] = False,
    passphrase_file: PassphraseFileOption = None,
    new_passphrase_file: Annotated[
        Path | None,
        typer.Option(help="File with the new one.", show_default="FEDKL_NEW_PASSPHRASE, or it is asked for"),
    ] = None,
) -> None:
    """Changes the passphrase of a key, lock or secret file. Copies and backups of it keep the old one."""
    from fedkl import lockfile
    from fedkl.custody.journal import journal_beside

    old = _passphrase(unencrypted=unencrypted, confirm=False, file=passphrase_file)
    new = _told(new_passphrase_file, variable=_NEW_PASSPHRASE_VARIABLE, prompt="New passphrase", confirm=True)
    lockfile.change_passphrase(path, old=old, new=new)
    journal = journal_beside(path)
    if journal is not None:
        journal.note("passphrase changed", about=path.name)
    console.print(f"{path}: opens with the new passphrase only", highlight=False, soft_wrap=True)
