from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from fedkl import metrics
from fedkl.errors import DataError

WRONG_SHAPE = (DataError, TypeCheckError)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)
        )


@pytest.fixture
def samples(generator):
    images = torch.rand(23, 1, 8, 8, generator=generator)
    return images, torch.randint(5, (23,), generator=generator)


def test_accuracy_agrees_with_numpy(generator):
    logits = torch.randn(200, 7, generator=generator)
    labels = torch.randint(7, (200,), generator=generator)
    labels[:90] = logits[:90].argmax(1)
    oracle = float(np.mean(np.argmax(logits.numpy(), axis=1) == labels.numpy()))
    assert metrics.accuracy(logits, labels) == oracle
    assert 0.4 < oracle < 0.7


def test_a_network_of_nan_is_right_about_nothing():
    logits = torch.full((4, 3), math.nan)
    assert metrics.accuracy(logits, torch.zeros(4, dtype=torch.int64)) == 0
    logits[:2] = torch.tensor([1.0, 0.0, -math.inf])
    assert metrics.accuracy(logits, torch.zeros(4, dtype=torch.int64)) == 0.5


@pytest.mark.parametrize("batch_size", [1, 2, 5, 22, 23, 24, 512])
def test_every_sample_weighs_the_same(batch_size, model, samples):
    images, labels = samples
    with torch.no_grad():
        logits = model.eval()(images)
    labels = torch.where(torch.arange(23) < 20, labels, logits.argmax(1))
    expected = metrics.accuracy(logits, labels)
    assert metrics.evaluate(model, images, labels, batch_size=batch_size) == expected


def test_the_last_batch_is_divided_by_its_own_size():
    images = torch.eye(2)[torch.tensor([0, 0, 1])].view(3, 2, 1, 1)
    labels = torch.tensor([1, 1, 1])  # only the last one, alone in its batch, is right
    assert metrics.evaluate(nn.Flatten(), images, labels, batch_size=2) == pytest.approx(1 / 3)


def test_flags_and_statistics_are_left_as_they_were(model, samples):
    model.train()
    model[1].eval()  # a frozen norm
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics.evaluate(model, *samples)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_evaluation_uses_evaluation_mode_without_gradients(samples):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled(), len(x)))
            return x.flatten(1)

    spy = Spy()
    metrics.evaluate(spy, *samples, batch_size=10)
    assert seen == [(False, False, 10), (False, False, 10), (False, False, 3)]
    assert spy.training
    assert torch.is_grad_enabled()


def test_flags_come_back_when_the_model_raises(model, samples):
    images, labels = samples
    model.train()
    with pytest.raises(RuntimeError):
        metrics.evaluate(model, images.repeat(1, 2, 1, 1), labels)
    assert all(module.training for module in model.modules())


def test_arguments_that_do_not_fit_are_refused(model, samples):
    images, labels = samples
    with pytest.raises(WRONG_SHAPE):
        metrics.evaluate(model, images, labels[:-1])
    with pytest.raises(DataError, match="at least one"):
        metrics.evaluate(model, images[:0], labels[:0])
    with pytest.raises(DataError, match="batch_size"):
        metrics.evaluate(model, images, labels, batch_size=0)
    with pytest.raises(DataError, match="model: expected logits"):
        metrics.evaluate(nn.Identity(), images, labels)
    with pytest.raises(WRONG_SHAPE):
        metrics.accuracy(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="at least one"):
        metrics.accuracy(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
