"""Calls of the package are checked while its tests run, where an annotation tells a shape or dtype.

Mypy checks all other types. A check of every call took over a quarter of the time of the tests that were
timed.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import jaxtyping

import tests

_SOURCE = Path(tests.__file__).parents[1] / "src" / "fedkl"
_DTYPES = r"\b(?:Bool|Float(?:32|64)?|Int(?:64)?|UInt8|Shaped)\["
_ALIAS = re.compile(rf"^(\w+) = .*{_DTYPES}", re.MULTILINE)


def install() -> None:
    """Before the package's first import."""
    aliases = {name for path in _SOURCE.rglob("*.py") for name in _ALIAS.findall(path.read_text("utf-8"))}
    told = re.compile(rf"{_DTYPES}|\b(?:{'|'.join(sorted(aliases))})\b")
    everything = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Any) -> Any:
        check = everything(typechecker=typechecker)
        return lambda thing: check(thing) if _tells(thing, told) else thing

    jaxtyping.jaxtyped = jaxtyped  # what the import hook puts on every function and class
    jaxtyping.install_import_hook("fedkl", "beartype.beartype")


def _tells(thing: Any, told: re.Pattern[str]) -> bool:
    """Whether an annotation of a function, or of a dataclass's fields, tells a shape; as strings, all are."""
    if not (inspect.isfunction(thing) or inspect.isclass(thing)):
        return True  # a property, a static method: what it wraps is not looked for
    return any(told.search(str(each)) for each in inspect.get_annotations(thing).values())
