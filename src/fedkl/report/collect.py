"""The runs that a report is made of."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedkl import config as configs
from fedkl.attacking.results import attack_summary
from fedkl.attacking.views import chosen_arms
from fedkl.config import AttackConfig, TrainConfig
from fedkl.defenses import Arm
from fedkl.errors import ConfigError
from fedkl.runs import RunDirectory, is_run
from fedkl.training import training_summary


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
        return f"fedkl {self.config.type} --config {_readable(config)} --out NEW"

    @property
    def machine(self) -> str:
        """Versions and hardware in one line."""
        values = self.directory.environment
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

    @cached_property
    def chosen(self) -> dict[str, Arm]:
        """What its arms are, by name, as its configuration says: older summaries do not."""
        return {arm.name: arm for arm in chosen_arms(self.config)}


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
        summary = _summary_of(directory)
        if summary is None:
            unfinished.append(f"{name}: {_progress(config, records)}")
            continue
        if isinstance(config, TrainConfig):
            run = TrainRun(name=name, directory=directory, config=config, summary=summary, records=records)
            trains.append(run)
        else:
            _check_scores(directory, config, records)
            attacks.append(
                AttackRun(name=name, directory=directory, config=config, summary=summary, records=records)
            )
    return Collected(trains=trains, attacks=attacks, unfinished=unfinished)


def _summary_of(directory: RunDirectory) -> dict[str, Any] | None:
    """A run's summary, which has all that the report takes from it; None if the run was not finished."""
    training = isinstance(directory.config, TrainConfig)
    return training_summary(directory) if training else attack_summary(directory)


def _check_scores(directory: RunDirectory, config: AttackConfig, records: list[dict[str, Any]]) -> None:
    wrong = [r for r in records if r["event"] == "trial" and len(r["scores"]) != config.batch_size]
    if wrong:
        raise ConfigError(
            f"{directory.path / 'results.jsonl'}: expected {config.batch_size} scores in each trial, got "
            f"{len(wrong[0]['scores'])} in trial {wrong[0]['trial']}. Remove the line, and run it again."
        )


def _directories(path: Path) -> Iterator[tuple[str, RunDirectory]]:
    if is_run(path):
        yield _readable(path.resolve().name), RunDirectory.open(path)
        return
    # Links to folders are not followed: they may lead in circles.
    found = sorted(Path(folder) for folder, _, files in os.walk(path) if "config.toml" in files)
    if not found:
        raise ConfigError(
            f"{path}: no run directory here or below (no config.toml). Give the folder of a fedkl run, or "
            "of several."
        )
    for folder in found:
        yield _readable(folder.relative_to(path).as_posix()), RunDirectory.open(folder)


def _readable(text: str) -> str:
    """The name of a folder, which can be any bytes, as it may stand in a page or on a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _progress(config: TrainConfig | AttackConfig, records: list[dict[str, Any]]) -> str:
    if isinstance(config, TrainConfig):
        done, total, what = _count(records, "round"), config.training.rounds, "rounds"
    else:
        done, total = _count(records, "trial"), config.trials * len(chosen_arms(config))
        what = "trials (over all arms)"
    return f"not finished, {done} of {total} {what} done; its figures are left out"


def _count(records: list[dict[str, Any]], event: str) -> int:
    return sum(record["event"] == event for record in records)
