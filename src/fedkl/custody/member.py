"""The member of a client: its secret file in the client's folder, and that it stays the same member."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

from fedkl.custody.journal import Journal
from fedkl.custody.ledger import Ledger
from fedkl.errors import ConfigError, KeyFileError, MaskingError
from fedkl.files import PRIVATE_FOLDER, exclusive
from fedkl.masking import MemberFile, MemberKeys
from fedkl.masking.canonical import digest
from fedkl.masking.contents import SUFFIX
from fedkl.masking.exchange import new_member


def secret_file(folder: Path) -> Path | None:
    """The only member's secret file in a client's folder; None: there is none.

    Raises:
        ConfigError: There are several.
    """
    found = sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ConfigError(
            f"{folder}: expected one member's secret file, got {names}. Move away what is not this client's."
        )
    return found[0] if found else None


def identity_of(keys: MemberKeys) -> str:
    """Names a member: a digest of the name and the public identity key on its card. Not secret."""
    return digest("custody.member", keys.name, keys.card().identity).hex()


def admit(folder: Path, file: MemberFile) -> None:
    """Lets the member in a client's folder take part: it is the client's own, and the clock is not behind.

    The first member that is seen beside a lock is remembered in the client's ledger. Opening, moving and
    joining stand in the journal.

    Args:
        folder: The client's.
        file: The member's, open.

    Raises:
        MaskingError: The client had another member, or the clock is behind the journal.
        KeyFileError: Ledger or journal cannot be read, or the ledger not be written.
        ConfigError: Another process has the client open, at the first time.
    """
    check_clock(folder)
    ledger = Ledger.read(folder)
    if ledger is not None and ledger.member is None:
        with exclusive(folder, mode=PRIVATE_FOLDER, follow=False):
            _bind(folder, file)
    elif ledger is not None and ledger.member != identity_of(file.keys):
        raise MaskingError(
            f"{file.path}: {file.keys.name} is not the member that client {ledger.client} has had. Put its "
            f"own secret file back. For another member on purpose: fedkl member new NAME --store "
            f"{folder.parent} --client {folder.name}, once this file is moved away."
        )
    Journal(folder).note_opening()


def new_member_of(folder: Path, name: str, *, passphrase: str, today: date) -> tuple[Path, Path, bool]:
    """Makes a client's member in its folder; see `fedkl.masking.exchange.new_member`.

    Args:
        folder: The client's.
        name: The member's.
        passphrase: Encrypts the secret file; that of the store.
        today: The date.

    Returns:
        The secret file, the card, and whether the keys are new.

    Raises:
        ConfigError: There is no such store, another member's secret file is there, or another process has
            the client open.
        FedKLError: The member cannot be made.
    """
    if not folder.parent.is_dir():  # a new folder would hide a missing mount
        raise ConfigError(
            f"{folder.parent}: no such store. Is the disk mounted? For a new one, make the folder."
        )
    with exclusive(folder, mode=PRIVATE_FOLDER, follow=False):
        there = secret_file(folder)
        if there is not None and there.name != f"{name}{SUFFIX}":
            raise ConfigError(f"{there}: this client has a member already. Move its files away first.")
        made = new_member(name, folder=folder, passphrase=passphrase, today=today)
        with MemberFile.open(made[0], passphrase=passphrase) as file:
            _bind(folder, file)
        return made


def _bind(folder: Path, file: MemberFile) -> None:
    """Remembers a client's member from now on: in its ledger, if it has a lock, and in the journal."""
    ledger = Ledger.read(folder)
    if ledger is not None:
        try:
            replace(ledger, member=identity_of(file.keys)).write(folder)
        except OSError as error:
            raise KeyFileError(f"{folder}: cannot be written ({error.strerror}).") from error
    Journal(folder).try_note("member joined", about=file.keys.name)


def check_clock(folder: Path) -> None:
    """Checks that cards and rosters expire: a clock that was turned back would make them good again.

    Raises:
        MaskingError: The clock is more than a day behind the client's journal.
        KeyFileError: The journal cannot be read.
    """
    problem = Journal(folder).clock_problem()
    if problem:
        raise MaskingError(f"{folder}: no part is taken in any cohort: {problem}.")
