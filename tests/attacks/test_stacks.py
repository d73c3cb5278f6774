"""What many problems have in common is held once, and nothing depends on that."""

from __future__ import annotations

import copy

import pytest
import torch

from fedkl.attacks import ATTACKS
from fedkl.attacks.matching import objectives
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.attacks.matching.stacks import Stacks


def held(matching):
    """Numbers of the network's parameters and of gradients that are held."""
    return matching._known.bytes, matching._observed.bytes


def test_equal_places_are_held_once():
    a, b = torch.rand(3), torch.arange(3)
    stacks = Stacks({"x": [a, torch.ones(3), a], "n": [b, b, b]}, dtype=torch.float64)
    assert stacks["x"].dtype == torch.float64
    assert stacks["n"].dtype == b.dtype
    assert torch.equal(stacks["x"], torch.stack([a, torch.ones(3), a]).double())
    assert torch.equal(stacks.at(torch.tensor([2, 1]))["x"], torch.stack([a, torch.ones(3)]).double())
    assert stacks.bytes == (2 + 1) * 3 * 8
    assert list(stacks) == ["x", "n"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restarts_hold_one_copy_and_change_no_figure(observe_plain, dtype):
    observation, _, labels = observe_plain()
    one = GradientMatching([observation], labels=[labels], dtype=dtype)
    three = GradientMatching(3 * [observation], labels=3 * [labels], dtype=dtype)
    assert held(three) == held(one)
    apart = [observe_plain()[0] for _ in range(3)]
    own = GradientMatching(apart, labels=3 * [labels], dtype=dtype)
    assert held(own) == tuple(3 * size for size in held(one))
    points, index = torch.rand(3, three.dimension, dtype=dtype), torch.tensor([0, 1, 2])
    for mine, other in zip(three(points, index), own(points, index), strict=True):
        assert torch.equal(mine, other)


def test_observations_of_one_network_hold_one_copy(observe_plain):
    first, _, labels = observe_plain()
    second, _, others = observe_plain(1, model=first.model)
    one = GradientMatching([first], labels=[labels])
    both = GradientMatching([first, second], labels=[labels, others])
    assert both._known.bytes == one._known.bytes
    assert both._observed.bytes == 2 * one._observed.bytes


def test_the_model_of_an_objective_takes_no_memory_of_its_own(observe_plain):
    observation, _, labels = observe_plain()
    matching = GradientMatching([observation], labels=[labels])
    places = {matching._known.first(name).data_ptr() for name in matching._known}
    assert {p.data_ptr() for p in matching._model.parameters()} == places


def test_restarts_that_know_the_lock_copy_what_is_free_only(observe_plain, monkeypatch):
    made = []
    init = objectives.GradientMatching.__init__
    monkeypatch.setattr(
        objectives.GradientMatching,
        "__init__",
        lambda self, *given, **options: init(self, *given, **options) or made.append(self),
    )
    observation, _, _ = observe_plain(free=("conv1.bias",))
    before = copy.deepcopy(observation.model.state_dict())
    attack = ATTACKS["adaptive-matching"](iterations=1, restarts=3)
    attack.reconstruct(observation, generator=torch.Generator().manual_seed(0))
    (matching,) = made
    whole = sum(4 * p.numel() for p in observation.model.parameters())
    assert matching._known.bytes <= whole + 2 * 4 * observation.model.conv1.bias.numel()
    for name, tensor in observation.model.state_dict().items():
        assert torch.equal(tensor, before[name])
