"""Every error that `fedkl` raises on purpose.

Each message says what was wrong (qualified name), what was expected, what came, and what to do. No
message ever contains a tensor's values: in a deployment the text of a client's exception reaches the
server's log.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

_SHOWN_PROBLEMS = 50
_PROBLEM = "  - "
_SHOWN_CHARACTERS = 100


class FedKLError(Exception):
    """Base class: catch this to catch everything that `fedkl` raises on purpose."""


class LockError(FedKLError):
    """A model cannot be locked as asked, or a lock is used in a way it cannot serve."""


class KeyFileError(FedKLError):
    """A key or lock file is missing, damaged, foreign, or does not open with this passphrase."""


class NewerFormatError(FedKLError):
    """A file was written by a newer version of fedkl. It is neither taken for damaged nor replaced."""


class SecretError(FedKLError):
    """Something would have carried a secret (key, lock layer, private statistics) outside the client."""


class UpdateError(FedKLError):
    """A state or update has missing, unexpected, wrongly shaped, wrongly typed or non-finite tensors."""


class RoundLostError(UpdateError):
    """A round has enough updates and gives nothing all the same; the training goes on without it."""


class MaskingError(FedKLError):
    """A masked update, a roster or a member's file is refused. The text is for the member's own log only."""


class DataError(FedKLError):
    """A dataset or partition is missing, damaged, or does not fit what was asked."""


class ConfigError(FedKLError):
    """A configuration, run directory or command-line argument is not usable."""


class FolderError(ConfigError):
    """A folder or file is not to be had: it holds another run, or another process has it. It is as it was."""


class TrainingError(FedKLError):
    """A training cannot go on."""


class AttackError(FedKLError):
    """An observation is not one that this attack can work on."""


def gathered(summary: str, problems: Sequence[str], remedy: str) -> str:
    """Formats several problems as one message.

    Args:
        summary: What could not be done.
        problems: One line each, naming the module, tensor or field.
        remedy: What to do about it.

    Returns:
        The message: the summary, the problems as a list (the first fifty), the remedy.

    >>> print(gathered("Cannot load.", ["'fc.weight' is missing"], "Send all tensors."))
    Cannot load.
      - 'fc.weight' is missing
    Send all tensors.
    """
    lines = [f"{_PROBLEM}{problem}" for problem in problems[:_SHOWN_PROBLEMS]]
    more = len(problems) - len(lines)
    return "\n".join([summary, *lines, *([f"{_PROBLEM}and {more} more"] if more else []), remedy])


def problems_of(message: str) -> list[str]:
    """The problems that a message of `gathered` lists; none of any other.

    >>> problems_of(gathered("Cannot load.", ["'fc.weight' is missing"], "Send all tensors."))
    ["'fc.weight' is missing"]
    """
    return [line.removeprefix(_PROBLEM) for line in message.splitlines() if line.startswith(_PROBLEM)]


def shown(name: object) -> str:
    r"""A name that came from elsewhere, in quotes, as it may stand in a message or a log.

    Line breaks and control codes are escaped, so that no name can forge a line of a log; long ones are cut.

    >>> print(shown("fc.weight"), shown("a\nb"))
    'fc.weight' 'a\nb'
    """
    text = str(name)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 1] + "…"
    return repr(text)


def printable(text: str, *, limit: int | None = 300) -> str:
    """Text that may quote what came from elsewhere: control codes escaped, and cut where there is a limit."""
    cut = text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def warn(message: str) -> None:
    """Warns at the line outside this package that led here, however deep inside it the cause was found."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == "fedkl":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
