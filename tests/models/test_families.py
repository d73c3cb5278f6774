"""Each family against another implementation of the same network, and its initial weights."""

from __future__ import annotations

import math
import re

import pytest
import torch
import transformers
from torch import nn

from fedkl.errors import ConfigError
from fedkl.models import VGG, ResNet, ViT, build_model
from fedkl.models.resnet_cifar import CifarResNet, Subsample
from fedkl.models.vit import Block


def build(name):
    return build_model(name, channels=3, classes=10, seed=0)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


# --- ResNet ---


def torchvision_name(name):
    """The name that torchvision gives to what transformers calls so."""
    name = re.sub(r"^resnet\.embedder\.embedder\.convolution", "conv1", name)
    name = re.sub(r"^resnet\.embedder\.embedder\.normalization", "bn1", name)
    name = re.sub(r"^classifier\.1", "fc", name)
    place = re.match(r"^resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.(.*)$", name)
    if place is None:
        return name
    stage, block, rest = place.groups()
    rest = rest.replace("shortcut.convolution", "downsample.0").replace(
        "shortcut.normalization", "downsample.1"
    )
    rest = re.sub(r"^layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", rest)
    rest = re.sub(r"^layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", rest)
    return f"layer{int(stage) + 1}.{block}.{rest}"


def test_resnet18_agrees_with_transformers():
    config = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=5,
    )
    other = transformers.ResNetForImageClassification(config)
    own = ResNet(channels=3, classes=5)
    own.load_state_dict({torchvision_name(name): value for name, value in other.state_dict().items()})
    images = torch.rand(2, 3, 64, 64)
    for training in (True, False):
        own.train(training), other.train(training)
        with torch.no_grad():
            torch.testing.assert_close(own(images), other(images).logits, rtol=1e-4, atol=1e-5)


def test_the_first_activation_of_the_networks_without_pooling_is_four_times_as_large():
    for max_pool, size in ((True, 56), (False, 112)):
        with torch.device("meta"):
            model = ResNet(channels=3, classes=10, max_pool=max_pool)
        shapes = []
        model.layer1.register_forward_hook(lambda module, args, out, shapes=shapes: shapes.append(out.shape))
        model(torch.empty(1, 3, 224, 224, device="meta"))
        assert shapes == [(1, 64, size, size)]


# --- CIFAR ResNet ---


