"""Weights after one step of SGD are a gradient in other digits: attacks on gradients read them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedkl import data, models
from fedkl.attacking.observing import observe, trials_of
from fedkl.attacks import ATTACKS
from fedkl.attacks.algebraic.structure import read_structure
from fedkl.defenses import NoDefense, own_arms
from fedkl.protocol import Auxiliary, Procedure

ONE_STEP = Procedure(algorithm="fedavg", steps=1, lr=0.1, momentum=0.9, weight_decay=1e-3)


@pytest.fixture(scope="module")
def dataset():
    return data.load("mnist-sample")


def seen(dataset, local):
    model = models.build_model("lenet", channels=3, classes=10, seed=0, initialization="uniform")
    (trial,) = trials_of(dataset, trials=1)
    arm = own_arms(NoDefense())["no-norm"]
    return trial, observe(
        NoDefense().prepare(model), arm=arm, model=model, trial=trial, classes=10, local=local
    )


def test_the_gradient_is_in_the_weights(dataset):
    _, plain = seen(dataset, Procedure())
    _, sent = seen(dataset, ONE_STEP)
    read = sent.as_gradient()
    assert read.local.is_gradient
    for name, expected in plain.gradient.items():
        torch.testing.assert_close(read.gradient[name], expected, rtol=1e-3, atol=2e-6)
        assert not torch.allclose(sent.gradient[name], expected, rtol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [{"steps": 2}, {"optimizer": "adam", "momentum": 0.0, "weight_decay": 0.0}, {"augmentation": "flip"}],
    ids=["two steps", "adam", "augmented"],
)
def test_nothing_else_is_one(dataset, changes):
    _, sent = seen(dataset, ONE_STEP)
    other = replace(sent, local=replace(ONE_STEP, **changes))
    assert other.as_gradient() is other
    assert other.as_gradient().local == other.local


def test_a_step_of_some_images_is_no_gradient_of_all(dataset):
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    (trial,) = trials_of(dataset, trials=1, batch_size=4)
    arm, some = own_arms(NoDefense())["no-norm"], replace(ONE_STEP, batch_size=2)
    sent = observe(NoDefense().prepare(model), arm=arm, model=model, trial=trial, classes=10, local=some)
    assert sent.as_gradient() is sent
    assert replace(sent, local=replace(ONE_STEP, batch_size=4)).as_gradient().local.is_gradient


def test_a_changed_update_with_weight_decay_is_left_alone(dataset):
    _, sent = seen(dataset, ONE_STEP)
    changed = replace(sent, transform=lambda change, observed: change)
    assert changed.as_gradient() is changed


def test_the_closed_form_reads_weights_as_it_reads_a_gradient(dataset):
    attack = ATTACKS["closed-form"]()
    errors = []
    for local in (Procedure(), ONE_STEP):
        trial, sent = seen(dataset, local)
        assert attack.refusal(sent) is None
        found = attack.reconstruct(sent, generator=torch.Generator().manual_seed(0))
        errors.append(float((found.images - trial.images).square().mean()))
    assert errors[1] < 10 * errors[0] + 1e-3
    blurred = replace(ONE_STEP, steps=2)
    assert attack.refusal(seen(dataset, blurred)[1]) is not None


def test_what_is_read_off_a_gradient_is_read_off_weights(dataset):
    """The label, the head's input: also where an update was clipped."""
    trial, plain = seen(dataset, Procedure())
    expected = read_structure(plain)
    found = read_structure(seen(dataset, ONE_STEP)[1])
    assert torch.equal(found.label, trial.labels)
    torch.testing.assert_close(found.head_input, expected.head_input, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("attack", ["wiener", "mean-map", "closed-form", "feature-inversion"])
def test_attacks_on_gradients_read_weights_after_a_step(dataset, attack):
    """What they refuse, if anything, is the network."""
    own = Auxiliary(
        images=dataset.train_images[:100],
        labels=dataset.train_labels[:100],
        simulate=lambda images, labels: {},
        draw=dict,
    )
    refusals = [
        ATTACKS[attack]().refusal(replace(seen(dataset, local)[1], auxiliary=own))
        for local in (Procedure(), ONE_STEP)
    ]
    assert refusals[1] == refusals[0]
    assert (refusals[0] is None) == (attack == "closed-form")
