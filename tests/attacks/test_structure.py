"""What a gradient gives away without optimization: label, the head's input, and where γ is zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl import models
from fedkl.attacks import Procedure
from fedkl.attacks.algebraic.structure import read_structure
from fedkl.defenses import PUBLISHED_LOCK, PrivateLayers
from tests.attacks.conftest import Small

ALL = replace(PUBLISHED_LOCK, layers="all")


def network(name):
    if name == "lenet":
        torch.manual_seed(0)
        return Small()
    return models.build_model(name, channels=3, classes=10, seed=0, initialization="default")


def true_head_input(victim, images):
    baked, seen = victim.bake().train(), []
    head = [module for module in baked.modules() if isinstance(module, nn.Linear)][-1]
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    baked(images)
    return seen[0]


@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_the_support_of_a_relu_keys_gammas_is_public(observed, name):
    seen, victim, trial = observed(ALL, model=network(name))
    structure = read_structure(seen)
    true = dict(victim.bake().named_parameters())
    scales = [scale for scale in true if scale.endswith("weight") and ("norm" in scale or "bn" in scale)]
    assert set(structure.support) == set(scales)
    # The last channels of a ResNet may be cut off above, by the ReLU behind a shortcut.
    for scale in scales if name == "lenet" else scales[:-1]:
        assert torch.equal(structure.support[scale], true[scale] > 0)
        assert 0 < int(structure.support[scale].sum()) < len(true[scale])
    assert torch.equal(structure.label, trial.labels)


@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_the_heads_input_is_read_exactly(observed, name):
    seen, victim, trial = observed(ALL, model=network(name))
    h, true = read_structure(seen).head_input, true_head_input(victim, trial.images)
    assert h.shape == true.shape
    assert float((h - true).norm() / true.norm()) < 1e-4


def test_values_that_the_server_fills_in_play_no_part(observed):
    seen, _, _ = observed(ALL)
    before = read_structure(seen)
    with torch.no_grad():
        for parameter in seen.model.parameters():
            parameter.fill_(0.3)
    after = read_structure(seen)
    assert torch.equal(before.head_input, after.head_input)
    assert all(torch.equal(before.support[name], after.support[name]) for name in before.support)


def test_a_batch_hides_the_heads_input_not_the_support(observed):
    seen, victim, _ = observed(ALL, batch_size=3)
    structure = read_structure(seen)
    assert structure.label is None
    assert structure.head_input is None
    true = dict(victim.bake().named_parameters())
    assert structure.support
    assert all(torch.equal(each, true[name] > 0) for name, each in structure.support.items())


def test_a_private_head_or_several_steps_hide_the_head(observed):
    seen, _, _ = observed(PrivateLayers(layers="head"))
    assert read_structure(seen).head_input is None
    assert read_structure(seen).label is None
    seen, _, _ = observed()
    assert read_structure(replace(seen, local=Procedure(steps=2))).head_input is None


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 8), lambda: nn.LayerNorm((8, 4, 4))])
def test_norms_that_mix_channels_have_no_support_to_read(observed, small, norm):
    seen, _, _ = observed(model=small(between=norm))
    assert read_structure(seen).support == {}


def test_a_transform_may_make_zero_rows_of_its_own(observed):
    seen, _, _ = observed(ALL)
    assert read_structure(replace(seen, transform=lambda update, seen: update)).support == {}


def test_its_text_holds_no_tensor_of_the_client(observed):
    seen, _, _ = observed(ALL)
    structure = read_structure(seen)
    assert "head_input" not in repr(structure)
    assert "dead" not in repr(structure)
