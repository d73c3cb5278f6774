"""Standardization inside the model: right, invisible from outside, and carried along everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

import fedkl
from fedkl.errors import ConfigError, DataError
from fedkl.models import build_model
from fedkl.models.preprocessing import Standardize, standardize_input_

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def build(*, name="lenet", seed=0, **options):
    return build_model(name, channels=3, classes=10, seed=seed, **options).eval()


def by_hand(images):
    return torch.stack([(images[:, i] - MEAN[i]) / STD[i] for i in range(3)], 1)


@pytest.fixture
def pair():
    """The same weights with and without standardization."""
    return build(normalization=(MEAN, STD)), build()


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32)


def test_the_model_standardizes_images_by_itself(pair, images):
    model, plain = pair
    torch.testing.assert_close(model(images), plain(by_hand(images)))
    assert not torch.allclose(model(images), plain(images))
    torch.testing.assert_close(model(x=images), model(images))


def test_names_and_states_are_those_of_the_plain_model(pair):
    model, plain = pair
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(model) is type(plain)
    model.load_state_dict(plain.state_dict(), strict=True)


def test_a_deep_copy_has_its_own_standardization(pair, images):
    model, plain = pair
    replica = copy.deepcopy(model)
    with torch.no_grad():
        model.standardize.mean.zero_()
    torch.testing.assert_close(replica(images), plain(by_hand(images)))
    assert not torch.allclose(model(images), replica(images))


def test_mean_and_std_follow_dtype_and_device(pair, images):
    model, plain = pair
    model, plain = model.double(), plain.double()
    torch.testing.assert_close(model(images.double()), plain(by_hand(images.double())), rtol=1e-6, atol=0)
    assert {b.device.type for b in model.to("meta").buffers()} == {"meta"}


def test_vmap_over_models_with_their_own_standardization(images):
    models = [build(seed=0, normalization=(MEAN, STD)), build(seed=1, normalization=((0.0,) * 3, STD))]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def output(parameters, buffers):
        return functional_call(base, (parameters, buffers), (images,))

    expected = torch.stack([model(images) for model in models])
    torch.testing.assert_close(vmap(output)(parameters, buffers), expected)

    def loss(parameters, buffers):
        return F.cross_entropy(output(parameters, buffers), torch.tensor([1, 2]))

    gradients = vmap(grad(loss))(parameters, buffers)
    F.cross_entropy(models[1](images), torch.tensor([1, 2])).backward()
    torch.testing.assert_close(gradients["conv1.weight"][1], models[1].conv1.weight.grad)


@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_a_locked_model_standardizes_and_keeps_it_when_baked(name, images):
    lock = fedkl.lock(build(name=name, normalization=(MEAN, STD)), layers="all")
    twin = copy.deepcopy(lock.model)
    with torch.no_grad():
        twin.standardize.mean.zero_()
        twin.standardize.std.fill_(1)
        torch.testing.assert_close(lock.model(images), twin(by_hand(images)))
        torch.testing.assert_close(lock.bake()(images), lock.model(images))
    assert not [name for name in lock.public_state() if "standardize" in name]
    assert not [name for name in lock.private_state() if "standardize" in name]


@pytest.mark.parametrize(
    ("normalization", "message"),
    [
        (((0.5,), (0.5,)), "of 3 channels, got 1 and 1"),
        ((MEAN, (0.5,)), "of 3 channels, got 3 and 1"),
        ((MEAN, (0.2, 0.0, 0.2)), r"positive finite std .* got mean \(0.49"),
        ((MEAN, (0.2, -0.1, 0.2)), "positive finite std"),
        ((MEAN, (0.2, float("nan"), 0.2)), "positive finite std"),
        (((0.5, float("inf"), 0.5), STD), "finite mean"),
    ],
)
def test_unusable_normalizations_are_refused(normalization, message):
    with pytest.raises(ConfigError, match=message):
        build(normalization=normalization)


def test_images_of_another_number_of_channels_are_not_broadcast(pair):
    with pytest.raises(DataError, match=r"images of 3 channels.* got 1"):
        pair[0](torch.rand(2, 1, 32, 32))


def test_a_model_is_standardized_once(pair):
    with pytest.raises(ConfigError, match="LeNet has an attribute 'standardize' already"):
        standardize_input_(pair[0], Standardize(MEAN, STD))
