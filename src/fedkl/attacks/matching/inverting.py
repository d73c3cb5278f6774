"""IG, Inverting Gradients: signed Adam on the cosine distance between gradients, with total variation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedkl.attacks.base import Attack, Reconstruction, register_attack
from fedkl.attacks.labels import known_labels, order_matters
from fedkl.attacks.matching.objectives import GradientMatching, Weighting, check_matchable
from fedkl.attacks.matching.restarts import Incumbents, best_of_restarts
from fedkl.attacks.parallel import Progress
from fedkl.attacks.priors import Prior, total_variation, weighted
from fedkl.metrics import Scaling
from fedkl.protocol import Observation
from fedkl.types import ImageBatch, Labels

# The original works on standardized pixels, (x − mean) / std. Natural images have a mean near 0.5 and, per
# channel, an std near 0.25: its unit is a quarter of ours.
MEAN, STD = 0.5, 0.25
_MILESTONES = (3 / 8, 5 / 8, 7 / 8)


@register_attack
@dataclass(frozen=True, kw_only=True)
class InvertingGradients(Attack):
    """Adam on the sign of the gradient of a cosine distance; pixels stay in [0, 1].

    Labels are used if the observation grants them, otherwise inferred; where it matters which image has which
    (`order_matters`), they are optimized along, through a softmax. What the observation leaves free is found
    along too, both by Adam on the plain gradient.

    Presets of the original: small networks 4,800 `iterations`, `tv` 1e-6; a trained ResNet-18 on ImageNet
    24,000, `tv` 1e-1, 8 `restarts`; untrained ones `largest` 10, `tv` 1e-6, `median_every` 500.

    The box bounds the scale of the images, but does not pin it: behind a train-mode norm 0.5 x fits as well
    as x and lies in the box too. So the rule for scale and offset is that of `Observation.scaling`.

    Attributes:
        iterations: Steps of Adam, one evaluation each.
        restarts: Starts per image; the attacker's own loss chooses.
        lr: Of the pixels, in the original's unit, a standardized pixel: 0.1 is a step of 0.025 in [0, 1]. It
            falls to a tenth after 3/8, 5/8 and 7/8 of the iterations.
        lr_free: Of what the observation leaves free and of label logits, with the same schedule.
        tv: Weight of the total variation of standardized pixels.
        largest: Only this many layers, those with the largest gradients, count; None: all.
        median_every: Iterations between two 3×3 median filters of the image; 0: none.
        weighting: Of the layers in the cosine distance; see `GradientMatching`. The original: ``"none"``.

    Source:
        Geiping et al. 2020, section 4, and its public code. Deviations: standardized pixels are those of mean
        0.5 and std 0.25, whatever the data, since an attacker may not know theirs; starts are N(0.5, 0.25²),
        clipped to the box; the result is the best iterate by the whole loss, not the last one, and the best
        start is chosen by it too (the original leaves total variation out there); there is no median filter
        after the last step. One start by default, as in the original's runs on small networks.
    """

    title: ClassVar[str] = "Inverting Gradients"
    type: Literal["ig"] = "ig"
    iterations: int = 4800
    restarts: int = 1
    lr: float = 0.1
    lr_free: float = 0.01
    tv: float = 1e-6
    largest: int | None = None
    median_every: int = 0
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        others = [*self._positive("lr", "lr_free"), *self._not_negative("tv")]
        self._require(*others, iterations=1, restarts=1, median_every=0, largest=1)

    @property
    def most_evaluations(self) -> int:
        """Of each start."""
        return self.iterations

    def _check(self, observation: Observation) -> None:
        check_matchable(observation)
        self._labels([observation])

    def _labels(self, observations: list[Observation]) -> list[Labels] | None:
        """Labels that are not optimized, per observation; None to optimize them."""
        return None if order_matters(observations[0]) else known_labels(observations)

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        repeated = [o for o in observations for _ in range(self.restarts)]
        known = self._labels(observations)
        labels = None if known is None else [y for y in known for _ in range(self.restarts)]
        matching = self._matching(repeated, labels)
        starts = matching.starts([g for g in generators for _ in range(self.restarts)])
        return best_of_restarts(
            matching,
            self._descend(matching, starts, on_evaluation),
            labels,
            restarts=self.restarts,
            scaling=self._scaling(observations[0]),
            evaluations=self.iterations,
        )

    def _matching(self, observations: list[Observation], labels: list[Labels] | None) -> GradientMatching:
        return GradientMatching(
            observations,
            labels=labels,
            distance="cosine",
            weighting=self.weighting,
            largest=self.largest,
            prior=self._prior(),
            dtype=torch.float32,
        )

    def _prior(self) -> Prior | None:
        return weighted(total_variation, self.tv / STD)

    def _scaling(self, observation: Observation) -> Scaling:
        return observation.scaling

    def _descend(self, matching: GradientMatching, starts: Tensor, on_evaluation: Progress) -> Incumbents:
        pixels = torch.Size(matching.shape).numel()
        images = (MEAN + STD * starts[:, :pixels]).clamp(0, 1)
        free = starts[:, pixels:].clone()
        optimizer = torch.optim.Adam(
            [{"params": [images], "lr": self.lr * STD}, {"params": [free], "lr": self.lr_free}]
        )
        milestones = [int(self.iterations * part) for part in _MILESTONES]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        index = torch.arange(len(starts), device=starts.device)
        best = Incumbents(starts)
        for step in range(1, self.iterations + 1):
            points = torch.cat([images, free], 1)
            values, gradients = matching(points, index)
            finite = best.offer(points, values, gradients)
            gradients = torch.where(finite[:, None], gradients, 0)
            images.grad, free.grad = gradients[:, :pixels].sign(), gradients[:, pixels:]
            optimizer.step()
            schedule.step()
            images.clamp_(0, 1)
            if self.median_every and step % self.median_every == 0:
                filtered = median_filtered(images.reshape(-1, *matching.shape[1:]))
                images.copy_(filtered.reshape(images.shape))
            on_evaluation(step, len(starts))
        return best


def median_filtered(images: ImageBatch) -> Float[Tensor, "batch channels height width"]:
    """The median of every pixel's 3×3 neighborhood, mirrored at the border.

    >>> median_filtered(torch.eye(3)[None, None])[0, 0, 1]
    tensor([0., 0., 0.])
    """
    windows = F.pad(images, (1, 1, 1, 1), mode="reflect").unfold(2, 3, 1).unfold(3, 3, 1)
    return windows.flatten(-2).median(-1).values
