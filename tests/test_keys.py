"""Keys: their distribution, and that nothing prints, pickles or copies their values."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import traceback

import pytest
import torch
from torch import nn

import fedkl
from fedkl import Key
from fedkl.errors import LockError, SecretError
from fedkl.keys import secure_normal, secure_uniform
from fedkl.locking import withhold, withhold_statistics

LENGTH = 64


@pytest.fixture
def key():
    return Key.generate(length=LENGTH)


@pytest.fixture
def lock(key):
    return fedkl.lock(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), key=key)


def digits_of(*tensors):
    """Every value's first digits, as a print would show them: fixed, or scientific where sizes differ."""
    values = [abs(value) for t in tensors for value in t.flatten().tolist() if abs(value) > 1e-3]
    return {f"{value:.4f}"[1:] for value in values} | {f"{value:.4e}" for value in values}


def assert_silent(text, *tensors):
    assert [d for d in digits_of(*tensors) if d in text] == []


@pytest.mark.parametrize("smallest", [0.1, 1e-7], ids=["fixed", "scientific"])
def test_the_digit_search_finds_a_printed_tensor(smallest):
    values = torch.tensor([smallest, 0.31415, -0.27182])
    with pytest.raises(AssertionError):
        assert_silent(str(values), values)


def test_nothing_prints_the_values(key, lock):
    private = [key.reveal(), *lock.private_state().values()]
    for thing in (key, lock, lock.model, *lock.model.modules(), [key], {"key": key}):
        for text in (repr(thing), str(thing), f"{thing}", f"{thing!r:>5}"):
            assert_silent(text, *private)


def test_exceptions_do_not_carry_the_values(key, lock):
    failures = (
        lambda: lock.use_key(Key.generate(length=3)),
        lambda: lock.load_public_state(lock.private_state()),
        lambda: lock.load_private_state(lock.public_state()),
        lambda: lock.public_update(lock.private_state(), kind="weights", num_samples=1, round=0),
        lambda: setattr(lock.model[1], "weight", torch.ones(8)),
        lambda: lock.model(torch.rand(3, 5)),
        lambda: pickle.dumps(lock),
        lambda: fedkl.lock(lock.model, key=key),
    )
    for fail in failures:
        with pytest.raises((fedkl.FedKLError, RuntimeError)) as caught:
            fail()
        text = "".join(traceback.format_exception(caught.value))
        assert_silent(text, key.reveal(), *lock.private_state().values())


def test_a_key_is_not_pickled(key):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(SecretError, match=r"cannot be pickled. Save it with"):
            pickle.dumps({"key": key}, protocol)


def test_a_lock_and_its_model_are_not_pickled(key, lock):
    secrets = [key.reveal().float(), *lock.private_state().values()]
    parts = (lock, lock.model, lock.model[1], lock.model[1].parametrizations.weight[0])
    for thing in (*parts, {"model": lock.model}):
        for save in (pickle.dump, torch.save):
            buffer = io.BytesIO()
            with pytest.raises((SecretError, RuntimeError)):
                save(thing, buffer)
            assert not any(t.numpy().tobytes() in buffer.getvalue() for t in secrets)


def test_a_model_with_private_statistics_only_is_not_pickled():

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    withhold_statistics(model)
    with pytest.raises(SecretError, match=r"Save model.state_dict\(\), which omits them"):
        torch.save(model, io.BytesIO())
    assert set(copy.deepcopy(model).state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_each_part_refuses_by_itself(key, lock):
    """What holds a secret does not rely on what it is part of, or what is part of it."""
    layer = lock.model[1].parametrizations.weight[0]
    for part, says in ((layer, "A lock layer"), (layer.chain, "A chain of lock layers"), (key, "A Key")):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(SecretError, match=f"^{says} cannot be pickled"):
                part.__reduce_ex__(protocol)
        with pytest.raises(SecretError, match=f"^{says} cannot be pickled"):
            part.__getstate__()


def test_a_model_with_private_layers_is_not_pickled():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    withhold(model[1], ("weight", "bias"))
    for thing in (model, model[1]):
        with pytest.raises(SecretError, match="A model with private tensors cannot be pickled"):
            pickle.dumps(thing)
    pickle.dumps(model[0])


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_a_key_of_any_precision(kind):
    values = torch.tensor([0.5, -1.0, 2.0]).to(kind)
    assert Key(values).reveal().tolist() == [0.5, -1.0, 2.0]
    with pytest.raises(LockError, match="not all zero"):
        Key(torch.zeros(3).to(kind))


def test_a_baked_model_can_be_saved_whole(lock):
    buffer = io.BytesIO()
    torch.save(lock.bake(), buffer)
    buffer.seek(0)
    x = torch.rand(3, 4)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), lock.model(x))


