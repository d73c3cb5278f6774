"""The runs that a report is made of."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fedkl import config as configs
from fedkl.config import AttackConfig, TrainConfig
from fedkl.errors import ConfigError, gathered, shown
from fedkl.experiments import chosen_arms
from fedkl.runs import Count, FillIn, Needed, RunDirectory, Seconds, Share, Word, is_run
from fedkl.validation import problems_of

ORACLE = "mean-affine"
"""The completion that no server can have."""


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
        summary = summary_of(directory)
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


class _Rate(Needed):
    rate: Share
    low: float
    high: float
    n: Count


class _Middle(Needed):
    median: float | None


class _Spread(_Middle):
    n: Count
    failures: Count
    mean: float | None
    std: float | None
    median_low: float | None
    median_high: float | None


class _Figures(Needed):
    psnr: _Spread
    ssim: _Middle
    psnr_affine: _Middle


class _Arm(Needed):
    name: Word
    description: Word
    knows: Word
    scaling: Literal["clip", "prior"]
    candidates: Annotated[Count, Field(ge=1)]
    figures: _Figures
    success: _Rate
    ssim_success: _Rate | None = None
    identified: _Rate
    label_correct: _Rate
    evaluations: _Middle
    loss: _Middle


class _AttackSummary(Needed):
    """What the report takes from an attack's summary."""

    attack: Word
    initialization: Word
    arms: Annotated[list[_Arm], Field(min_length=1)]
    seconds: Seconds


class _TrainSummary(Needed):
    """What the report takes from a training's summary; older runs lack what has a value here."""

    clients: Count
    rounds: Count
    accuracy: Share
    best_accuracy: Share
    accuracies: dict[str, Share]
    local_accuracy: Share | None = None
    fill_ins: list[FillIn]
    public_parameters: Count
    private_parameters: Count
    update_bytes: Count
    seconds: Seconds
    test_images: Count = 0
    classes: Count = 0
    statistics_shared: bool | None = None
    dropped: Count = 0
    failed: Count = 0
    skipped_rounds: Count = 0


def summary_of(directory: RunDirectory) -> dict[str, Any] | None:
    """A run's summary, which has all that the report takes from it; None if the run was not finished.

    Raises:
        ConfigError: It is damaged, or of another experiment.
    """
    config, summary = directory.config, directory.summary
    if summary is None:
        return None
    try:
        if isinstance(config, TrainConfig):
            _TrainSummary.model_validate(summary)
            problems = _fill_in_problems(summary)
        else:
            _AttackSummary.model_validate(summary)
            problems = _arm_problems(summary, config)
    except ValidationError as error:
        problems = problems_of(error)
    if problems:
        place = f"{directory.path / 'summary.json'}: not the summary of this run."
        raise ConfigError(gathered(place, problems, "Remove it and run the experiment again."))
    return summary


def _arm_problems(summary: dict[str, Any], config: AttackConfig) -> list[str]:
    known = [arm.name for arm in chosen_arms(config)]
    names = [arm["name"] for arm in summary["arms"]]
    problems = [f"arms: {shown(name)} is none of this attack's" for name in names if name not in known]
    return problems + (["arms: one is there twice"] if len(set(names)) < len(names) else [])


def _fill_in_problems(summary: dict[str, Any]) -> list[str]:
    """A server can have all completions but the oracle; where there are any, it has one of its own."""
    arms = {fill_in["arm"] for fill_in in summary["fill_ins"]}
    return ["fill_ins: expected one that a server can have"] if arms == {ORACLE} else []


def _progress(config: TrainConfig | AttackConfig, records: list[dict[str, Any]]) -> str:
    if isinstance(config, TrainConfig):
        done, total, what = _count(records, "round"), config.training.rounds, "rounds"
    else:
        done, total = _count(records, "trial"), config.trials * len(chosen_arms(config))
        what = "trials (over all arms)"
    return f"not finished, {done} of {total} {what} done; its figures are left out"


def _count(records: list[dict[str, Any]], event: str) -> int:
    return sum(record["event"] == event for record in records)
