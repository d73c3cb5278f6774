"""A client's statistics are of the weights that it sent; counted anew they are of those that came back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fedkl
from fedkl.defenses import KeyLock
from fedkl.errors import DataError, TrainingError
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


class Shared(nn.Module):
    """Two places of the network share a norm, and bright images have another one than dark ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, 2)
        self.norm, self.bright, self.dark = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        z = torch.relu(self.norm(self.first(x)))
        z = torch.relu(self.norm(input=5 * self.second(z) + 3))
        return self.head((self.bright if x.mean() > 0.5 else self.dark)(z).mean((2, 3)))


@pytest.mark.parametrize("batch_size", [64, 16])
def test_a_shared_norm_has_the_statistics_of_all_its_calls(batch_size):
    """Oracle: what each call is given. One that is not called has what it had."""
    lock = fedkl.lock(Shared(), layers=["norm", "bright", "dark"])
    x = 0.4 * torch.rand(64, 1, 9, 9)
    with torch.no_grad():
        lock.model.train()(1 - x)
    before, given = lock.private_state(), []
    hooks = [len(module._forward_pre_hooks) for module in lock.model.modules()]
    norm = lock.model.norm
    hook = norm.register_forward_pre_hook(
        lambda _, args, named: given.extend([*args, *named.values()]), with_kwargs=True
    )
    recalibrate_norms_(lock, x, batch_size=batch_size)
    hook.remove()
    assert len(given) == 2 * 64 // batch_size
    means, variances = (torch.stack([f(z.transpose(0, 1).flatten(1)) for z in given]) for f in MOMENTS)
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    torch.testing.assert_close(norm.running_var, variances.mean(0))
    after = lock.private_state()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(after[f"bright.{name}"], before[f"bright.{name}"])
    assert not torch.equal(after["dark.running_mean"], before["dark.running_mean"])
    assert [len(module._forward_pre_hooks) for module in lock.model.modules()] == hooks
    assert norm.momentum == 0.1


MOMENTS = (lambda z: z.mean(1), lambda z: z.var(1))


def test_one_image_has_no_statistics():
    with pytest.raises(DataError, match="over at least 2 images, got 1"):
        recalibrate_norms_(member_lock(), images("own")[0][:1])


def test_at_most_so_many_and_not_the_first_ones():
    """Images sorted by brightness: the mean of the first ones would be far too low."""
    x, _ = images("own")
    x = x[x.mean((1, 2, 3)).argsort()]
    all_of_them, some, first = member_lock(), member_lock(), member_lock()
    recalibrate_norms_(all_of_them, x)
    recalibrate_norms_(some, x, most=120)
    recalibrate_norms_(first, x[:120])
    whole, drawn, dark = (lock.model[1].running_mean for lock in (all_of_them, some, first))
    assert not torch.equal(drawn, whole)
    assert float((drawn - whole).norm()) < 0.5 * float((dark - whole).norm())


def test_they_depend_on_weights_and_images_only():
    """Not on what they were before, nor on the generators."""
    x, _ = images("own")
    one, other = member_lock(), member_lock()
    recalibrate_norms_(one, x)
    for _ in range(2):
        torch.rand(3)
        recalibrate_norms_(other, x)
    for name, tensor in one.private_state().items():
        assert torch.equal(tensor, other.private_state()[name]), name


def test_public_statistics_stay():
    lock = member_lock(KeyLock(key_length=16, share_statistics=True))
    before = copy.deepcopy(lock.full_state())
    recalibrate_norms_(lock, images("own")[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in lock.full_state().items())


def test_what_is_not_finite_is_not_kept():
    lock = member_lock()
    with torch.no_grad():
        lock.model[0].weight.mul_(1e30)
    before = copy.deepcopy(lock.private_state())
    momenta = [m.momentum for m in lock.model.modules() if isinstance(m, nn.BatchNorm2d)]
    with pytest.raises(TrainingError, match=r"cannot be used[\s\S]*'1.running_var' has non-finite") as caught:
        recalibrate_norms_(lock, images("own")[0])
    assert "inf" not in str(caught.value).replace("finite", "")
    assert all(torch.equal(tensor, before[name]) for name, tensor in lock.private_state().items())
    assert [m.momentum for m in lock.model.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
