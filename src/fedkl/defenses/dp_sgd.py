"""DP-SGD: every image's gradient is clipped, and every local step is noisy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fedkl.defenses.base import AnyProcedure, Defense, register_defense
from fedkl.privacy import GaussianCost
from fedkl.protocol import PerExample, Procedure


@register_defense
@dataclass(frozen=True, kw_only=True)
class DPSGD(Defense):
    """Every local step clips the gradient of each image and adds Gaussian noise to their sum.

    Neighbors differ in one image of one client, which is there or not; how many images a client has counts as
    known, and is sent. Batches are drawn: each image is in each by itself, as the accounting demands. Private
    parameters are clipped and noised with the rest, since later gradients depend on them.

    The informed attacker clips the gradients of its own images one by one. It leaves out the noise, which
    has mean 0; clients that it plays have noise of its own. It is granted the batches, which the accounting
    keeps from it.

    Attributes:
        clip: Largest L2 norm C of one image's gradient.
        noise_multiplier: z: the standard deviation of the noise over C.

    Source:
        Abadi et al. 2016, algorithm 1. Deviations: the sum is divided by the batch's expected size, as in
        Opacus; noise and batches come from the operating system. Noise is rounded to float32, which no
        accounting here looks at (Mironov 2012).
    """

    type: Literal["dp-sgd"] = "dp-sgd"
    clip: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        self._how()

    def procedure(self, procedure: AnyProcedure) -> AnyProcedure:
        """With every image clipped, and noise."""
        return replace(procedure, per_example=self._how())

    def privacy(self, procedure: Procedure, *, samples: int) -> GaussianCost | None:
        """One release a step, of images that are drawn."""
        if self.noise_multiplier == 0:
            return None
        return GaussianCost(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=procedure.sampling_rate(samples),
            releases=procedure.step_count(samples),
            protects="one image of a client more or less",
        )

    def describe(self) -> str:
        """How much it clips, and how much noise it adds."""
        return f"{self.type} (clip {self.clip:g}, noise multiplier {self.noise_multiplier:g})"

    def _how(self) -> PerExample:
        return PerExample(clip=self.clip, noise_multiplier=self.noise_multiplier)
