"""DLG, Deep Leakage from Gradients: match the gradient by optimizing a dummy image (and label)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedkl.attacks.base import Attack, Reconstruction, register_attack
from fedkl.attacks.matching.lbfgs import Stopping, minimize
from fedkl.attacks.matching.objectives import GradientMatching, Weighting, check_matchable
from fedkl.attacks.matching.restarts import best_of_restarts
from fedkl.attacks.parallel import Progress
from fedkl.attacks.priors import outside_box, weighted
from fedkl.errors import ConfigError
from fedkl.protocol import Observation
from fedkl.types import Labels


@register_attack
@dataclass(frozen=True, kw_only=True)
class DLG(Attack):
    """L-BFGS on the squared gradient difference, from Gaussian noise; no prior by default.

    Labels are used if the observation grants them and otherwise optimized along, through a softmax.

    Attributes:
        evaluations: Evaluations of the objective for each start at most. The original: 300 × 20 L-BFGS
            iterations; the FedKL study 500 × 20.
        restarts: Starts per image; the attacker's own loss chooses.
        weighting: Of the layers in the objective; see `GradientMatching`. The original: ``"none"``.
        history: Correction pairs of L-BFGS. The original: 100.
        box: Weight of the prior that pixels are in [0, 1], see `outside_box`. The original: 0. Behind a
            train-mode norm the gradient leaves the image's scale free, and only this fixes it while the
            attack runs; without it scale and offset are fixed afterwards.

    Source:
        Zhu et al. 2019. Deviations: the objective is divided by the observed gradient's size (the minimizer
        is the same, tolerances get a meaning), computed in float64, and each problem has a line search.
    """

    title: ClassVar[str] = "DLG"
    type: Literal["dlg"] = "dlg"
    evaluations: int = 4000
    restarts: int = 1
    weighting: Weighting = "none"
    history: int = 50
    box: float = 0.0

    def __post_init__(self) -> None:
        if self.evaluations < 1 or self.restarts < 1 or self.history < 1:
            got = f"evaluations={self.evaluations}, restarts={self.restarts}, history={self.history}"
            raise ConfigError(f"{type(self).__name__}: expected all of these ≥ 1, got {got}.")
        if not 0 <= self.box < math.inf:
            raise ConfigError(f"{type(self).__name__}: expected box ≥ 0, got box={self.box}.")

    @property
    def most_evaluations(self) -> int:
        """Of each start; it may stop earlier."""
        return self.evaluations

    def _check(self, observation: Observation) -> None:
        check_matchable(observation)
        self._labels([observation])

    def _labels(self, observations: list[Observation]) -> list[Labels] | None:
        """Labels that are not optimized, per observation; None to optimize them."""
        granted = [o.labels for o in observations if o.labels is not None]
        return granted if len(granted) == len(observations) else None

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        labels = self._labels(observations)
        repeated = [o for o in observations for _ in range(self.restarts)]
        known = None if labels is None else [y for y in labels for _ in range(self.restarts)]
        matching = GradientMatching(
            repeated, labels=known, weighting=self.weighting, prior=weighted(outside_box, self.box)
        )
        start = matching.starts([g for g in generators for _ in range(self.restarts)])
        stopping = Stopping(evaluations=self.evaluations, value=1e-12)
        minima = minimize(
            matching, start, stopping=stopping, history=self.history, on_evaluation=on_evaluation
        )
        return best_of_restarts(
            matching,
            minima,
            known,
            restarts=self.restarts,
            scaling="clip" if self.box else observations[0].scaling,
            evaluations=minima.evaluations,
        )
