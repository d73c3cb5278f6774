"""All metrics of one attack on one batch: a `Score` per true image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fedkl.errors import AttackError
from fedkl.metrics.assignment import Candidates, Measure, assign, pairwise_cost
from fedkl.metrics.image import checked, clip, correlation, fix_affine, fix_by_prior, mse, psnr, ssim
from fedkl.types import ImageBatch, Labels

PSNR_CAP_DB = 100.0
"""Cap on the PSNR of a `Score`: JSON has no infinity, and a mean over one would say nothing."""

SUCCESS_DB = 30.0
"""PSNR from which an image counts as recovered."""

SSIM_SUCCESS = 0.6
"""SSIM from which an attack counts as successful, for the attack success rate."""

Scaling = Literal["clip", "prior"]
"""The attacker's rule for scale and offset: "clip" where the gradient pins them, "prior" behind a norm."""

_RULES = {"clip": clip, "prior": fix_by_prior}
# Behind a norm the scale is a guess, so it must not decide which image is which.
_MEASURES: dict[str, Measure] = {"clip": "mse", "prior": "correlation"}
_FAILED_COST = 2.0  # any constant: a failure takes the true image that the others leave over
_SAME_IMAGE = 1e-6  # a candidate stored in another floating-point type is still the same image


@dataclass(frozen=True, kw_only=True)
class Score:
    """How near one reconstruction came to one true image.

    Attributes:
        mse: Mean squared error on [0, 1] after the attacker's scaling rule; None if failed.
        psnr: The same in dB, capped at 100 dB; None if failed.
        ssim: Structural similarity after the rule, in [−1, 1]; None if failed.
        correlation: Pearson correlation after the rule, in [−1, 1]; None if failed.
        psnr_raw: PSNR in dB of the reconstruction clipped to [0, 1] without rescaling; None if failed.
        psnr_affine: Diagnostic that uses the truth: PSNR in dB after the best affine fit; None if failed.
        ssim_affine: Diagnostic that uses the truth: SSIM after the best affine fit; None if failed.
        identified: The true image is the nearest of all candidates (rank 1). Chance level 1 / candidates at
            batch size 1; in a batch the matching, which knows the truth, lifts it, so that the level is what
            random images score in the same place.
        rank: Rank of the true image among the candidates; the worst one, `candidates`, if failed.
        candidates: Number of candidates.
        label_correct: The attack found this image's label; None where it did not look for labels.
        failed: The reconstruction holds NaN or infinity. A failure counts as a trial, never as a value.
    """

    mse: float | None
    psnr: float | None
    ssim: float | None
    correlation: float | None
    psnr_raw: float | None
    psnr_affine: float | None
    ssim_affine: float | None
    identified: bool
    rank: int
    candidates: int
    label_correct: bool | None
    failed: bool

    def to_dict(self) -> dict[str, float | int | bool | None]:
        """The fields by name; valid JSON, without NaN or infinity."""
        return asdict(self)


class Matched(NamedTuple):
    """A batch of reconstructions as the attacker would show it, in the order of the true images.

    Attributes:
        raw: Before the scaling rule; zeros where failed.
        scaled: After it, in [0, 1].
        failed: The reconstruction holds NaN or infinity; it takes a true image that the others leave over.
        order: Which reconstruction came to each true image.
    """

    raw: ImageBatch
    scaled: ImageBatch
    failed: Bool[Tensor, " batch"]
    order: Int64[Tensor, " batch"]


def match(reconstruction: ImageBatch, truth: ImageBatch, *, scaling: Scaling) -> Matched:
    """Applies the attacker's scaling rule and matches a batch to the true images.

    Images are matched by squared error under "clip" and by correlation under "prior" (see `best_match`).

    Args:
        reconstruction: Images of shape (batch, channels, height, width); any range, may hold NaN or infinity.
        truth: ImageBatch of the same shape in [0, 1].
        scaling: As in `score`.

    Raises:
        AttackError: The shapes differ, or the scaling rule is unknown.
    """
    if reconstruction.shape != truth.shape:
        raise AttackError(
            f"reconstruction: expected the shape of the truth, {tuple(truth.shape)}, got "
            f"{tuple(reconstruction.shape)}. Pass one reconstruction per true image."
        )
    raw, scaled, failed = _scaled(reconstruction, scaling)
    cost = pairwise_cost(scaled, truth, by=_MEASURES[scaling])
    order = assign(torch.where(failed[:, None], _FAILED_COST, cost))
    return Matched(raw[order], scaled[order], failed[order], order)


def as_pictures(reconstruction: ImageBatch, *, scaling: Scaling) -> ImageBatch:
    """Reconstructions as an attacker would show them, who has no truth: in their own order, in [0, 1].

    Args:
        reconstruction: Images of shape (batch, channels, height, width); any range, may hold NaN or infinity.
        scaling: As in `score`.

    Returns:
        The same shape; NaN where an image is not finite.

    Raises:
        AttackError: The scaling rule is unknown.

    >>> as_pictures(torch.tensor([-1.0, 0.5, 2.0]).view(1, 1, 1, 3), scaling="clip").flatten().tolist()
    [0.0, 0.5, 1.0]
    """
    _, scaled, failed = _scaled(reconstruction, scaling)
    return torch.where(failed[:, None, None, None], torch.nan, scaled)


