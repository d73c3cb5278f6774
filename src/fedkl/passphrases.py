"""Where passphrases come from: the environment, a file, or one that this machine makes for this user."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fedkl.errors import KeyFileError, warn
from fedkl.files import PRIVATE_FILE, create_once, open_to_others, read_file, remove_parts

PASSPHRASE_VARIABLE = "FEDKL_PASSPHRASE"  # noqa: S105 (a name, not a passphrase)

_MAX_PASSPHRASE = 4096


def default_passphrase() -> str:
    """`FEDKL_PASSPHRASE`, or else a random one of this user on this machine, made at its first use.

    It encrypts what is only ever read back here, such as checkpoints: a run directory that is handed on does
    not give the clients' keys away.

    Raises:
        KeyFileError: It can be neither read nor made.
    """
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given:
        return given
    try:
        path = config_folder() / "passphrase"
        if not path.exists():
            remove_parts(path.parent, of=path.name)
            create_once(path, secrets.token_hex(32).encode(), mode=PRIVATE_FILE)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise KeyFileError(
            f"This machine's passphrase cannot be made ({type(error).__name__}). Set {PASSPHRASE_VARIABLE}."
        ) from error
    return read_passphrase(path)  # read back: another process may have won


def config_folder() -> Path:
    """Where this user's own things of `fedkl` are: the machine's passphrase, the stores that it knows.

    Raises:
        RuntimeError: There is no home.
    """
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "fedkl"


def read_passphrase(path: Path) -> str:
    """The passphrase that a file holds, without white space around it.

    Raises:
        KeyFileError: It cannot be read, is empty or too long, is not UTF-8, or others may write to it.
    """
    try:
        passphrase = read_file(path, limit=_MAX_PASSPHRASE).decode("utf-8-sig").strip()
        writable, readable = (open_to_others(path, permissions=p) for p in (0o022, 0o044))
    except (OSError, ValueError) as error:  # the text of a UnicodeDecodeError would quote the passphrase
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise KeyFileError(
            f"{path}: the passphrase cannot be read ({reason}). Restore it, or set {PASSPHRASE_VARIABLE}."
        ) from None
    if writable:
        raise KeyFileError(
            f"{path}: others may write to the passphrase's file, and so choose the passphrase. Run chmod 600."
        )
    if len(passphrase.splitlines()) > 1:
        raise KeyFileError(
            f"{path}: expected a passphrase in one line, got several. Leave one. "
            f"What was encrypted with all of them opens with the whole text in {PASSPHRASE_VARIABLE}."
        )
    if not passphrase:
        raise KeyFileError(f"{path}: empty. Write a passphrase into it, or set {PASSPHRASE_VARIABLE}.")
    if readable:
        warn(f"{path}: others may read the passphrase's file. Run chmod 600.")
    return passphrase
