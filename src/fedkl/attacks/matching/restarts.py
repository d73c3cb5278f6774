"""What attacks that descend share: the best point of every problem, and results from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedkl.attacks.base import Reconstruction
from fedkl.attacks.matching.lbfgs import Minima
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.metrics import Scaling


class Incumbents:
    """The best point of every problem so far, by the attacker's own loss.

    All is done on the device and for all problems at once: no step waits for a value to reach the host.

    Args:
        points: Starting points, shape ``(problems, d)``.
    """

    def __init__(self, points: Float[Tensor, "problems d"]) -> None:
        self.points = points.detach().clone()
        self.values = points.new_full((len(points),), torch.inf)

    def offer(self, points: Tensor, values: Tensor, gradients: Tensor) -> Bool[Tensor, " problems"]:
        """Keeps what is better; returns where value and gradient are finite."""
        finite = torch.isfinite(values) & torch.isfinite(gradients).all(1)
        better = finite & (values < self.values)
        self.points = torch.where(better[:, None], points, self.points)
        self.values = torch.where(better, values, self.values)
        return finite


def best_of_restarts(
    matching: GradientMatching,
    found: Incumbents | Minima,
    labels: Sequence[Tensor] | None,
    *,
    restarts: int,
    scaling: Scaling,
    evaluations: int | Tensor,
    unit: Tensor | float = 1.0,
) -> list[Reconstruction]:
    """One reconstruction for every `restarts` problems in a row, chosen by the attacker's own loss.

    Args:
        matching: Gives points their meaning.
        found: The best points; where no value was ever finite, images are NaN.
        labels: Per problem; None: they are the points' logits.
        restarts: Starts per observation.
        scaling: See `Reconstruction.scaling`.
        evaluations: That every start used, or each of them.
        unit: The attacker's own objective for a dummy gradient of zero, per problem.
    """
    images = matching.images(found.points).float()
    images = torch.where(found.values.isfinite()[:, None, None, None, None], images, torch.nan)
    known = matching.logits(found.points).argmax(-1) if labels is None else torch.stack(list(labels))
    losses = (found.values / unit).double().cpu().reshape(-1, restarts)
    used = torch.as_tensor(evaluations).expand(len(found.values)).tolist()
    results: list[Reconstruction] = []
    for place, start in enumerate(losses.argmin(1).tolist()):
        row = place * restarts + start
        results.append(
            Reconstruction(
                images=images[row],
                labels=known[row],
                scaling=scaling,
                loss=float(losses[place, start]),
                evaluations=used[row],
                start=start,
            )
        )
    return results
