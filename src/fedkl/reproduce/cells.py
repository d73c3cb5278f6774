"""What the tables share: settings from `fedkl.paper`, names, run directories, and the table's files."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from fedkl import config as configs
from fedkl import experiments
from fedkl.config import AttackConfig, TrainConfig
from fedkl.errors import ConfigError
from fedkl.files import write_atomically

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Budget = Literal["quick", "paper"]

OpenProgress = Callable[[str], AbstractContextManager[experiments.Progress]]
"""Opens a progress display for a cell's name."""


def published(table: str) -> dict[str, dict[str, Any]]:
    """The rows of a table of `fedkl.paper` as plain values, by name."""
    text = (files("fedkl.paper") / f"{table}.toml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = tomllib.loads(text)["rows"]
    return rows


def check_names(given: Sequence[str], known: Collection[str], *, place: str) -> None:
    """Raises ConfigError where a name is not known or comes twice, or there is none."""
    twice = [one for one, count in Counter(given).items() if count > 1]
    if twice:
        raise ConfigError(f"reproduce {place}: {', '.join(twice)} given more than once. Name each once.")
    unknown = [repr(one) for one in given if one not in known]
    if unknown or not given:
        raise ConfigError(
            f"reproduce {place}: got {', '.join(unknown) or 'none'}. Choose from {', '.join(known)}."
        )


def holds_other(folder: Path, experiment: TrainConfig | AttackConfig) -> bool:
    """Whether a folder holds a run with other settings; one that never began is in nobody's way."""
    path = folder / "config.toml"
    begun = any((folder / name).exists() for name in ("results.jsonl", "checkpoints", "summary.json"))
    return begun and path.is_file() and path.read_text(encoding="utf-8") != configs.dump(experiment)


def refuse_others(cells: Mapping[Path, TrainConfig | AttackConfig]) -> None:
    """Raises ConfigError where a cell's folder holds a run with other settings than the cell's."""
    for folder, experiment in cells.items():
        if holds_other(folder, experiment):
            raise ConfigError(
                f"{folder}: holds a run with other settings than the table's. Choose another --out, or "
                "remove the folder."
            )


def write_table(out: Path, records: Sequence[Mapping[str, Any]], markdown: str) -> None:
    """Writes table.json and table.md."""
    write_atomically(out / "table.json", (json.dumps(records, indent=2) + "\n").encode())
    write_atomically(out / "table.md", markdown.encode())
