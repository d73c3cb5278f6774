"""Generated γ and β against act(W k + b) computed by hand, their order, gradients and initialization."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import fedkl
from fedkl import Key

ACTIVATIONS = {
    "softplus": lambda a: np.log1p(np.exp(a)),
    "relu": lambda a: np.maximum(a, 0),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "tanh": np.tanh,
    "identity": lambda a: a,
}
DERIVATIVES = {
    "softplus": lambda a: 1 / (1 + np.exp(-a)),
    "relu": lambda a: (a > 0).astype(float),
    "sigmoid": lambda a: np.exp(-a) / (1 + np.exp(-a)) ** 2,
    "tanh": lambda a: 1 - np.tanh(a) ** 2,
    "identity": lambda a: np.ones_like(a),
}
NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), (4, 6, 2, 2, 2)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(6).eval(), (4, 6, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, affine=True), (4, 6, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), (4, 6, 3, 3)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(6, affine=True), (4, 6, 2, 2, 2)),
    "GroupNorm": (lambda: nn.GroupNorm(3, 6), (4, 6, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (4, 6)),
    "LayerNorm-2d": (lambda: nn.LayerNorm((2, 3)), (4, 2, 3)),
    "LayerNorm-no-bias": (lambda: nn.LayerNorm(6, bias=False), (4, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (4, 6)),
    "RMSNorm-2d": (lambda: nn.RMSNorm((2, 3)), (4, 2, 3)),
}


def linear(norm, name):
    """W and b of the lock layer, as arrays."""
    parametrization = norm.parametrizations[name]
    return parametrization.original0.detach().numpy(), parametrization.original1.detach().numpy()


def array(tensor):
    return tensor.detach().numpy().ravel()


def norms_of(lock):
    return [lock.model.get_submodule(name) for name in lock.layers]


def three_norms(**options):
    sizes = (8, 4, 6)
    model = nn.Sequential(*(part for n in sizes for part in (nn.LazyLinear(n), nn.LayerNorm(n)))).double()
    model(torch.rand(2, 3, dtype=torch.float64))
    return fedkl.lock(model, **{"key": Key.generate(length=16), "layers": "all", **options})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("initialization", ["unit", "published"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_gets_generated_scale_and_shift(norm, activation, initialization):
    make, shape = NORMS[norm]
    lock = fedkl.lock(
        nn.Sequential(make()).double(),
        key=Key.generate(length=16),
        layers=["0"],
        activation=activation,
        initialization=initialization,
    )
    locked, k = lock.model[0], lock.key.reveal().numpy()
    plain = make().double()
    for name in ("weight", "bias"):
        if getattr(plain, name, None) is None:
            assert getattr(locked, name, None) is None
            continue
        W, b = linear(locked, name)
        expected = ACTIVATIONS[activation](W @ k + b)
        assert getattr(locked, name).shape == getattr(plain, name).shape
        np.testing.assert_allclose(array(getattr(locked, name)), expected, rtol=1e-12, atol=1e-15)
        with torch.no_grad():
            getattr(plain, name).copy_(torch.from_numpy(expected).view_as(getattr(plain, name)))
    x = torch.rand(shape, dtype=torch.float64)
    torch.testing.assert_close(locked(x), plain(x))


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_chain_feeds_each_output_into_the_next(chained, activation):
    lock = three_norms(chained=chained, activation=activation)
    for name in ("weight", "bias"):
        k = lock.key.reveal().numpy()
        for norm in norms_of(lock):
            W, b = linear(norm, name)
            assert W.shape == (norm.weight.numel(), k.size)
            generated = ACTIVATIONS[activation](W @ k + b)
            np.testing.assert_allclose(array(getattr(norm, name)), generated, rtol=1e-12, atol=1e-15)
            k = generated if chained else k


def test_a_norm_without_shift_is_passed_over_in_the_chain_of_shifts():
    model = nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(5), nn.LayerNorm(6)).double()
    lock = fedkl.lock(model, layers="all", key=Key.generate(length=16))
    first, second, third = norms_of(lock)
    W, b = linear(third, "bias")
    np.testing.assert_allclose(
        array(third.bias), ACTIVATIONS["softplus"](W @ array(first.bias) + b), rtol=1e-12
    )
    W, b = linear(third, "weight")
    np.testing.assert_allclose(
        array(third.weight), ACTIVATIONS["softplus"](W @ array(second.weight) + b), rtol=1e-12
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_of_w_is_the_outer_product_with_the_key(activation):
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)).double()
    lock = fedkl.lock(model, key=Key.generate(length=16), activation=activation)
    baked = lock.bake()
    x = torch.rand(4, 3, dtype=torch.float64)
    lock.model(x).pow(3).sum().backward()
    baked(x).pow(3).sum().backward()
    k = lock.key.reveal().numpy()
    for name in ("weight", "bias"):
        W, b = linear(lock.model[1], name)
        before_activation = array(getattr(baked[1], name).grad) * DERIVATIVES[activation](W @ k + b)
        parametrization = lock.model[1].parametrizations[name]
        np.testing.assert_allclose(
            parametrization.original0.grad, np.outer(before_activation, k), rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(parametrization.original1.grad, before_activation, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_chain_agrees_with_finite_differences():
    lock = three_norms()
    x = torch.rand(4, 3, dtype=torch.float64)

    def loss():
        return lock.model(x).pow(3).sum()

    loss().backward()
    for norm in norms_of(lock):
        for name in ("weight", "bias"):
            W = norm.parametrizations[name].original0
            with torch.no_grad():
                W[1, 2] += 1e-6
                above = loss().item()
                W[1, 2] -= 2e-6
                below = loss().item()
                W[1, 2] += 1e-6
            assert W.grad[1, 2].item() == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-6)


def test_the_published_initialization_is_the_default_of_a_linear_layer():
    lock = fedkl.lock(
        nn.Sequential(nn.LayerNorm(500)),
        key=Key.generate(length=64),
        layers=["0"],
        initialization="published",
    )
    bound = 1 / math.sqrt(64)
    for name in ("weight", "bias"):
        for values, spread in zip(linear(lock.model[0], name), (0.01, 0.05), strict=True):
            assert np.abs(values).max() <= bound
            assert values.max() == pytest.approx(bound, rel=spread)
            assert values.min() == pytest.approx(-bound, rel=spread)
            assert values.var() == pytest.approx(bound**2 / 3, rel=0.2)


@pytest.mark.parametrize(
    ("activation", "start"), [("softplus", 1), ("relu", 1), ("identity", 1), ("sigmoid", 0.5)]
)
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_the_unit_initialization(activation, start, distribution):
    key = Key.generate(length=64, distribution=distribution)
    model = nn.Sequential(nn.LayerNorm(2000), nn.LayerNorm(2000)).double()
    lock = fedkl.lock(model, key=key, layers="all", activation=activation)
    k = {"weight": key.reveal().numpy(), "bias": key.reveal().numpy()}
    for norm in norms_of(lock):
        for name, value in (("weight", start), ("bias", ACTIVATIONS[activation](0.0))):
            W, b = linear(norm, name)
            np.testing.assert_allclose(ACTIVATIONS[activation](b), value, rtol=1e-6)
            assert (W @ k[name]).var() == pytest.approx(1, rel=0.2)
            k[name] = array(getattr(norm, name))


def test_two_locks_of_one_key_differ():
    key = Key.generate(length=16)
    torch.manual_seed(0)
    a = three_norms(key=key)
    torch.manual_seed(0)
    b = three_norms(key=key)
    for name, tensor in a.private_parameters().items():
        if name.endswith("original0"):
            assert not bool((tensor == b.private_parameters()[name]).any())


@pytest.mark.parametrize("chained", [True, False])
def test_two_keys_give_different_scales_under_one_lock(chained):
    lock = three_norms(chained=chained)
    first_key = lock.key
    first = [array(norm.weight).copy() for norm in norms_of(lock)]
    lock.use_key(Key.generate(length=16))
    second = [array(norm.weight).copy() for norm in norms_of(lock)]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(first, second, strict=True))
    lock.use_key(first_key)
    assert all((a == array(norm.weight)).all() for a, norm in zip(first, norms_of(lock), strict=True))


def test_sgd_on_a_relu_lock_with_a_published_start_has_dead_scales_and_the_unit_start_fewer():
    dead = {}
    for initialization in ("published", "unit"):
        key = Key.generate(length=64)
        model = nn.Sequential(nn.LayerNorm(2000))
        lock = fedkl.lock(model, key=key, layers=["0"], activation="relu", initialization=initialization)
        dead[initialization] = (lock.model[0].weight == 0).float().mean().item()
    assert dead["published"] == pytest.approx(0.5, abs=0.1)
    assert dead["unit"] == pytest.approx(0.16, abs=0.05)


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_redrawn_secrets_are_those_of_another_client(chained, distribution):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    key = Key.generate(length=64, distribution=distribution)
    lock = fedkl.lock(model, key=key, layers="all", chained=chained)
    public, private = lock.public_state(), lock.private_state()
    lock.redraw()
    assert (lock.key.length, lock.key.distribution) == (64, distribution)
    assert not torch.equal(lock.key.reveal(), key.reveal())
    assert all(torch.equal(public[name], tensor) for name, tensor in lock.public_state().items())
    after = lock.private_state()
    for name, tensor in private.items():
        assert torch.equal(after[name], tensor) == (not name.endswith("original0")), name
    generated = lock.bake()[1].weight
    k, weight = lock.key.reveal().float(), after["1.parametrizations.weight.original0"]
    bias = after["1.parametrizations.weight.original1"]
    torch.testing.assert_close(generated, nn.functional.softplus(weight @ k + bias))
    spread = torch.cat([lock.bake()[3].weight for _ in range(40) if lock.redraw() is None]).std()
    assert 0.3 < spread < 1.2, "as wide as at the first drawing"
