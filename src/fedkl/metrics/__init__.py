"""How near a reconstruction came, whom it identifies, and what the model is still worth.

Metrics are per image; `summarize` and `success_rate` come after, with their n, failures and spread.
"""

from __future__ import annotations

from fedkl.metrics.assignment import Candidates, best_match, identification_rank
from fedkl.metrics.image import (
    clip,
    correlation,
    fix_affine,
    fix_by_prior,
    mse,
    paper_psnr_to_true,
    psnr,
    ssim,
    true_psnr_to_paper,
)
from fedkl.metrics.scoring import (
    PSNR_CAP_DB,
    SSIM_SUCCESS,
    SUCCESS_DB,
    Matched,
    Scaling,
    Score,
    as_pictures,
    match,
    score,
)
from fedkl.metrics.statistics import (
    Rate,
    Summary,
    mean_interval,
    median_interval,
    success_rate,
    summarize,
    wilson_interval,
)
from fedkl.metrics.utility import accuracy, class_accuracies, evaluate

__all__ = [
    "PSNR_CAP_DB",
    "SSIM_SUCCESS",
    "SUCCESS_DB",
    "Candidates",
    "Matched",
    "Rate",
    "Scaling",
    "Score",
    "Summary",
    "accuracy",
    "as_pictures",
    "best_match",
    "class_accuracies",
    "clip",
    "correlation",
    "evaluate",
    "fix_affine",
    "fix_by_prior",
    "identification_rank",
    "match",
    "mean_interval",
    "median_interval",
    "mse",
    "paper_psnr_to_true",
    "psnr",
    "score",
    "ssim",
    "success_rate",
    "summarize",
    "true_psnr_to_paper",
    "wilson_interval",
]