def _scaled(reconstruction: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
    """Before and after the rule, both with a stand-in where failed; and where that is."""
    if scaling not in _RULES:
        raise AttackError(f"scaling: expected 'clip' or 'prior', got {scaling!r}.")
    found = reconstruction.detach().to(device="cpu", dtype=torch.float64)
    failed = ~found.isfinite().flatten(1).all(1)
    # A constant stand-in lets the whole batch run through the metrics.
    raw = torch.where(failed[:, None, None, None], 0.0, found)
    return raw, _RULES[scaling](raw), failed


def score(
    reconstruction: ImageBatch,
    truth: ImageBatch,
    *,
    candidates: Float[Tensor, "candidates channels height width"] | Candidates,
    candidate_index: Sequence[int] | Tensor,
    labels_true: Labels | None = None,
    labels_found: Labels | None = None,
    scaling: Scaling,
) -> list[Score]:
    """Scores a batch: scales it and matches it to the truths (see `match`), then measures each image.

    Args:
        reconstruction: Images of shape (batch, channels, height, width); any range, may hold NaN or infinity.
        truth: ImageBatch of the same shape in [0, 1].
        candidates: Shape (N, channels, height, width) in [0, 1], N ≥ 2, holding every true image; or the same
            prepared, where many batches are scored.
        candidate_index: For each true image its place among the candidates.
        labels_true: Labels of the true images.
        labels_found: What the attack took for the labels, in the order of `reconstruction`: a label follows
            the image that it was found with.
        scaling: "clip" where the gradient pins the scale of the image, "prior" behind a norm, where it does
            not; see `fedkl.metrics.clip` and `fedkl.metrics.fix_by_prior`. Use the same for all arms of a
            comparison with the same norm.

    Returns:
        One score per true image, in the order of `truth`.

    Raises:
        AttackError: Shapes, ranges, candidates, labels or the scaling rule do not fit.

    >>> truth = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> first, second = score(truth.flip(0), truth, candidates=truth, candidate_index=[0, 1], scaling="clip")
    >>> first.identified, first.psnr, second.failed
    (True, 100.0, False)
    """
    true = checked(truth, name="truth")
    places = [int(place) for place in candidate_index]
    known = candidates if isinstance(candidates, Candidates) else Candidates(candidates)
    _check_truth(true, known.images, places)
    found = match(reconstruction, true, scaling=scaling)
    # What the stand-in for a failure measures is dropped, and its rank is the worst: it correlates with none.
    values = _measure(found.raw, found.scaled, true)
    ranks = known.ranks(found.scaled, indexes=places)
    correct = _label_hits(labels_true, labels_found, found.order)
    return [
        _one(row, rank=rank, candidates=len(known), label_correct=hit, failed=bool(lost))
        for row, rank, hit, lost in zip(values, ranks, correct, found.failed, strict=True)
    ]


def _measure(finite: Tensor, scaled: Tensor, truth: Tensor) -> list[dict[str, float]]:
    affine = fix_affine(finite, truth)
    columns = {
        "mse": mse(scaled, truth),
        "psnr": psnr(scaled, truth).clamp(max=PSNR_CAP_DB),
        "ssim": ssim(scaled, truth),
        "correlation": correlation(scaled, truth),
        "psnr_raw": psnr(clip(finite), truth).clamp(max=PSNR_CAP_DB),
        "psnr_affine": psnr(affine, truth).clamp(max=PSNR_CAP_DB),
        "ssim_affine": ssim(affine, truth),
    }
    return [{name: float(column[row]) for name, column in columns.items()} for row in range(len(truth))]


def _one(
    values: dict[str, float], *, rank: int, candidates: int, label_correct: bool | None, failed: bool
) -> Score:
    measured: dict[str, float | None] = dict.fromkeys(values) if failed else dict(values)
    return Score(
        **measured,
        identified=rank == 1,
        rank=rank,
        candidates=candidates,
        label_correct=label_correct,
        failed=failed,
    )


def _label_hits(true: Tensor | None, found: Tensor | None, order: Tensor) -> list[bool | None]:
    if true is None or found is None:
        return [None] * len(order)
    for name, labels in (("labels_true", true), ("labels_found", found)):
        if labels.shape != order.shape:
            raise AttackError(
                f"{name}: expected shape {tuple(order.shape)}, got {tuple(labels.shape)}. "
                "Pass one label per image."
            )
    return [bool(hit) for hit in found.detach().cpu()[order] == true.detach().cpu()]


def _check_truth(truth: Tensor, known: Tensor, places: list[int]) -> None:
    """Raises AttackError where the truth is not in [0, 1], or not among the candidates where it should be."""
    for name, images in (("truth", truth), ("candidates", known)):
        if images.numel() and (images.min() < -_SAME_IMAGE or images.max() > 1 + _SAME_IMAGE):
            raise AttackError(
                f"{name}: expected images in [0, 1], got pixels outside. Undo the normalization first."
            )
    for row, place in enumerate(places):
        fits = row < len(truth) and 0 <= place < len(known) and known.shape[1:] == truth.shape[1:]
        if fits and (known[place] - truth[row]).abs().max() > _SAME_IMAGE:
            raise AttackError(
                f"candidate_index[{row}]: candidate {place} is not the true image {row}. "
                "Give each true image its own place among the candidates."
            )
