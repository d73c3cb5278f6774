"""Batches behind a ReLU, taken apart exactly; and what is not, is not claimed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl.attacking import attack_arms, trials_of
from fedkl.attacks import Disaggregation, Knowledge, Procedure
from fedkl.defenses import Arm, NoDefense
from fedkl.errors import AttackError, ConfigError
from tests.attacks.test_linear_rows import EXACT, behind_convolutions, perceptron, qualities, seen_of

FEW = Disaggregation(draws=40_000)


def reconstructed(seen, attack=FEW):
    return attack.reconstruct(seen, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_a_batch_is_exact(images, batch_size):
    seen, trial = seen_of(images, perceptron(), batch_size=batch_size)
    found = reconstructed(seen)
    exact = qualities(found, trial)
    assert len(exact) == batch_size
    assert min(exact) > EXACT
    assert found.loss < 0.01


def test_it_repeats_with_its_generator(images):
    seen, _ = seen_of(images, perceptron(), batch_size=4)
    assert torch.equal(reconstructed(seen).images, reconstructed(seen).images)


def test_weights_after_a_step(images):
    local = Procedure(algorithm="fedavg", lr=0.5)
    seen, trial = seen_of(images, perceptron(), batch_size=3, local=local)
    exact = qualities(reconstructed(seen), trial)
    assert len(exact) == 3
    assert min(exact) > 40


def test_what_it_cannot_take_apart_it_does_not_claim(images):
    model = perceptron()
    seen, _ = seen_of(images, model, batch_size=4)
    noise = {name: torch.randn_like(g) for name, g in seen.gradient.items()}
    mixed, _ = seen_of(images, model, batch_size=8)
    for gradient in (noise, mixed.gradient):  # the second is of more images than it is told
        found = reconstructed(replace(seen, gradient=gradient), Disaggregation(draws=5000))
        assert not found.images.isfinite().any()
        assert found.loss > 0.02


def test_features_are_inverted_with_own_images(images):
    found, model = [], behind_convolutions()
    arm = Arm(name="a", description="", defense=NoDefense(), knowledge=Knowledge(labels=False, auxiliary=500))
    attack_arms(
        [arm],
        attack=FEW,
        build=lambda _: model,
        dataset=images,
        trials=trials_of(images, trials=2, batch_size=3),
        seed=0,
        on_result=found.append,
    )
    scores = [score for one in found for score in one.scores]
    assert sum(score.identified for score in scores) >= 4


def test_refusals(images):
    sigmoid = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Sigmoid(), nn.Linear(64, 10))
    steps = Procedure(algorithm="fedavg", batch_size=1)
    cases = {
        "a ReLU right behind '1'": seen_of(images, sigmoid, batch_size=2)[0],
        "expected one step": seen_of(images, perceptron(), batch_size=2, local=steps)[0],
        "at most 24 images behind an update, got 25": seen_of(images, perceptron(), batch_size=25)[0],
    }
    for message, observation in cases.items():
        with pytest.raises(AttackError, match=message):
            reconstructed(observation)
    with pytest.raises(ConfigError, match="draws ≥ 1, got 0"):
        Disaggregation(draws=0)
