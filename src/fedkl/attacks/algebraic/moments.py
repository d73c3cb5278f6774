"""What the values behind a norm say about its γ and β, and about the norm's input.

z = γ x̂ + β, and x̂ has mean 0 and, up to ε, variance 1 over the positions of a channel. So β is the mean of
z and γ √ρ its standard deviation, where ρ = σ² / (σ² + ε) and σ² is the variance of the norm's input.
Gradients go back as

    σ ∂L/∂u = γ √ρ (δ − mean δ − ρ x̃ mean(δ x̃)),    δ = ∂L/∂z,    x̃ = (u − μ) / σ,

so that only σ is missing. Where the activation above is saturated z is lost; β and γ are then moments over
all positions, of which only a part is known. The first guess uses that part; once the layer below has been
solved, its output tells where the lost positions stand, and γ and β follow by regressing the known z on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedkl.attacks.algebraic.convolution import FLOAT32, Evidence

_SETTLED = 1e-6
_LOST = 0.1  # standard error of a z, from which on it counts as saturated


@dataclass(frozen=True, kw_only=True, eq=False)
class Standardized:
    """Values behind a norm, per channel and position.

    Attributes:
        z: What the activation got.
        variance: Of its error.
        delta: ∂L/∂z.
        x: x̃, of mean 0 and variance 1 over all positions; a guess where `known` is False.
        gamma: γ √ρ; never negative.
        beta: β.
        rho: σ² / (σ² + ε).
        known: False where z is lost.
        live: False for channels that are constant, as γ = 0 makes them.
    """

    z: Float[Tensor, "channels positions"]
    variance: Float[Tensor, "channels positions"]
    delta: Float[Tensor, "channels positions"]
    x: Float[Tensor, "channels positions"]
    gamma: Float[Tensor, " channels"]
    beta: Float[Tensor, " channels"]
    rho: Float[Tensor, " channels"]
    known: Bool[Tensor, "channels positions"]
    live: Bool[Tensor, " channels"]

    @property
    def scale(self) -> Float[Tensor, " channels"]:
        """γ, 0 where a channel is constant."""
        return torch.where(self.live, self.gamma / self.rho.sqrt(), 0.0)

    @property
    def saturated(self) -> float:
        """The fraction of positions of live channels whose z is lost."""
        return float((~self.known)[self.live].double().mean()) if bool(self.live.any()) else 0.0

    def evidence(self, gradient: Float[Tensor, "channels inputs kernel"]) -> Evidence:
        """What this says about the convolution before the norm, with its weights' observed gradient."""
        size, live = self.gamma.unsqueeze(1), self.live.unsqueeze(1)
        usable = self.known & live
        noise = self.variance / size.square().clamp_min(1e-30) + 10 * FLOAT32**2
        pull = (self.delta * self.x).mean(1, keepdim=True) * self.rho.unsqueeze(1)
        delta = size * (self.delta - self.delta.mean(1, keepdim=True) - self.x * pull)
        strength = FLOAT32**2 * gradient.square().mean((1, 2))
        return Evidence(
            output=torch.where(live, self.x, 0.0),
            variance=torch.where(usable, noise, torch.inf),
            delta=torch.where(live, delta, 0.0),
            gradient=torch.where(live.unsqueeze(2), gradient, 0.0),
            gradient_variance=torch.where(self.live, strength, torch.inf),
            homogeneous=True,
        )

    def differs(self, other: Standardized) -> bool:
        """Whether γ or ρ changed by more than matters."""
        pairs = ((self.gamma, other.gamma), (self.rho, other.rho))
        return any(bool(((a - b).abs() > _SETTLED * b.abs())[self.live].any()) for a, b in pairs)

    def of_size(self, sigma: Float[Tensor, " channels"], *, eps: float) -> Standardized:
        """The same, with ρ for a norm's input of this standard deviation."""
        return replace(self, rho=torch.where(self.live, sigma.square() / (sigma.square() + eps), 1.0))

    def refined(
        self,
        output: Float[Tensor, "channels positions"],
        sigma: Float[Tensor, " channels"],
        *,
        eps: float,
    ) -> Standardized:
        """The same, after the layer below has been solved.

        Args:
            output: The norm's input by that solution, up to a factor.
            sigma: Its standard deviation per channel, in true units.
            eps: The norm's ε.
        """
        sized = self.of_size(sigma, eps=eps)
        if bool(self.known[self.live].all()):
            return sized
        deviation = output - output.mean(1, keepdim=True)
        found = deviation / deviation.square().mean(1, keepdim=True).clamp_min(1e-300).sqrt()
        weight = self.known.double() / self.known.sum(1, keepdim=True).clamp_min(1)
        x0, z0 = ((weight * each).sum(1, keepdim=True) for each in (found, self.z))
        spread = (weight * (found - x0).square()).sum(1, keepdim=True).clamp_min(1e-12)
        gamma = ((weight * (found - x0) * (self.z - z0)).sum(1, keepdim=True) / spread).abs()
        beta = z0 - gamma * x0
        x = torch.where(self.known, (self.z - beta) / gamma.clamp_min(1e-12), found)
        return replace(sized, x=x, gamma=gamma.squeeze(1), beta=beta.squeeze(1))


def standardized(
    z: Float[Tensor, "channels positions"],
    variance: Float[Tensor, "channels positions"],
    delta: Float[Tensor, "channels positions"],
    *,
    gradient: Float[Tensor, "channels inputs kernel"],
) -> Standardized:
    """γ and β as the moments of z over the positions that are not saturated.

    Args:
        z: What the activation got.
        variance: Of its error.
        delta: ∂L/∂z.
        gradient: ∂L/∂W of the convolution before the norm; all zero for a channel with γ = 0.
    """
    known = variance < _LOST**2
    weight = known.double() / known.sum(1, keepdim=True).clamp_min(1)
    beta = (weight * z).sum(1, keepdim=True)
    spread = (weight * (z - beta).square()).sum(1)
    noise = torch.where(known, weight * variance, 0.0).sum(1)
    live = gradient.flatten(1).any(1) & (spread > 4 * noise)
    gamma = (spread - noise).clamp_min(0).sqrt()
    x = (z - beta) / torch.where(live, gamma, 1.0).unsqueeze(1)
    return Standardized(
        z=z, variance=variance, delta=delta, x=x, gamma=gamma, beta=beta.squeeze(1),
        rho=torch.ones_like(gamma), known=known, live=live,
    )  # fmt: skip
