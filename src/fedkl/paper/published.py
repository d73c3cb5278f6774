"""What the paper prints and how it was run: the one place that reads the tables beside it."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Budget = Literal["quick", "paper"]


def published(table: str) -> dict[str, dict[str, Any]]:
    """The rows of a table of `fedkl.paper` as plain values, by name."""
    text = (files("fedkl.paper") / f"{table}.toml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = tomllib.loads(text)["rows"]
    return rows
