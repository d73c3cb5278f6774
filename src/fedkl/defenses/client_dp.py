"""Differential privacy of whole clients, by noise of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedkl.defenses.base import register_defense
from fedkl.defenses.changing import Draws, UpdateDefense
from fedkl.defenses.clipping import Clipped
from fedkl.errors import ConfigError, gathered
from fedkl.privacy import GaussianCost
from fedkl.protocol import Procedure, Sending, Transform
from fedkl.types import NamedTensors
from fedkl.update import PublicSchema

_COUNT = "num_batches_tracked"


@register_defense
@dataclass(frozen=True, kw_only=True)
class ClientDP(UpdateDefense):
    """Every client clips its change and adds Gaussian noise to it, before anybody sees it.

    Neighbors are any two sets of images that a client may have (replacement: the server knows who takes part,
    so that "there or not" means nothing here). Two clipped changes are at most 2 · clip apart: a round is one
    release with noise of noise_multiplier / 2 times its sensitivity. What a client keeps from round to round
    may be anything, as the bound holds for any change. How many images a client has is sent with the update
    and not hidden, nor are counts of batches that norms keep.

    The informed attacker clips its own change, and leaves the noise out, whose mean is 0.

    Attributes:
        clip: Largest L2 norm of the change over all tensors, norms' running statistics included. A tensor of
            several names counts once: what is sent under the others is a copy, noise included.
        noise_multiplier: The standard deviation of the noise in every entry over `clip`.

    Source:
        Geyer et al. 2017 and McMahan et al. 2018 add the noise on the server, which is trusted there, once
        for the whole average. Here every client adds its own, as in local differential privacy (Duchi et al.
        2013), and that much noise costs accuracy.
    """

    type: Literal["client-dp"] = "client-dp"
    clip: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise ConfigError(f"ClientDP: clip: expected a finite value > 0, got {self.clip}.")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(
                f"ClientDP: noise_multiplier: expected a finite value ≥ 0, got {self.noise_multiplier}."
            )

    @property
    def noise_deviation(self) -> float:
        """In every entry."""
        return self.noise_multiplier * self.clip

    def check_sent(self, schema: PublicSchema) -> None:
        """Refuses what would be sent without noise.

        Raises:
            ConfigError: There are other numbers than floating-point ones and counts of batches.
        """
        exact = [
            f"'{name}' is {spec.dtype}"
            for name, spec in schema.specs.items()
            if not spec.dtype.is_floating_point and not name.endswith(_COUNT)
        ]
        if exact:
            raise ConfigError(
                gathered(
                    "ClientDP: expected floating-point numbers, which noise can cover, got others.",
                    exact,
                    "Constants need not be sent: register_buffer(…, persistent=False). Make what changes "
                    "floating-point buffers.",
                )
            )

    def changed(self, change: NamedTensors, *, draws: Draws, client: Sending) -> NamedTensors:
        """Clips the change and adds noise to every tensor."""
        return {
            name: tensor + self.noise_deviation * draws.normal(tensor)
            for name, tensor in Clipped(self.clip)(change, change).items()
        }

    @property
    def public_transform(self) -> Transform:
        """Clips; the noise has mean 0."""
        return Clipped(self.clip)

    def privacy(self, procedure: Procedure, *, samples: int) -> GaussianCost | None:
        """One release."""
        if self.noise_multiplier == 0:
            return None
        return GaussianCost(
            noise_multiplier=self.noise_multiplier / 2, protects="all images of a client, replaced by others"
        )

    def describe(self) -> str:
        """How much it clips, and how much noise it adds."""
        return f"{self.type} (clip {self.clip:g}, noise multiplier {self.noise_multiplier:g})"
