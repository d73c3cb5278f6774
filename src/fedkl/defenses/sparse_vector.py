"""NVFlare's filter SVTPrivacy: some noisy entries are sent, chosen by the sparse vector technique."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedkl.defenses.base import register_defense
from fedkl.defenses.changing import Draws, UpdateDefense
from fedkl.errors import ConfigError
from fedkl.protocol import Sending, Transform, only_kept
from fedkl.types import NamedTensors

_PASSES = 1000


@register_defense
@dataclass(frozen=True, kw_only=True)
class SparseVector(UpdateDefense):
    """NVFlare's SVTPrivacy: of entries whose noisy magnitude passes a noisy threshold, some are sent, noisy.

    Differences are divided by the number of local steps and clipped to ±γ. With n the number of entries to
    send, the threshold is τ + Lap(γ / ε₁), and an entry passes with magnitude + Lap(2 γ n / ε₂), where
    ε₁ : ε₂ = 1 : (2 n)^⅔ and ε₁ + ε₂ = ε; all are asked again until n or more have passed. Of those, n are
    drawn with replacement, so that fewer are sent. What is sent is clipped, gets Lap(2 γ / noise_var) and is
    multiplied by the steps; all else becomes 0. Tensors without dimensions are sent as they are.

    No differential privacy is claimed. NVFlare calls it that, with ε for the choice and n · noise_var for
    what is released: with the defaults 100 for an update of 10,000 entries. And to ask again until enough
    have passed is not what the sparse vector technique's proof is of.

    A server that knows it sees which entries were kept, and compares those only. It does not clip its own:
    where γ is small nearly all are cut off, and slopes vanish.

    Attributes:
        fraction: Entries to send, of all.
        epsilon: ε of the choice.
        noise_var: Of the noise on what is sent, but no variance: the larger it is, the less noise.
        gamma: γ, the largest magnitude of one step's mean change.
        tau: τ.
        steps: What the filter is told of the local steps (NUM_STEPS_CURRENT_ROUND); NVFlare takes 1 where a
            trainer does not say.

    Source:
        nvflare/app_common/filters/svt_privacy.py at f3b7c1b (August 2026), with its defaults. As in
        Li et al. 2019, "Privacy-preserving federated brain tumour segmentation" (arXiv 1910.00962). Left out
        are its other ways to split ε, drawing without replacement and the accountant. Different here: a
        gradient, where one is sent, is filtered as a difference of weights is there; and after 1,000 passes
        with too few entries, those are drawn from, where NVFlare goes on for ever.
    """

    type: Literal["sparse-vector"] = "sparse-vector"
    fraction: float = 0.1
    epsilon: float = 0.1
    noise_var: float = 0.1
    gamma: float = 1e-5
    tau: float = 1e-6
    steps: int = 1

    def __post_init__(self) -> None:
        sizes = (self.epsilon, self.noise_var, self.gamma)
        fine = 0 < self.fraction <= 1 and all(0 < size < math.inf for size in sizes)
        if not (fine and math.isfinite(self.tau) and self.steps >= 1):
            raise ConfigError(
                "SparseVector: expected fraction above 0 and at most 1, finite epsilon, noise_var and gamma "
                f"> 0, a finite tau and steps from 1, got {self.fraction}, {self.epsilon}, {self.noise_var}, "
                f"{self.gamma}, {self.tau} and {self.steps}."
            )

    def changed(self, change: NamedTensors, *, draws: Draws, client: Sending) -> NamedTensors:
        """Filters all tensors together."""
        flat = torch.cat([tensor.flatten() for tensor in change.values()]).double() / self.steps
        clipped = flat.clamp(-self.gamma, self.gamma)
        wanted = math.ceil(self.fraction * len(flat))
        passed = self._passed(clipped.abs(), wanted, draws)
        filtered = torch.zeros_like(flat)
        if len(passed):
            drawn = (draws.uniform(flat[:wanted]) * len(passed)).long()
            sent = torch.unique(passed[drawn])
            noise = 2 * self.gamma / self.noise_var * draws.laplace(clipped[sent])
            filtered[sent] = self.steps * (clipped[sent] + noise)
        parts = torch.split(filtered, [tensor.numel() for tensor in change.values()])
        return {
            name: part.reshape(tensor.shape).to(tensor) if tensor.dim() else tensor
            for (name, tensor), part in zip(change.items(), parts, strict=True)
        }

    def _passed(self, sizes: Tensor, wanted: int, draws: Draws) -> Tensor:
        """Places of the entries that pass."""
        share = 1 / (1 + (2 * wanted) ** (2 / 3))
        threshold = self.tau + self.gamma / (share * self.epsilon) * draws.laplace(sizes[0])
        scale = 2 * self.gamma * wanted / ((1 - share) * self.epsilon)
        passed = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
        for _ in range(_PASSES):
            passed |= sizes + scale * draws.laplace(sizes) >= threshold
            if passed.sum() >= wanted:
                break
        return passed.nonzero().flatten()

    @property
    def public_transform(self) -> Transform:
        """Only what was kept, which is not as it was."""
        return partial(only_kept)

    def describe(self) -> str:
        """Its numbers."""
        noise = 2 * self.gamma / self.noise_var
        numbers = f"ε = {self.epsilon:g}, γ = {self.gamma:g}, τ = {self.tau:g}, noise {noise:g}"
        return f"{self.type} ({100 * self.fraction:g} % drawn, {numbers}, steps {self.steps})"
