"""The reconstructions as the attacker would show them: with the scale that the attacker's own rule gives."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from fedkl import wording
from fedkl.attacking.reconstructions import load_reconstruction
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import Scaling, match
from fedkl.report.collect import AttackRun

MAX_ROWS = 8
_CONTRAST = 8 / 255  # what has less looks like one shade on a screen


class Picture(NamedTuple):
    """One cell.

    Attributes:
        image: Shape (channels, height, width), in [0, 1]; None if there is none.
        caption: What stands below it.
        alt: The same in words for those who do not see it.
        identified: Whether of all candidates the true image correlates best with it.
        faint: Whether there is one, without contrast that could be seen: `image` is None then.
    """

    image: Float[Tensor, "channels height width"] | None
    caption: str
    alt: str
    identified: bool = False
    faint: bool = False


class Row(NamedTuple):
    """One true image and what every arm made of it."""

    label: str
    cells: list[Picture]


class Grid(NamedTuple):
    """Rows of pictures; the first column is the truth.

    Attributes:
        columns: Column names.
        rows: At most `MAX_ROWS`.
        total: All images attacked.
        problems: Pictures that could not be read, and why.
    """

    columns: list[str]
    rows: list[Row]
    total: int
    problems: list[str]


def visible(image: Float[Tensor, "channels height width"]) -> bool:
    """Whether a screen shows more than one shade of it."""
    return float(image.max() - image.min()) >= _CONTRAST


def grid(run: AttackRun) -> Grid:
    """The first images of an attack run beside their reconstructions.

    A picture that cannot be read is named in `problems`; the figures do not depend on it.
    """
    records = {(r["arm"], r["trial"]): r for r in run.records if r["event"] == "trial"}
    problems: list[str] = []
    rows: list[Row] = []
    for trial in range(min(run.config.trials, MAX_ROWS)):
        if len(rows) < MAX_ROWS:
            rows += _trial_rows(run, trial, records, problems)
    total = run.config.trials * run.config.batch_size
    return Grid(["true", *run.arms], rows[:MAX_ROWS], total, problems)


def _trial_rows(
    run: AttackRun, trial: int, records: dict[tuple[str, int], dict[str, Any]], problems: list[str]
) -> list[Row]:
    size = run.config.batch_size
    count = min(size, MAX_ROWS)
    truth: Tensor | None = None
    columns: list[list[Picture]] = []
    for arm in run.arms:
        record = records.get((arm, trial))
        found: list[Tensor | None] = [None] * count
        try:
            truth, found = _shown(run, arm, trial, "clip" if record is None else record["scaling"])
        except (AttackError, ConfigError) as error:
            problems.append(str(error))
        scores = [None] * count if record is None else record["scores"][:count]
        columns.append([_picture(arm, trial, x, s) for x, s in zip(found, scores, strict=True)])
    names = [f"{trial + 1}" if size == 1 else f"{trial + 1}.{image + 1}" for image in range(count)]
    true = [
        Picture(None if truth is None else truth[image], "", f"Image {name}: the true image")
        for image, name in enumerate(names)
    ]
    return [Row(name, [true[i], *(column[i] for column in columns)]) for i, name in enumerate(names)]


def _shown(run: AttackRun, arm: str, trial: int, scaling: Scaling) -> tuple[Tensor, list[Tensor | None]]:
    """The first true images, and their scaled reconstructions; None for one that is not finite."""
    reconstruction, truth = load_reconstruction(run.directory, arm, trial=trial)
    if len(truth) != run.config.batch_size:
        raise ConfigError(
            f"{run.directory.path}: {arm}, trial {trial + 1}: expected {run.config.batch_size} pictures, got "
            f"{len(truth)}."
        )
    found = match(reconstruction, truth, scaling=scaling)
    shown = [None if lost else image for image, lost in zip(found.scaled, found.failed, strict=True)]
    return truth[:MAX_ROWS], shown[:MAX_ROWS]


def _picture(arm: str, trial: int, image: Tensor | None, score: dict[str, Any] | None) -> Picture:
    faint = image is not None and not visible(image)
    if faint:
        image = None
    if score is not None and score["failed"]:
        caption = "failed"
    elif image is None:
        caption = "no picture" if score is None else f"no picture, {wording.number(score['psnr'])} dB"
    else:
        caption = "" if score is None else f"{wording.number(score['psnr'])} dB"
    alt = f"Image {trial + 1}, arm {arm}: reconstruction, {caption or 'no score'}"
    return Picture(image, caption, alt, score is not None and score.get("identified", False), faint)
