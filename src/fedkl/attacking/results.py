"""What the trials of an attack come to: figures over all images of an arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fedkl.attacking.grid import NotRun
from fedkl.attacking.views import chosen_arms
from fedkl.attacks import Reason
from fedkl.config import AttackConfig
from fedkl.defenses import Arm
from fedkl.errors import ConfigError, shown
from fedkl.formats import check_version
from fedkl.metrics import SSIM_SUCCESS, SUCCESS_DB, success_rate, summarize
from fedkl.run_records import Count, Needed, Seconds, Share, Word
from fedkl.runs import RunDirectory, damaged_summary
from fedkl.validation import problems_of

VERSION = 2
"""Of what an attack leaves in results.jsonl and summary.json; runs of version 1 have no floor."""


def arm_summary(
    arm: Arm, records: list[dict[str, Any]], *, updates_per_client: int = 1, broke: int = 0
) -> dict[str, Any]:
    """What an arm is, and its figures over all its images; see `arm_figures`."""
    about = {
        "name": arm.name,
        "description": arm.description,
        "knows": arm.knowledge.describe(),
        "open": arm.open,
        "control": arm.control,
    }
    return about | arm_figures(records, updates_per_client=updates_per_client, broke=broke)


def arm_figures(
    records: list[dict[str, Any]], *, updates_per_client: int = 1, broke: int = 0
) -> dict[str, Any]:
    """Figures over all images of some trials: failures count as images that were not recovered.

    Intervals of shares are by update, and by client where clients send several: see `shares`.

    Args:
        records: Of the trials.
        updates_per_client: So many trials in a row are of one client.
        broke: Images of further trials, on which the attack broke.
    """
    scores = [score for record in records for score in record["scores"]]
    rate = partial(success_rate, groups=_groups(records, updates_per_client, broke))

    def values(name: str) -> list[float | None]:
        return [score[name] for score in scores] + [None] * broke

    def flags(name: str) -> list[float | None]:
        return [None if value is None else float(value) for value in values(name)]

    figures: dict[str, Any] = {
        name: summarize(values(name)).to_dict()
        for name in ("psnr", "ssim", "mse", "correlation", "psnr_raw", "psnr_affine", "ssim_affine")
    }
    similar = rate(values("ssim"), threshold=SSIM_SUCCESS)
    found = rate(flags("label_correct"), threshold=1.0)
    return {
        "scaling": records[0]["scaling"],
        "candidates": scores[0]["candidates"],
        "figures": figures,
        **shares(records, updates_per_client=updates_per_client, broke=broke),
        "ssim_success": similar._asdict(),
        "label_correct": found._asdict(),
        "evaluations": summarize([float(r["evaluations"]) for r in records]).to_dict(),
        "loss": summarize([r["loss"] for r in records]).to_dict(),
    }


def shares(
    records: Sequence[Mapping[str, Any]],
    *,
    updates_per_client: int = 1,
    broke: int = 0,
    alike: float = 1.0,
) -> dict[str, Any]:
    """Which shares of the images were recovered and identified, with intervals: what a verdict rests on.

    An attack rebuilds an update or does not, and its images are no trials of their own: intervals are by
    update. Where clients send several, they are by client, as its images share its secrets.

    Args:
        records: Of trials, or of the floor.
        updates_per_client: So many trials in a row are of one client.
        broke: Images of further trials, on which the attack broke: neither recovered nor identified.
        alike: Assumed correlation of an update's images where none or all are found; see `success_rate`.
    """
    scores = [score for record in records for score in record["scores"]]
    rate = partial(success_rate, groups=_groups(records, updates_per_client, broke), alike=alike)
    recovered = [score["psnr"] for score in scores] + [None] * broke
    identified = [float(score["identified"]) for score in scores] + [None] * broke
    return {
        "success": rate(recovered, threshold=SUCCESS_DB)._asdict(),
        "identified": rate(identified, threshold=1.0)._asdict(),
        "broke": broke,
        "updates": len(records),
    }


def floor_shares(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The shares of a guess that looks at no update: of each image by itself, as far as they scatter so."""
    return shares(records, alike=0.0)


def _groups(records: Sequence[Mapping[str, Any]], updates_per_client: int, broke: int) -> list[Hashable]:
    """What each image belongs to. Of which client a broken trial was is not looked up: each is a group."""
    sent = [record["trial"] // updates_per_client for record in records for _ in record["scores"]]
    size = max([1, *(len(record["scores"]) for record in records)])
    return [*sent, *(f"broke {number // size}" for number in range(broke))]


def broken(left_out: Iterable[Mapping[str, Any]], arm: str) -> int:
    """Trials of an arm on which an attack broke, by what `not_run` tells."""
    return sum(each["trials"] for each in left_out if (each["arm"], each["kind"]) == (arm, "broke"))


def not_run(left_out: Sequence[NotRun]) -> list[dict[str, Any]]:
    """What came to no reconstruction: by arm, kind and reason, how many trials."""
    count = Counter((each.arm, each.kind, each.reason) for each in left_out)
    return [
        {"arm": arm, "kind": kind, "reason": reason, "trials": trials}
        for (arm, kind, reason), trials in count.items()
    ]


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
    open: bool | None = None
    control: Word | None = None
    label_correct: _Rate
    evaluations: _Middle
    loss: _Middle


class _Shares(Needed):
    success: _Rate
    identified: _Rate


class _NotRun(Needed):
    arm: Word
    kind: Reason
    reason: Word
    trials: Count


class _AttackSummary(Needed):
    """What the report takes from an attack's summary."""

    attack: Word
    initialization: Word
    arms: Annotated[list[_Arm], Field(min_length=1)]
    seconds: Seconds
    version: Literal[1, 2] = 1
    floor: _Shares | None = None
    not_run: Annotated[list[_NotRun], Field(default_factory=list)]


def attack_summary(directory: RunDirectory) -> dict[str, Any] | None:
    """An attack's summary, which has all that a report takes from it; None if the run was not finished.

    Raises:
        ConfigError: It is damaged, or of another experiment.
        NewerFormatError: A newer fedkl wrote it.
    """
    config, summary = directory.config, directory.summary
    if not isinstance(config, AttackConfig):
        raise ConfigError(f"{directory.path}: not an attack.")
    if summary is None:
        return None
    check_version(summary.get("version"), source=directory.path / "summary.json", reads=VERSION)
    try:
        _AttackSummary.model_validate(summary)
        problems = _arm_problems(summary, config)
    except ValidationError as error:
        problems = problems_of(error)
    if problems:
        raise damaged_summary(directory, problems)
    return summary


def _arm_problems(summary: dict[str, Any], config: AttackConfig) -> list[str]:
    known = [arm.name for arm in chosen_arms(config)]
    names = [arm["name"] for arm in summary["arms"]]
    problems = [f"arms: {shown(name)} is none of this attack's" for name in names if name not in known]
    return problems + (["arms: one is there twice"] if len(set(names)) < len(names) else [])
