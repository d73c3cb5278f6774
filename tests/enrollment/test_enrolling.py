"""A new client's lock: works, only what is private is fitted, and every wrong use is told."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import fedkl
from fedkl.defenses import KeyLock
from fedkl.defenses.pruning import Pruning
from fedkl.enrollment import Fitting, enroll
from fedkl.enrollment import fitting as fitting_module
from fedkl.enrollment.fitting import Measured, fitted, measured
from fedkl.errors import ConfigError, DataError, FedKLError, LockError, TrainingError, UpdateError
from fedkl.metrics import evaluate
from tests.enrollment.setting import DEFENSE, FITTING, OWN, images, member_lock, net, public
from tests.locking.leaks import leaks, secrets_of

KINDS = {
    "first": DEFENSE,
    "all": KeyLock(key_length=16, layers="all"),
    "shared statistics": KeyLock(key_length=16, share_statistics=True),
    "private head": KeyLock(key_length=16, private=("head",)),
}


def enrolled(defense=DEFENSE, *, model=None, fitting=FITTING, **changes):
    x, y = images("own")
    given = {"public": public(defense), "images": x, "labels": y, **changes}
    return enroll(model or net(), defense=defense, fitting=fitting, **given)


@pytest.fixture
def every_epoch_helps(monkeypatch):
    """The last epoch's state is kept, whatever the held-out images say: with some keys none helps them."""
    losses = itertools.count(0.0, -1.0)
    monkeypatch.setattr(fitting_module, "measured", lambda *_: Measured(loss=next(losses), accuracy=0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_client_is_about_as_good_as_one_that_took_part(kind):
    defense = KINDS[kind]
    fitting = Fitting(epochs=30, patience=5)
    done = enrolled(defense, fitting=fitting)
    member, new = (evaluate(lock.model, *images("test")) for lock in (member_lock(defense), done.lock))
    assert member > 0.6  # there is something to keep
    assert new > member - 0.15  # keys and lock layers are drawn by the operating system: accuracies vary
    assert done.after.loss < done.before.loss
    assert (done.images, done.held_out) == (round(0.8 * OWN), round(0.2 * OWN))


@pytest.mark.usefixtures("every_epoch_helps")
@pytest.mark.parametrize("kind", KINDS)
def test_public_tensors_stay_bit_for_bit_and_private_ones_do_not(kind):
    defense = KINDS[kind]
    done = enrolled(defense)
    given = public(defense)
    assert done.steps == 6 * 3  # 192 images in batches of 64
    assert done.lock.public_state().keys() == given.keys()
    assert all(torch.equal(tensor, given[name]) for name, tensor in done.lock.public_state().items())
    parameters = done.lock.public_parameters().values()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)
    assert all(parameter.grad is None for parameter in done.lock.private_parameters().values())


@pytest.mark.usefixtures("every_epoch_helps")
def test_every_private_parameter_is_trained_and_statistics_are_counted():
    x, y = images("own")
    lock = DEFENSE.prepare(net())
    lock.load_public_state(public())
    before = lock.private_state()
    fitted(lock, images=x, labels=y, fitting=FITTING)
    for name, tensor in lock.private_state().items():
        assert not torch.equal(tensor, before[name]), name
    train, _ = FITTING.parts(len(y))
    seen = torch.nn.functional.conv2d(x[train], lock.model[0].weight, lock.model[0].bias, stride=4)
    norm = lock.model[1]
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), rtol=0.05, atol=0)  # of batches
    assert norm.momentum == 0.1


@pytest.mark.usefixtures("every_epoch_helps")
def test_held_out_images_are_not_trained_on():
    """They decide when to stop, and nothing else."""
    x, y = images("own")
    _, held_out = FITTING.parts(len(y))
    other = x.clone()
    other[held_out] = 0.5
    fitting = Fitting(epochs=1)
    states = []
    start = DEFENSE.prepare(net())
    start.load_public_state(public())
    for given in (x, other):
        lock = copy.deepcopy(start)
        done = fitted(lock, images=given, labels=y, fitting=fitting)
        assert done.steps == 3  # 192 images in batches of 64
        states.append(lock.private_state())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    norm = lock.model[1]
    assert norm.num_batches_tracked == 3


def test_it_repeats_from_its_seed_but_for_the_secrets():
    x, y = images("own")
    start = DEFENSE.prepare(net())
    start.load_public_state(public())
    torch.manual_seed(1)
    one, other, third = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start)
    before = torch.get_rng_state()
    fitted(one, images=x, labels=y, fitting=FITTING)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    fitted(other, images=x, labels=y, fitting=FITTING)
    fitted(third, images=x, labels=y, fitting=Fitting(epochs=6, patience=3, seed=1))
    assert all(torch.equal(t, other.private_state()[name]) for name, t in one.private_state().items())
    assert any(not torch.equal(t, third.private_state()[name]) for name, t in one.private_state().items())


