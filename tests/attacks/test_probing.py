"""Copies of networks that attacks look at, and images as these take them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkl.attacks.probing import as_taken, probe_of
from tests.auditing.subjects import Silent


@pytest.mark.parametrize("train_mode", [True, False])
def test_a_probe_is_a_copy_in_the_mode(train_mode):
    """Of a network whose `train` returns nothing, and keeps its norms in eval mode."""
    model = Silent()
    probe = probe_of(model, train_mode=train_mode)
    assert isinstance(probe, Silent)
    assert (probe[0].training, probe[1].training) == (train_mode, False)
    assert model[0].training
    assert not {id(tensor) for tensor in probe.parameters()} & {id(tensor) for tensor in model.parameters()}


def test_images_are_in_the_precision_of_real_parameters():
    images = torch.rand(2, 1, 8, 8)
    filters = nn.ParameterList([torch.ones(2, dtype=torch.cfloat)])
    assert as_taken(nn.Linear(3, 3).double(), images).dtype == torch.float64
    assert as_taken(nn.ModuleList([filters, nn.Linear(3, 3).half()]), images).dtype == torch.float16
    assert as_taken(filters, images) is images
    assert as_taken(nn.ReLU(), images) is images
