"""A client's statistics are of the weights that it sent; counted anew they are of those that came back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedkl.errors import DataError
from fedkl.locking import recalibrate_norms_
from tests.enrollment.setting import images, member_lock


def test_they_are_those_of_the_images_and_nothing_else_changes():
    lock = member_lock()
    before = copy.deepcopy(lock.full_state())
    inputs, modes = {}, [module.training for module in lock.model.modules()]
    x, _ = images("own")
    recalibrate_norms_(lock, x, batch_size=len(x))
    norms = {name: each for name, each in lock.model.named_modules() if isinstance(each, nn.BatchNorm2d)}
    hooks = [
        norm.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
        for name, norm in norms.items()
    ]
    batch = copy.deepcopy(lock.model).train()  # each norm sees what it normalizes by the batch
    with torch.no_grad():
        batch(x)
    for hook in hooks:
        hook.remove()
    for name, norm in norms.items():
        values = inputs[name].transpose(0, 1).flatten(1)
        torch.testing.assert_close(norm.running_mean, values.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, values.var(1), rtol=1e-3, atol=1e-5)
    changed = {name for name, tensor in lock.full_state().items() if not torch.equal(tensor, before[name])}
    assert changed <= {
        f"{name}.{each}" for name in norms for each in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert {f"{name}.running_mean" for name in norms} <= changed
    assert [module.training for module in lock.model.modules()] == modes


def test_batches_weigh_by_their_images():
    first, second = member_lock(), member_lock()
    x, _ = images("own")
    recalibrate_norms_(first, x, batch_size=len(x))
    recalibrate_norms_(second, x, batch_size=50)
    norm, other = (
        next(m for m in lock.model.modules() if isinstance(m, nn.BatchNorm2d)) for lock in (first, second)
    )
    torch.testing.assert_close(
        norm.running_mean, other.running_mean, rtol=1e-4, atol=1e-5
    )  # of the first norm


def test_one_image_has_no_statistics():
    with pytest.raises(DataError, match="over at least 2 images, got 1"):
        recalibrate_norms_(member_lock(), images("own")[0][:1])