@pytest.mark.parametrize("size", [8, 7])
def test_option_a_takes_every_second_position_and_adds_channels_of_zeros(size):
    x = torch.rand(2, 4, size, size)
    expected = torch.zeros(2, 8, math.ceil(size / 2), math.ceil(size / 2))
    for channel in range(4):
        for row in range(0, size, 2):
            for column in range(0, size, 2):
                expected[:, 2 + channel, row // 2, column // 2] = x[:, channel, row, column]
    assert torch.equal(Subsample(4, 8, 2)(x), expected)


def test_the_stages_of_a_cifar_resnet_have_the_sources_sizes():
    model, shapes = build("resnet32"), []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
        assert len(stage) == 5
    model(torch.rand(2, 3, 32, 32))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 32


def test_only_blocks_that_change_their_shape_have_a_shortcut():
    for name, kind in (("resnet20", Subsample), ("resnet20-projection", nn.Sequential)):
        shortcuts = {n: m for n, m in build(name).named_modules() if n.endswith("downsample")}
        changing = {n for n, m in shortcuts.items() if not isinstance(m, nn.Identity)}
        assert len(shortcuts) == 9
        assert changing == {"layer2.0.downsample", "layer3.0.downsample"}
        assert all(type(shortcuts[n]) is kind for n in changing)


def test_group_norms_give_an_image_the_same_whatever_the_others_are():
    model = build("resnet20-groupnorm").train()
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert [norm.num_channels // norm.num_groups for norm in norms] == [16] * 19
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_a_norm_of_groups_starts_from_the_weights_of_a_batchs():
    grouped, batched = build("resnet20-groupnorm").state_dict(), build("resnet20").state_dict()
    assert set(grouped) == {name for name in batched if not re.search(r"running|tracked", name)}
    assert all(torch.equal(grouped[name], batched[name]) for name in grouped)


def test_projections_have_the_networks_norm():
    model = CifarResNet(channels=3, classes=10, shortcut="projection", norm="group")
    kinds = {type(module) for module in model.modules() if module.__class__.__name__.endswith("Norm2d")}
    assert kinds == set()
    assert isinstance(model.layer2[0].downsample[1], nn.GroupNorm)


# --- initial weights ---


def assert_normal(weight, std):
    """Moments of a normal distribution; a uniform one of the same variance has a kurtosis of 1.8."""
    samples = weight.detach().flatten() / std
    tolerance = 6 / math.sqrt(samples.numel())
    assert abs(samples.mean().item()) < tolerance
    assert abs(samples.std().item() - 1) < tolerance
    assert samples.pow(4).mean().item() > 2.4


def test_resnet20_starts_with_kaimings_normal_weights():
    model = build("resnet20")
    for module in [*convolutions(model), model.fc]:
        assert_normal(module.weight, math.sqrt(2 / module.weight[0].numel()))


@pytest.mark.parametrize("name", ["resnet18", "vgg16-bn"])
def test_torchvisions_networks_start_with_its_weights(name):
    model = build(name) if name == "resnet18" else VGG(channels=3, classes=10, batch_norm=True, hidden=64)
    for module in convolutions(model):
        assert_normal(module.weight, math.sqrt(2 / module.weight[:, 0].numel()))
        assert module.bias is None or not module.bias.any()
    if name == "vgg16-bn":
        for linear in (model.classifier[0], model.classifier[3]):
            assert_normal(linear.weight, 0.01)
            assert not linear.bias.any()


@pytest.mark.parametrize("name", ["resnet20-projection", "resnet32-projection", "resnet18-nopool"])
def test_the_locked_arms_start_with_pytorchs_weights(name):
    for module in convolutions(build(name)):
        bound = 1 / math.sqrt(module.weight[0].numel())
        assert 0.98 * bound < module.weight.abs().max() <= bound
        assert module.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.15)


# --- VGG ---


def test_vgg16_has_torchvisions_names():
    convolutional = {False: [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]}
    convolutional[True] = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    for batch_norm, places in convolutional.items():
        with torch.device("meta"):
            model = VGG(channels=3, classes=10, batch_norm=batch_norm)
        weights = [n for n, p in model.named_parameters() if p.dim() > 1]
        linear = [f"classifier.{place}.weight" for place in (0, 3, 6)]
        assert weights == [f"features.{place}.weight" for place in places] + linear
        pools = [place for place, m in enumerate(model.features) if isinstance(m, nn.MaxPool2d)]
        assert pools == ([6, 13, 23, 33, 43] if batch_norm else [4, 9, 16, 23, 30])


# --- ViT ---


def test_a_block_agrees_with_pytorchs_own():
    own = Block(12, heads=3)
    other = nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attention.qkv.": "self_attn.in_proj_",
        "attention.projection": "self_attn.out_proj",
        "mlp.0": "linear1",
        "mlp.2": "linear2",
    }
    state = {}
    for name, value in own.state_dict().items():
        prefix = next(p for p in names if name.startswith(p))
        state[name.replace(prefix, names[prefix])] = value
    other.load_state_dict(state)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(own(x), other(x))


def test_deit_tiny_has_its_published_number_of_parameters():
    with torch.device("meta"):
        model = ViT(channels=3, classes=1000, image_size=224, patch=16, depth=12)
    assert sum(p.numel() for p in model.parameters()) == 5_717_416


def test_the_transformer_sees_where_a_patch_is_and_reads_the_class_token():
    model = build("vit-tiny").eval()
    images = torch.rand(1, 3, 32, 32)
    swapped = images.roll(4, dims=3)  # the same patches at other places
    tokens, moved = model.embedding(images), model.embedding(swapped)
    assert tokens.shape == (1, 65, 192)
    # The second patch of the rolled image is the first one of the image, at another position.
    patch = tokens[:, 1] - model.embedding.positions[:, 1]
    torch.testing.assert_close(moved[:, 2] - model.embedding.positions[:, 2], patch)
    assert (model(images) - model(swapped)).abs().max() > 1e-5
    with torch.no_grad():
        model.embedding.positions.zero_()
        torch.testing.assert_close(model(images), model(swapped), rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="30 and 4, 192 and 3"):
        ViT(channels=3, classes=10, image_size=30)
    with pytest.raises(ConfigError, match="32 and 4, 192 and 5"):
        ViT(channels=3, classes=10, heads=5)
