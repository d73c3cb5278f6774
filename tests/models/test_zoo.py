from __future__ import annotations

import pytest
import torch

from fedkl.errors import ConfigError
from fedkl.models import MODELS, build_model

# A new model is one row here: parameters for 3 channels and 10 classes, as published.
PARAMETERS = {"lenet": 15_826}


def test_every_model_has_a_row():
    assert set(MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_and_shapes(name):
    model = build_model(name, channels=3, classes=10, seed=0)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_weights_depend_on_the_seed_only():
    torch.manual_seed(1)
    first, state = build_model("lenet", channels=1, classes=10, seed=5), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"
    torch.manual_seed(2)
    again, other = (build_model("lenet", channels=1, classes=10, seed=s) for s in (5, 6))
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_uniform_initialization_fills_its_range():
    model = build_model("lenet", channels=3, classes=10, seed=0, initialization="uniform")
    for parameter in model.parameters():
        assert parameter.abs().max() <= 0.5
    assert model.fc.weight.abs().max() > 0.49
    assert model.fc.weight.var().item() == pytest.approx(1 / 12, rel=0.05)


def test_unknown_names(unchecked):
    with pytest.raises(ConfigError, match="lenet"):
        build_model("lenett", channels=3, classes=10, seed=0)
    with pytest.raises(ConfigError, match="default, uniform"):
        build_model("lenet", channels=3, classes=10, seed=0, initialization="zeros")
