"""An attack that breaks halfway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedkl.attacks import Attack, Reconstruction


@dataclass(frozen=True, kw_only=True)
class Breaking(Attack):
    """Finds the true-sized zeros, but breaks on one of the batches."""

    type: Literal["test-breaking"] = "test-breaking"

    def _run(self, observations, generators, on_evaluation):
        if any(int(o.labels[0]) == 2 for o in observations):  # the second image of the sample is a 2
            raise torch.linalg.LinAlgError("singular")
        return [
            Reconstruction(
                images=torch.zeros(o.batch_size, *o.image_shape),
                labels=o.labels, scaling="clip", loss=1.0, evaluations=1, start=0,
            )
            for o in observations
        ]  # fmt: skip
