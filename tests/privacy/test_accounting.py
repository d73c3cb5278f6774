"""ε against values that others computed, and against closed forms."""

from __future__ import annotations

import builtins
import math
from statistics import NormalDist

import pytest

from fedkl.defenses import NoDefense
from fedkl.defenses.client_dp import ClientDP
from fedkl.defenses.clipping import Clipping
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.defenses.noise import GaussianNoise
from fedkl.errors import ConfigError
from fedkl.federated.options import LocalTraining
from fedkl.privacy import GaussianCost, epsilon
from fedkl.protocol import Procedure

DELTA = 1e-5


def cost(noise=1.0, rate=1.0, releases=1):
    return GaussianCost(noise_multiplier=noise, sampling_rate=rate, releases=releases, protects="one image")


def exact_delta(sigma, eps):
    """Balle and Wang 2018, theorem 8, with sensitivity 1."""
    normal = NormalDist().cdf
    return normal(0.5 / sigma - eps * sigma) - math.exp(eps) * normal(-0.5 / sigma - eps * sigma)


def test_sampled_steps_cost_what_the_pld_accountant_says():
    """q = 0.1, σ = 1, 300 steps, δ = 1e-5: 12.398 by dp-accounting's finest grid."""
    assert epsilon(cost(1.0, 0.1, 300), rounds=1, delta=DELTA) == pytest.approx(12.398, abs=1e-3)


@pytest.mark.parametrize(("sigma", "releases"), [(1.0, 1), (4.0, 1), (10.0, 25), (0.5, 1)])
def test_gaussian_noise_alone_costs_what_the_exact_curve_says(sigma, releases):
    found = epsilon(cost(sigma, 1.0, releases), rounds=1, delta=DELTA)
    assert exact_delta(sigma / math.sqrt(releases), found) == pytest.approx(DELTA, rel=1e-3)


def test_rounds_add_up_to_one_long_one():
    assert epsilon(cost(1.0, 0.05, 10), rounds=12, delta=DELTA) == epsilon(
        cost(1.0, 0.05, 120), rounds=1, delta=DELTA
    )
    assert epsilon(cost(1.0, 0.05, 10), rounds=0, delta=DELTA) == 0


def test_more_rounds_images_or_steps_cost_more_and_more_noise_less():
    plain = epsilon(cost(1.0, 0.05, 10), rounds=2, delta=DELTA)
    assert epsilon(cost(1.0, 0.05, 10), rounds=3, delta=DELTA) > plain
    assert epsilon(cost(1.0, 0.06, 10), rounds=2, delta=DELTA) > plain
    assert epsilon(cost(1.0, 0.05, 10), rounds=2, delta=DELTA / 10) > plain
    assert epsilon(cost(1.1, 0.05, 10), rounds=2, delta=DELTA) < plain


def test_next_to_no_noise_is_bounded_without_the_draw():
    """A distribution of its losses would fill the memory."""
    assert epsilon(cost(0.05, 0.1), rounds=1, delta=DELTA) == epsilon(cost(0.05), rounds=1, delta=DELTA)


def test_a_round_of_dp_sgd_is_a_release_a_step():
    local = DPSGD(noise_multiplier=0.8).procedure(LocalTraining(batch_size=64, epochs=3))
    found = DPSGD(noise_multiplier=0.8).privacy(local, samples=1000)
    assert found == GaussianCost(
        noise_multiplier=0.8, sampling_rate=0.064, releases=48, protects=found.protects
    )
    steps = DPSGD().privacy(DPSGD().procedure(LocalTraining(batch_size=64, steps=5)), samples=1000)
    assert (steps.sampling_rate, steps.releases) == (0.064, 5)
    few = DPSGD().privacy(DPSGD().procedure(LocalTraining(batch_size=64)), samples=40)
    assert (few.sampling_rate, few.releases) == (1, 1)
    sent = DPSGD().privacy(DPSGD().procedure(LocalTraining(algorithm="fedsgd", batch_size=64)), samples=1000)
    assert (sent.sampling_rate, sent.releases) == (0.064, 1)
    audited = DPSGD().privacy(DPSGD().procedure(Procedure(batch_size=64)), samples=1000)
    assert (audited.sampling_rate, audited.releases) == (1, 1)


def test_two_changes_of_a_client_are_up_to_two_clips_apart():
    found = ClientDP(clip=3.0, noise_multiplier=4.0).privacy(LocalTraining(), samples=10)
    assert (found.noise_multiplier, found.sampling_rate, found.releases) == (2.0, 1.0, 1)
    assert "client" in found.protects


@pytest.mark.parametrize(
    "defense",
    [
        NoDefense(),
        Clipping(),
        GaussianNoise(deviation=1.0),
        DPSGD(noise_multiplier=0.0),
        ClientDP(noise_multiplier=0.0),
    ],
)
def test_without_clipping_or_noise_nothing_is_guaranteed(defense):
    assert defense.privacy(defense.procedure(LocalTraining()), samples=100) is None


@pytest.mark.parametrize(
    "fields", [{"noise_multiplier": 0.0}, {"sampling_rate": 1.5}, {"sampling_rate": 0.0}, {"releases": 0}]
)
def test_impossible_costs_are_refused(fields):
    with pytest.raises(ConfigError, match="GaussianCost"):
        GaussianCost(**{"noise_multiplier": 1.0, "protects": "one image", **fields})


def test_what_is_missing_is_named(monkeypatch):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r'pip install "fedkl\[privacy\]"'):
        epsilon(cost(7.0), rounds=1, delta=DELTA)
