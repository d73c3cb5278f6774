"""ε of rounds that release numbers with Gaussian noise, by Google's dp-accounting (extra `privacy`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedkl.errors import ConfigError

_INTERVAL = 1e-3  # of privacy losses, rounded up: ε is an upper bound, too large by less than this each 10 ε
_LITTLE_NOISE = 0.3  # below, drawing images helps little, and a distribution of losses would fill the memory


@dataclass(frozen=True, kw_only=True)
class GaussianCost:
    """What one round costs one client: releases of sums with Gaussian noise.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the sum's sensitivity, above 0.
        sampling_rate: The probability, in (0, 1], with which each record is in a release, drawn by itself for
            each (Poisson sampling).
        releases: How many there are in a round, at least 1.
        protects: Between which data nobody can tell, in words.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    releases: int = 1
    protects: str

    def __post_init__(self) -> None:
        usable = 0 < self.noise_multiplier < math.inf and 0 < self.sampling_rate <= 1 and self.releases >= 1
        if not usable:
            raise ConfigError(
                "GaussianCost: expected noise_multiplier > 0, sampling_rate in (0, 1] and releases ≥ 1, got "
                f"{self.noise_multiplier}, {self.sampling_rate} and {self.releases}."
            )


@lru_cache(maxsize=4096)
def epsilon(cost: GaussianCost, *, rounds: int, delta: float) -> float:
    """ε of so many rounds at a δ; an upper bound, close to the exact value.

    Args:
        cost: Of each round.
        rounds: At least 0; 0 cost nothing.
        delta: In (0, 1).

    Raises:
        ConfigError: dp-accounting is not installed.

    Source:
        Privacy loss distributions: Koskela et al. 2020; Doroshenko et al. 2022 ("Connect the dots"). Gaussian
        noise alone: Balle and Wang 2018, exact. Neighbors differ in one record that is there or not.
    """
    check_installed()
    import dp_accounting as accounting

    if rounds == 0:
        return 0.0
    releases = rounds * cost.releases
    if cost.sampling_rate == 1 or cost.noise_multiplier < _LITTLE_NOISE:
        return float(accounting.get_epsilon_gaussian(cost.noise_multiplier / math.sqrt(releases), delta))
    one = accounting.PoissonSampledDpEvent(
        cost.sampling_rate, accounting.GaussianDpEvent(cost.noise_multiplier)
    )
    accountant: Any = accounting.pld.PLDAccountant(value_discretization_interval=_INTERVAL)
    accountant.compose(accounting.SelfComposedDpEvent(one, releases))
    return float(accountant.get_epsilon(delta))


def check_installed() -> None:
    """Raises ConfigError where dp-accounting is not installed."""
    try:
        import dp_accounting.pld  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Accounting for differential privacy needs Google's dp-accounting, which is not installed. Run "
            'pip install "fedkl[privacy]".'
        ) from error