def test_the_key_is_in_no_parameter_buffer_or_state(lock):
    named = [*lock.model.named_parameters(), *lock.model.named_buffers(), *lock.model.state_dict().items()]
    values = lock.key.reveal().float()
    assert all(
        tensor.numel() != LENGTH or not torch.allclose(tensor.flatten(), values) for _, tensor in named
    )
    assert not any("key" in name.lower() for name, _ in named)


def test_copies_of_a_key_are_the_key(key):
    assert copy.copy(key) is key
    assert copy.deepcopy({"a": key})["a"] is key


def test_reveal_gives_a_copy(key):
    key.reveal().zero_()
    assert key.reveal().abs().sum() > 0
    given = torch.rand(4)
    made = Key(given)
    given.zero_()
    assert made.reveal().abs().sum() > 0


@pytest.mark.parametrize("length", [2, 3, 1024])
def test_a_normal_key_has_zero_mean_and_unit_norm(length):
    values = Key.generate(length=length).reveal()
    assert values.dtype == torch.float64
    assert values.shape == (length,)
    assert abs(values.mean().item()) < 1e-15
    assert values.norm().item() == pytest.approx(1, abs=1e-14)


def test_the_normal_source_has_the_moments_of_a_normal():
    values = secure_normal(400, 500)
    assert values.shape == (400, 500)
    assert values.mean().item() == pytest.approx(0, abs=5 / math.sqrt(2e5))
    assert values.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / 2e5))
    assert values.pow(4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / 2e5))
    assert torch.isfinite(values).all()


def test_the_uniform_source_has_the_moments_of_a_uniform():
    values = secure_uniform(200_000)
    assert 0 < values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    assert values.mean().item() == pytest.approx(1 / 2, abs=5 * math.sqrt(1 / 12 / 2e5))
    assert values.var().item() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / 2e5))


def test_the_source_is_the_operating_system(monkeypatch):
    monkeypatch.setattr("fedkl.keys.os", os)  # the tests' own source is a seeded one
    drawn = []
    source = os.urandom
    monkeypatch.setattr("os.urandom", lambda count: drawn.append(source(count)) or drawn[-1])
    Key.generate(length=5)
    assert [len(part) for part in drawn] == [40]


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_uniform_source_never_reaches_its_ends(monkeypatch, byte):
    monkeypatch.setattr("fedkl.keys.os.urandom", lambda count: byte * count)
    assert 0 < secure_uniform(1).item() < 1
    assert torch.isfinite(secure_normal(1)).all()


def test_a_uniform_key_is_as_published():
    key = Key.generate(length=4096, distribution="uniform")
    values = key.reveal()
    assert key.distribution == "uniform"
    assert 0 <= values.min() < 0.01 < 0.99 < values.max() < 1


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_two_keys_differ(distribution):
    torch.manual_seed(0)
    a = Key.generate(length=1024, distribution=distribution).reveal()
    torch.manual_seed(0)
    b = Key.generate(length=1024, distribution=distribution).reveal()
    assert (a == b).sum() == 0
    overlap = (a @ b / (a @ a)).item()
    assert overlap == pytest.approx(0.75 if distribution == "uniform" else 0, abs=0.2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.rand(2, 2), r"one vector of floating-point numbers, got shape \(2, 2\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
        (torch.rand(0), r"got shape \(0,\)"),
        (torch.arange(4), "torch.int64"),
        (torch.zeros(4), "not all zero"),
        (torch.tensor([1.0, math.nan]), "finite values"),
        (torch.tensor([1.0, math.inf]), "finite values"),
    ],
)
def test_unusable_values(values, message):
    with pytest.raises(LockError, match=message):
        Key(values)


def test_unusable_requests(unchecked):
    with pytest.raises(LockError, match="length must be at least 2, got 1"):
        Key.generate(length=1)
    with pytest.raises(LockError, match=r"unknown distribution 'cauchy'. Choose one of normal, uniform"):
        Key.generate(distribution="cauchy")
    with pytest.raises(LockError, match="unknown distribution 'cauchy'"):
        Key(torch.rand(4), distribution="cauchy")
