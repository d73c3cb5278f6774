"""The function that a user names on the command line, and the subject that it returns."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from fedkl import scripts
from fedkl.auditing.subject import Subject
from fedkl.errors import ConfigError, FedKLError, printable, shown

_FORM = (
    "Give package.module:function, or path/to/file.py:function, of a function that returns a fedkl.Subject."
)
_ON_CPU = "Audits run on the CPU: leave out .cuda() and .to('cuda'), and load with map_location='cpu'."
_OURS = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A subject, and where it comes from.

    Attributes:
        subject: What the function returned.
        name: As given.
        source: Its file, relative to the current folder; None if it lies elsewhere.
        line: Where in it the function begins; None without the file.
    """

    subject: Subject
    name: str
    source: str | None
    line: int | None


def load(target: str) -> Target:
    """Imports a function and calls it; modules of the current folder are found, and those beside a file.

    Args:
        target: ``package.module:function`` or ``path/to/file.py:function``.

    Returns:
        The subject that it returned, with its place.

    Raises:
        ConfigError: It cannot be imported, there is no such function, it raises, or it returns something
            else. The message names the user's own line.
    """
    place, _, name = target.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"{shown(target)}: expected a module or file, a colon and a function. {_FORM}")
    function = _function(_module(place, target), name, target)
    try:
        subject = function()
    except (Exception, SystemExit) as error:
        raise _failure(target, "the function fails", error) from error
    if not isinstance(subject, Subject):
        raise ConfigError(
            f"{target}: expected a function that returns a fedkl.Subject, got {type(subject).__name__}. "
            "Return fedkl.Subject(model=…, images=…, labels=…)."
        )
    _check_device(target, subject)
    source, line = _source_of(function)
    return Target(subject=subject, name=target, source=source, line=line)


def _module(place: str, target: str) -> ModuleType:
    scripts.find_modules_in(Path.cwd())
    try:
        return _run_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError as error:
        if error.filename == place:
            raise ConfigError(f"{target}: {place}: no such file. {_FORM}") from error
        raise _failure(target, "the file does not import", error) from error
    except (Exception, SystemExit) as error:
        raise _failure(target, "the module does not import", error) from error


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    spec = scripts.spec_of(path, role="target")
    if spec is None:
        raise ImportError("not a Python file")
    return scripts.run(spec)


def _function(module: ModuleType, name: str, target: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if found is None:
        functions = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
        ]
        there = f"it has {', '.join(functions[:10])}" if functions else "it has none"
        raise ConfigError(printable(f"{target}: no such function; {there}. {_FORM}", limit=None))
    if not callable(found):
        raise ConfigError(f"{target}: expected a function, got {type(found).__name__}. {_FORM}")
    try:
        arguments = inspect.signature(found).parameters.values()
    except (TypeError, ValueError) as error:  # of what is written in C
        raise ConfigError(
            f"{target}: expected a function that says which arguments it takes, got {type(found).__name__} "
            f"{shown(name)}. {_FORM}"
        ) from error
    needed = [
        each.name
        for each in arguments
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if needed:
        raise ConfigError(
            f"{target}: expected a function without arguments, got one that needs {', '.join(needed)}. "
            "Give them defaults."
        )
    return found  # type: ignore[no-any-return]


def _failure(target: str, what: str, error: BaseException) -> ConfigError:
    """What went wrong in the user's code, and at which of their lines."""
    if isinstance(error, FedKLError):  # e.g. of Subject: its lines stay lines
        return ConfigError(f"{target}: {what}{_where(error)}: {error}")
    text = printable(f"{type(error).__name__}: {error}")
    if isinstance(error, SystemExit):
        text = f"it ends the program ({text}). Put what only a script does below `if __name__ == '__main__':`"
    remedy = f". {_ON_CPU}" if "cuda" in text.lower() or "nvidia" in text.lower() else ""
    return ConfigError(f"{target}: {what}{_where(error)}: {text}{remedy}")


def _where(error: BaseException) -> str:
    """The innermost line of the user's own, e.g. " at audit.py, line 12"."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {_readable(error.filename)}, line {error.lineno}"
    frames = [each for each in traceback.extract_tb(error.__traceback__) if _is_users(each.filename)]
    return f" at {_readable(frames[-1].filename)}, line {frames[-1].lineno}" if frames else ""


def _is_users(filename: str) -> bool:
    path = Path(filename)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    python = Path(importlib.__file__).parents[1]
    return path.is_file() and not installed and _OURS not in path.parents and python not in path.parents


def _readable(filename: str) -> str:
    path = Path(filename)
    return printable(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def _check_device(target: str, subject: Subject) -> None:
    weights = subject.weights.values() if isinstance(subject.weights, Mapping) else ()
    tensors = [each for each in (subject.images, subject.labels, *weights) if isinstance(each, Tensor)]
    elsewhere = {each.device.type for each in tensors} - {"cpu"}
    if elsewhere:
        raise ConfigError(
            f"{target}: expected tensors on the CPU, got some on {', '.join(sorted(elsewhere))}. {_ON_CPU}"
        )


def _source_of(function: Callable[[], Any]) -> tuple[str | None, int | None]:
    try:
        inner = inspect.unwrap(function)
        file = Path(inspect.getsourcefile(inner) or "").resolve()
        line = inspect.getsourcelines(inner)[1]
    except (OSError, TypeError):
        return None, None
    here = Path.cwd().resolve()
    return (file.relative_to(here).as_posix(), line) if file.is_relative_to(here) else (None, None)
