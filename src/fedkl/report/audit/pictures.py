"""The pictures of an audit: originals beside what came out, small enough for a page."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedkl.auditing.results import Finding
from fedkl.errors import printable
from fedkl.files import read_file
from fedkl.parsing import parse_tensors
from fedkl.report.pictures import Grid, Picture, Row, visible

_MAX_BYTES = 2**30  # of a file
_LARGEST = 96  # pixels of a side; larger ones are averaged


class Pair(NamedTuple):
    """An image in [0, 1] of shape (channels, height, width), and what came out; None: nothing to be seen."""

    truth: Float[Tensor, "channels height width"]
    found: Float[Tensor, "channels height width"] | None


class Gallery(NamedTuple):
    """The first pictures of a finding.

    Attributes:
        finding: Whose.
        pairs: Shown.
        total: How many there are.
        problem: Why there are none; None: there are.
    """

    finding: Finding
    pairs: list[Pair]
    total: int
    problem: str | None


def gallery(folder: Path, finding: Finding, *, most: int) -> Gallery:
    """Reads the first pictures of a finding; what cannot be read is said, and ends nothing.

    Args:
        folder: The audit's.
        finding: One that has pictures.
        most: How many are shown at most.
    """
    path = folder / str(finding.pictures)
    try:
        tensors, _ = parse_tensors(read_file(path, limit=_MAX_BYTES, follow=False))
        truth, found = tensors["truth"], tensors["found"]
        if truth.shape != found.shape or truth.dim() != 4 or not truth.numel():
            raise ValueError(f"shapes {tuple(truth.shape)} and {tuple(found.shape)}")
        if not (truth.is_floating_point() and found.is_floating_point() and truth.isfinite().all()):
            raise ValueError("originals that are no finite floats")
    except (KeyError, OSError, ValueError) as error:
        return Gallery(finding, [], 0, printable(f"{finding.pictures} cannot be shown ({error})."))
    pairs = [
        Pair(_small(before), _small(after) if bool(after.isfinite().all()) and visible(after) else None)
        for before, after in zip(truth[:most], found[:most], strict=True)
    ]
    return Gallery(finding, pairs, len(truth), None)


def _small(image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    scale = min(1.0, _LARGEST / max(height, width))
    if scale == 1.0:
        return image.float()
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(image.float()[None], size=size, mode="area")[0]


def as_grid(shown: Gallery) -> Grid:
    """The same for a figure: a row an image."""
    rows = [
        Row(
            str(number),
            [Picture(pair.truth, "", f"Image {number}"), Picture(pair.found, "", f"Attempt {number}")],
        )
        for number, pair in enumerate(shown.pairs, start=1)
    ]
    return Grid(["original", "attempt"], rows, shown.total, [])
