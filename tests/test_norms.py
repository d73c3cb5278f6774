"""A norm that users register is a norm to the lock, to attacks and to scores."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedkl
from fedkl import norms
from fedkl.errors import LockError
from fedkl.protocol import Observation


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(norms, "_NORMS", dict(norms._NORMS))


class PerImage(nn.Module):
    """InstanceNorm's mathematics, in a class of the user's own."""

    def __init__(self, channels):
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        return x * self.gain[:, None, None] + self.offset[:, None, None]


def scaling(norm, *, train_mode=True):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(144, 10))
    return Observation(
        model=model,
        gradient={"3.weight": torch.rand(10, 144)},
        image_shape=(3, 8, 8),
        classes=10,
        batch_size=1,
        train_mode=train_mode,
        labels=torch.tensor([1]),
    ).scaling


def test_a_registered_norm_is_scored_as_what_it_is():
    assert scaling(PerImage(4)) == "clip"  # nobody knows that it is a norm
    fedkl.register_norm(PerImage, scale="gain", shift="offset")
    assert scaling(PerImage(4)) == scaling(nn.InstanceNorm2d(4)) == "prior"
    assert scaling(PerImage(4), train_mode=False) == "prior"
    fedkl.register_norm(PerImage, scale="gain", shift="offset", normalizes="batch")
    assert [scaling(PerImage(4), train_mode=mode) for mode in (True, False)] == ["prior", "clip"]
    fedkl.register_norm(PerImage, scale="gain", shift="offset", normalizes="nothing")
    assert scaling(PerImage(4)) == "clip"


def test_a_subclass_is_what_its_base_is():
    class Sub(nn.BatchNorm2d):
        pass

    assert [scaling(Sub(4), train_mode=mode) for mode in (True, False)] == ["prior", "clip"]
    fedkl.register_norm(Sub)
    assert norms.norm_tensors(Sub(4)).normalizes == "batch"
    assert [scaling(Sub(4), train_mode=mode) for mode in (True, False)] == ["prior", "clip"]


@pytest.mark.parametrize(
    ("norm", "evaluated"),
    [
        (lambda: nn.BatchNorm2d(4), "clip"),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), "prior"),  # it uses the batch in both modes
        (lambda: nn.InstanceNorm2d(4), "prior"),
        (lambda: nn.InstanceNorm2d(4, track_running_stats=True), "clip"),
        (lambda: nn.GroupNorm(2, 4), "prior"),
        (lambda: nn.LayerNorm((4, 6, 6)), "prior"),
        (lambda: nn.RMSNorm((4, 6, 6)), "prior"),
    ],
)
def test_whether_the_output_tells_the_inputs_scale(norm, evaluated):
    x = torch.rand(4, 4, 6, 6, dtype=torch.float64) * 100
    assert scaling(norm(), train_mode=False) == evaluated
    assert scaling(norm()) == "prior"
    module = norm().double().eval()
    assert torch.allclose(module(x), module(3 * x), atol=1e-3) == (evaluated == "prior")


def test_a_scale_and_shift_alone_lose_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    lock = fedkl.lock(model, granularity="element", example_inputs=torch.zeros(1, 3, 8, 8))
    affine = lock.bake()[0].norm.elementwise
    assert not norms.loses_scale(affine, train_mode=True)
    assert not norms.loses_scale(nn.Conv2d(3, 4, 3), train_mode=True)
    assert norms.loses_scale(
        fedkl.lock(nn.Sequential(nn.LayerNorm(4)), layers=["0"]).model[0], train_mode=False
    )


def test_unknown_words_are_refused(unchecked):
    with pytest.raises(
        LockError, match=r"normalizes='rows' is unknown. Choose one of batch, sample, nothing"
    ):
        fedkl.register_norm(PerImage, normalizes="rows")
