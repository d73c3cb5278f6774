"""The runs that a report is made of."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkl import config as configs
from fedkl.config import AttackConfig, TrainConfig
from fedkl.errors import ConfigError
from fedkl.experiments import chosen_arms
from fedkl.runs import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        name: Its folder's name, below the report's folder.
        directory: Its folder.
        config: Its config.toml.
        summary: Its summary.json.
        records: Its results.jsonl.
    """

    name: str
    directory: RunDirectory
    config: TrainConfig | AttackConfig
    summary: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The configuration as TOML."""
        return configs.dump(self.config)

    @property
    def command(self) -> str:
        """What repeats the run."""
        config = shlex.quote(str(self.directory.path / "config.toml"))
        return f"fedkl {self.config.type} --config {config} --out NEW"

    @property
    def machine(self) -> str:
        """Versions and hardware in one line."""
        values = _read(self.directory, "environment")
        gpu = values.get("gpu") or "no GPU"
        return (
            f"fedkl {values.get('fedkl')}, Python {values.get('python')}, PyTorch {values.get('torch')}, "
            f"{values.get('system')}, {values.get('cores')} cores, {values.get('threads')} threads, {gpu}"
        )


@dataclass(frozen=True, kw_only=True)
class TrainRun(Run):
    """A finished training run."""

    config: TrainConfig

    @property
    def fill_ins(self) -> list[dict[str, Any]]:
        """The server's own completions of the model."""
        fill_ins: list[dict[str, Any]] = self.summary["fill_ins"]
        return fill_ins


@dataclass(frozen=True, kw_only=True)
class AttackRun(Run):
    """A finished attack run."""

    config: AttackConfig

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The summaries of the arms by name, in order."""
        return {arm["name"]: arm for arm in self.summary["arms"]}


@dataclass(frozen=True, kw_only=True)
class Collected:
    """All runs of a report; `unfinished` says of each interrupted one how far it came."""

    trains: list[TrainRun]
    attacks: list[AttackRun]
    unfinished: list[str]


def collect(path: Path) -> Collected:
    """Reads all runs in or below a folder.

    Raises:
        ConfigError: There is no run, or one is damaged.
    """
    trains: list[TrainRun] = []
    attacks: list[AttackRun] = []
    unfinished: list[str] = []
    for name, directory in _directories(path):
        config = directory.config
        records = list(directory.results())
        if not (directory.path / "summary.json").exists():
            unfinished.append(f"{name}: {_progress(config, records)}")
            continue
        summary = _read(directory, "summary")
        if isinstance(config, TrainConfig):
            run = TrainRun(name=name, directory=directory, config=config, summary=summary, records=records)
            trains.append(run)
        else:
            attacks.append(
                AttackRun(name=name, directory=directory, config=config, summary=summary, records=records)
            )
    return Collected(trains=trains, attacks=attacks, unfinished=unfinished)


def _directories(path: Path) -> Iterator[tuple[str, RunDirectory]]:
    if (path / "config.toml").is_file():
        yield path.resolve().name, RunDirectory.open(path)
        return
    found = sorted(file.parent for file in path.rglob("config.toml"))
    if not found:
        raise ConfigError(
            f"{path}: no run directory here or below (no config.toml). Give the folder of a fedkl run, or "
            "of several."
        )
    for folder in found:
        yield folder.relative_to(path).as_posix(), RunDirectory.open(folder)


def _progress(config: TrainConfig | AttackConfig, records: list[dict[str, Any]]) -> str:
    if isinstance(config, TrainConfig):
        done, total, what = _count(records, "round"), config.training.rounds, "rounds"
    else:
        done, total = _count(records, "trial"), config.trials * len(chosen_arms(config))
        what = "trials (over all arms)"
    return f"not finished, {done} of {total} {what} done; its figures are left out"


def _count(records: list[dict[str, Any]], event: str) -> int:
    return sum(record["event"] == event for record in records)


def _read(directory: RunDirectory, name: str) -> dict[str, Any]:
    try:
        values = directory.environment if name == "environment" else directory.summary
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory.path / name}.json: missing or damaged. Run the experiment again."
        ) from error
    return values or {}
