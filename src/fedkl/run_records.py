"""What a line of a run's results.jsonl must hold, and the kinds of fields that summaries have too."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from fedkl.parsing import parse_json_object

Count = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Word = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Text that may stand in a table or on a terminal: of one line, without control codes."""


class Needed(BaseModel):
    """Fields that are needed of JSON that came from elsewhere, with their kinds; others are let be."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Partition(Needed):
    event: Literal["partition"]
    class_counts: Annotated[
        list[Annotated[list[Count], Field(min_length=1, max_length=10_000)]], Field(min_length=1)
    ]

    @model_validator(mode="after")
    def _check(self) -> _Partition:
        if len({len(row) for row in self.class_counts}) > 1:
            raise ValueError("class_counts: expected as many classes for every client")
        return self


class _Round(Needed):
    event: Literal["round"]
    round: Count
    accuracy: Share | None
    local_accuracies: dict[str, Share] = {}


class _WholeRound(_Round):
    """What it takes to go on after a round; a report takes less, which older runs have too."""

    elapsed: Seconds
    seconds: Seconds
    local_accuracy: Share | None
    accuracies: dict[str, Share]
    dropped: list[str]
    failed: dict[str, str]
    aggregated: bool
    lost: str = ""
    update_bytes: Count


class FillIn(Needed):
    """The server's own completion of a model."""

    arm: Word
    statistics: Word
    accuracy: Share
    auxiliary: Count


class _FillInRecord(FillIn):
    event: Literal["fill-in"]


class _Score(Needed):
    mse: float | None
    psnr: float | None
    ssim: float | None
    correlation: float | None
    psnr_raw: float | None
    psnr_affine: float | None
    ssim_affine: float | None
    identified: bool
    candidates: Annotated[Count, Field(ge=1)]
    label_correct: bool | None
    failed: bool


class _Trial(Needed):
    event: Literal["trial"]
    arm: Annotated[str, Field(pattern=r"^[\w-]{1,100}$")]  # names files too
    trial: Count
    scaling: Literal["clip", "prior"]
    scores: Annotated[list[_Score], Field(min_length=1)]
    evaluations: Count
    loss: float | None
    elapsed: Seconds
    labels: list[Count] | None = None

    @model_validator(mode="after")
    def _check(self) -> _Trial:
        if self.labels is not None and len(self.labels) != len(self.scores):
            raise ValueError("labels: expected as many as scores")
        return self


class _NotRun(Needed):
    event: Literal["not-run"]
    arm: Annotated[str, Field(pattern=r"^[\w-]{1,100}$")]
    trial: Count
    kind: Literal["does not apply", "too large", "broke"]
    reason: Word


class _Floor(Needed):
    event: Literal["floor"]
    trial: Count
    scores: Annotated[list[_Score], Field(min_length=1)]
    labels: list[Count]


_Others = _Partition | _FillInRecord | _Trial | _NotRun | _Floor
_READ: TypeAdapter[Any] = TypeAdapter(Annotated[_Others | _Round, Field(discriminator="event")])
_CONTINUED: TypeAdapter[Any] = TypeAdapter(Annotated[_Others | _WholeRound, Field(discriminator="event")])


def checked(line: bytes, *, continued: bool) -> dict[str, Any]:
    """The record that a line holds.

    Args:
        line: Of results.jsonl.
        continued: Whether the run shall go on with it, which takes more than reading it.

    Raises:
        ValueError: It is none; a ValidationError is one.
    """
    record = parse_json_object(line)
    (_CONTINUED if continued else _READ).validate_python(record)
    json.dumps(record, allow_nan=False)  # as it will be written again
    return record