def test_two_enrollments_with_one_seed_have_keys_of_their_own():
    one, other = enrolled(), enrolled()
    assert not torch.equal(one.lock.key.reveal(), other.lock.key.reveal())
    weights = [e.lock.private_parameters()["1.parametrizations.weight.original0"] for e in (one, other)]
    assert not torch.equal(*weights)


def test_nothing_private_leaves_and_nothing_is_shown():
    done = enrolled()
    loss = nn.functional.cross_entropy(done.lock.model(images("own")[0][:8]), images("own")[1][:8])
    assert leaks(done.lock, loss) == []
    numbers = secrets_of(done.lock)["key"].tolist()
    assert not any(f"{number:.8f}"[:9] in repr(done) for number in numbers)


def test_the_model_is_not_changed_and_modes_stay():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = enrolled(model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert done.lock.model.training


def test_dropout_repeats_and_is_off_where_statistics_are_counted():
    model = nn.Sequential(
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
    )
    lock = DEFENSE.prepare(model)
    x, y = images("own")
    fitted(lock, images=x, labels=y, fitting=Fitting(epochs=1))
    train, _ = FITTING.parts(len(y))
    seen = nn.functional.linear(x[train].flatten(1), lock.model[2].weight, lock.model[2].bias)
    torch.testing.assert_close(lock.model[3].running_mean, seen.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"images": torch.rand(19, 3, 32, 32), "labels": torch.arange(19) % 10}, DataError, "20 images, got"),
        ({"labels": images("own")[1] + 5}, DataError, "expected 0 .. 9, as the model has 10 scores"),
        ({"labels": images("own")[1] - 1}, DataError, "expected 0 .. 9"),
        ({"labels": images("own")[1][:-1]}, DataError, r"int64 of shape \(240,\)"),
        ({"labels": images("own")[1].float()}, DataError, "int64"),
        ({"fitting": Fitting(lr=1e30, epochs=2)}, TrainingError, "diverged in epoch 1"),
        ({"public": public(KINDS["shared statistics"])}, UpdateError, "not the public tensors"),
        ({"public": {**public(), "0.weight": torch.zeros(8, 3, 3, 3)}}, UpdateError, "'0.weight'"),
        ({"public": {**public(), "0.bias": torch.full((8,), torch.nan)}}, UpdateError, "non-finite"),
        ({"defense": Pruning()}, LockError, "'pruning' have no locks"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(changes, error, match):
    with pytest.raises(error, match=match) as told:
        enrolled(changes.pop("defense", DEFENSE), **changes) if "public" not in changes else enrolled(
            **changes
        )
    assert isinstance(told.value, FedKLError)


@pytest.mark.parametrize(
    "field", [{"held_out": 0.0}, {"held_out": 1.0}, {"patience": 0}, {"epochs": 0}, {"lr": 0.0}]
)
def test_options_are_checked(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        Fitting(**field)


class Counts(nn.Module):
    """It writes a public buffer whatever mode it is in."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        return x


def test_a_module_that_writes_public_buffers_is_found():
    model = nn.Sequential(nn.Flatten(), Counts(), nn.Linear(3072, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    lock = DEFENSE.prepare(model)
    x, y = images("own")
    with pytest.raises(TrainingError, match=r"'1.calls' was changed"):
        fitted(lock, images=x, labels=y, fitting=Fitting(epochs=1))


@pytest.mark.usefixtures("every_epoch_helps")
def test_tokens_too():
    words = torch.randint(30, (100, 12), generator=torch.Generator().manual_seed(0))
    labels = (words[:, 0] < 15).long()
    body = nn.Sequential(nn.Embedding(30, 8), nn.LayerNorm(8))
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(96, 2))
    member = fedkl.lock(model)
    done = enroll(model, public=member.public_state(), images=words, labels=labels)
    part = done.lock.model, words, labels, torch.arange(100)
    assert measured(*part).accuracy > 0.5


def test_a_lock_that_nothing_trains_is_no_puzzle():
    lock = member_lock()
    for parameter in lock.private_parameters().values():
        parameter.requires_grad_(False)
    given, labels = images("own")
    with pytest.raises(TrainingError, match="Nothing can be fitted"):
        fitted(lock, images=given, labels=labels, fitting=FITTING)
