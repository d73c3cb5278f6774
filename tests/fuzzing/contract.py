"""What a finding is: an exception that is no `FedKLError`, or a text that nobody can print or read."""

from __future__ import annotations

import hashlib
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import fedkl

PACKAGE = str(Path(fedkl.__file__).parent)
LONGEST_TEXT = 20_000
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # a newline separates the lines of our messages
_LOGGERS = ("flwr.fedkl", "fedkl.flower")
_SILENT = logging.CRITICAL + 1


class Hang(BaseException):
    """Raised by the alarm of an input; no `except Exception` on the way swallows it."""


class Finding(Exception):  # noqa: N818 (it is no error of ours)
    """A broken contract.

    Attributes:
        what: In one line.
        cause: The same for all inputs that break it at the same place.
        details: A traceback, if there is one.
    """

    def __init__(self, what: str, *, cause: str | None = None, details: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.cause = cause or what
        self.details = details

    @classmethod
    def of(cls, error: BaseException) -> Finding:
        """The finding that an exception is."""
        line, cause = _place(error.__traceback__)
        kind = type(error).__name__
        text = _shortened(str(error))
        details = "".join(traceback.format_exception(error, limit=-40))
        return cls(f"{kind} at {line}: {text}", cause=f"{kind} at {cause}", details=details)

    @property
    def key(self) -> str:
        """A file name for its cause."""
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.cause).strip("-")[:60]
        return f"{words}-{hashlib.sha256(self.cause.encode('utf-8', 'replace')).hexdigest()[:8]}"


def _place(trace: TracebackType | None) -> tuple[str, str]:
    """The innermost line of the package, and a name for it that stays when lines above it are edited."""
    frames = [frame for frame in traceback.extract_tb(trace) if frame.name != "_ring"]  # the alarm's own
    own = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    if not frames:
        return "an unknown place", "an unknown place"
    frame = (own or frames)[-1]
    file = Path(frame.filename)
    name = file.relative_to(PACKAGE).as_posix() if own else "/".join(file.parts[-3:])
    return f"{name}:{frame.lineno} in {frame.name}", f"{name} in {frame.name}: {frame.line}"


def _shortened(text: str) -> str:
    shown = text.encode("ascii", "backslashreplace").decode().splitlines()[:1]
    return shown[0][:200] if shown else ""


def check_text(text: str, *, of: str, trace: TracebackType | None = None) -> None:
    """Checks that a message can be printed on a terminal and kept in a log.

    Args:
        text: The message.
        of: What it is the message of, e.g. the exception's class.
        trace: Where it comes from.

    Raises:
        Finding: It is too long, cannot be encoded, or holds codes that change what a terminal shows.
    """
    problem = None
    if len(text) > LONGEST_TEXT:
        problem = f"a text of more than {LONGEST_TEXT} characters"
    elif control := _CONTROL.search(text):
        problem = "a control code in the text"
        text = f"{control[0]!r} in {text[max(0, control.start() - 60) : control.end() + 60]!r}"
    elif any("\ud800" <= character <= "\udfff" for character in text):
        problem = "a lone surrogate in the text, which cannot be printed"
    if problem:
        line, cause = _place(trace) if trace else (of, of)
        what = f"{of} at {line}: {problem}: {_shortened(text)}"
        raise Finding(what, cause=f"{of} at {cause}: {problem}")


class _Lines(logging.Handler):
    """Keeps the lines of fedkl's own loggers, as they would be written."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((f"log line of {record.module}.{record.funcName}", record.getMessage()))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Collects what warnings and log lines say, with where they come from, and shows none of them."""
    texts: list[tuple[str, str]] = []
    handler = _Lines()
    with warnings.catch_warnings(record=True) as seen, _redirected(handler):
        warnings.simplefilter("always")
        yield texts
    texts += [(f"warning of {Path(w.filename).name}", str(w.message)) for w in seen or () if _own(w)]
    texts += handler.lines


def _own(warning: warnings.WarningMessage) -> bool:
    """Those of `fedkl.errors.warn`: other libraries' texts are theirs."""
    return warning.category is UserWarning and "/site-packages/" not in warning.filename


@contextmanager
def _redirected(handler: logging.Handler) -> Iterator[None]:
    root = logging.getLogger("flwr")
    own = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.level, logger.propagate) for logger in (root, *own)]
    root.setLevel(_SILENT)
    for logger in own:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(handler)


def outcome_of(error: Exception) -> str:
    """The kind of an error and its text without names and numbers: equal for errors of one origin."""
    return f"{type(error).__name__}: {template(str(error))}"


def template(text: str) -> str:
    """A text without names, paths and numbers: its first line, and the first of the problems it lists."""
    lines = [line[:400] for line in text[:2000].split("\n")[:2]]
    plain = [re.sub(r"'[^']*'|\"[^\"]*\"|/[^\s:]+|[-+\d.]+", "#", line) for line in lines]
    return " ".join(re.sub(r"(.)\1{3,}", r"\1", line)[:70] for line in plain)
