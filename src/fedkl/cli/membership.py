"""What `fedkl member` and `fedkl cohort` have in common: the member's secret file, the date."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkl.cli.commands import Command
from fedkl.cli.terminal import console
from fedkl.dates import today as today  # commands know the date from here
from fedkl.errors import ConfigError, KeyFileError

if TYPE_CHECKING:
    from fedkl.masking import MemberFile

MemberOption = Annotated[
    Path | None,
    typer.Option("--member", help="The member's secret file.", show_default="the only *.secret here"),
]

PassphraseFileOption = Annotated[
    Path | None,
    typer.Option(
        help="File with the store's passphrase.", show_default="FEDKL_PASSPHRASE, or this machine's"
    ),
]


class WholeCommand(Command):
    """A command after which every file is whole, however it ends."""

    kept = "Every file is whole: the old one or the new one. The command again:"


def store_passphrase(file: Path | None) -> str:
    """The passphrase of a node's private files: that of a file, or else as the node finds it.

    Raises:
        KeyFileError: It cannot be read.
    """
    from fedkl.passphrases import default_passphrase, read_passphrase

    return default_passphrase() if file is None else read_passphrase(file)


@contextmanager
def opened(path: Path | None, passphrase_file: Path | None) -> Iterator[MemberFile]:
    """A member's secret file: the one that is named, or else the only one in the current folder.

    Args:
        path: The file, or None.
        passphrase_file: Holds its passphrase; None as `store_passphrase` says.

    Raises:
        ConfigError: There is none, or there are several.
        KeyFileError: It does not open.
    """
    from fedkl.masking import MemberFile
    from fedkl.passphrases import PASSPHRASE_VARIABLE

    path = path or _only_one()
    try:
        file = MemberFile.open(path, passphrase=store_passphrase(passphrase_file))
    except KeyFileError as error:
        if "wrong passphrase" in str(error):
            raise KeyFileError(
                f"{error} Give the one that it was made with, by --passphrase-file or {PASSPHRASE_VARIABLE}; "
                "without one it is that of the user and the machine where it was made."
            ) from error
        raise
    with file:
        yield file


def _only_one() -> Path:
    found = sorted(path for path in Path().glob("*.secret") if not path.name.startswith("."))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(
            f"{Path.cwd()}: no member's secret file, NAME.secret, is in this folder. Go to the folder where "
            "`fedkl member new` was run, or give the file with --member."
        )
    raise ConfigError(
        f"{Path.cwd()}: several secret files are in this folder: {', '.join(map(str, found))}. Say which one "
        "with --member."
    )


def tell(text: str) -> None:
    """Writes a line."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
