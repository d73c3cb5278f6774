"""Every model of the zoo: its size, its shapes, its seeds, and that it locks like anyone's model."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedkl
from fedkl.errors import ConfigError, DataError
from fedkl.models import MODELS, VGG, build_model

# A new model is one row here: classes, and the parameters for 3 channels as published. The ImageNet figures
# are torchvision's documentation; those of the CIFAR networks Idelbayev's (0.27 M and 0.46 M in He et al.).
PARAMETERS = {
    "lenet": (10, 15_826),
    "resnet20": (10, 269_722),
    "resnet20-groupnorm": (10, 269_722),
    "resnet20-projection": (10, 272_474),
    "resnet32": (10, 464_154),
    "resnet32-projection": (10, 466_906),
    "resnet18": (1000, 11_689_512),
    "resnet18-nopool": (1000, 11_689_512),
    "resnet34": (1000, 21_797_672),
    "resnet34-nopool": (1000, 21_797_672),
    "vgg16": (1000, 138_357_544),
    "vgg16-bn": (1000, 138_365_992),
    "vit-tiny": (10, 2_693_578),
}
SMALL = ("lenet", "resnet20", "resnet20-projection", "vit-tiny")


def on_meta(name, *, channels=3, classes=10):
    with torch.device("meta"):
        return MODELS[name].build(channels, classes)


def build(name, **options):
    return build_model(name, **{"channels": 3, "classes": 10, "seed": 0, **options})


def test_every_model_has_a_row():
    assert set(MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    classes, count = PARAMETERS[name]
    assert sum(p.numel() for p in on_meta(name, classes=classes).parameters()) == count


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_at_the_papers_image_size(name):
    size = MODELS[name].size
    images = torch.empty(2, 1, size, size, device="meta")
    assert size in (32, 224)
    assert on_meta(name, channels=1, classes=7)(images).shape == (2, 7)


@pytest.mark.parametrize("name", ["lenet", "vit-tiny"])
def test_images_of_another_size_are_refused(name, unchecked):
    with pytest.raises(DataError, match=r"expected images of 32×32, got 28×32"):
        on_meta(name)(torch.empty(2, 3, 28, 32, device="meta"))


@pytest.mark.parametrize("name", SMALL)
def test_weights_depend_on_the_seed_only(name):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build(name, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"
    torch.manual_seed(2)
    again, other = build(name, seed=5), build(name, seed=6)
    for (weight, p), q, r in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q), weight
        assert (p == p.flatten()[0]).all() or not torch.equal(p, r), weight


@pytest.mark.parametrize("name", SMALL)
def test_uniform_initialization_fills_its_range(name):
    model = build(name, initialization="uniform")
    for parameter in model.parameters():
        assert parameter.abs().max() <= 0.5
    values = torch.cat([p.flatten() for p in model.parameters()])
    assert values.abs().max() > 0.49
    assert values.var().item() == pytest.approx(1 / 12, rel=0.05)


def test_unknown_names(unchecked):
    with pytest.raises(ConfigError, match=r"lenet, .*A network of your own trains in Python"):
        build_model("lenett", channels=3, classes=10, seed=0)
    with pytest.raises(ConfigError, match="default, uniform"):
        build_model("lenet", channels=3, classes=10, seed=0, initialization="zeros")


# --- locking ---


@lru_cache(maxsize=1)
def for_locking(name):
    """The zoo's model, in eval mode; not to be changed.

    VGG's first linear layers are narrower here: copies of 134 M weights take seconds each and show nothing
    else.
    """
    if name.startswith("vgg16"):
        model: nn.Module = VGG(channels=3, classes=10, batch_norm=name == "vgg16-bn", hidden=32)
    else:
        model = build(name)
    return model.eval()


def expected_widths(model, layers):
    """Channels of the norms that a lock generates, written down without asking the lock."""
    modules = list(model.modules())
    norms = [m.weight.numel() for m in modules if isinstance(m, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm)]
    plain = [m.weight.shape[0] for m in modules if isinstance(m, nn.Conv2d | nn.Linear)]
    widths = norms or plain[:-1]
    return widths[:1] if layers == "first" else widths


def lock_parameters(widths, *, key_length, chained=True):
    """2 c (k + 1) for each lock: k is the key's length or, in a chain, the channels of the norm before."""
    lengths = [key_length, *widths] if chained else [key_length] * len(widths)
    return sum(2 * c * (k + 1) for k, c in zip(lengths, widths, strict=False))


# The class token, the positions and the patches come before the first LayerNorm of a transformer.
@pytest.mark.filterwarnings("ignore:2 parametric layers run before the first lock .'blocks.0.norm1'")
@pytest.mark.parametrize("layers", ["first", "all"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_every_model_locks_and_bakes(name, layers):
    plain = for_locking(name)
    widths = expected_widths(plain, layers)
    images = torch.rand(2, 3, 32, 32)
    chained = MODELS[name].size == 32  # the wide ones would wait for millions of numbers from the CSPRNG
    lock = fedkl.lock(plain, key=fedkl.Key.generate(length=16), layers=layers, chained=chained)
    count = sum(p.numel() for p in lock.private_parameters().values())
    assert count == lock_parameters(widths, key_length=16, chained=chained)
    names = {name for name, _ in plain.named_parameters()}
    generated = {f"{norm}.{tensor}" for norm in lock.layers for tensor in ("weight", "bias")}
    assert set(lock.public_parameters()) == names - generated
    assert lock.private_names.isdisjoint(lock.model.state_dict())
    with torch.no_grad():
        locked = lock.model(images)
        assert not torch.allclose(locked, plain(images), rtol=1e-3), "γ and β come from the key"
        torch.testing.assert_close(lock.bake()(images), locked)


def test_the_table_of_the_documentation_is_right():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = {}
    for name in MODELS:
        model = on_meta(name)
        count = sum(p.numel() for p in model.parameters())
        every = expected_widths(model, "all")
        first, all_ = (lock_parameters(widths, key_length=1024) for widths in (every[:1], every))
        rows[name] = f"| {MODELS[name].size}² | {count:,} | {first:,} | {all_:,} | {len(every)} |"
    documented = dict(re.findall(r"^\| `([\w-]+)` (\| \d+² .*)$", page, re.MULTILINE))
    assert documented == rows


def test_only_the_transformer_warns_of_layers_before_the_first_lock():
    with pytest.warns(UserWarning, match=r"is not locked: embedding, embedding\.patches"):
        fedkl.lock(build("vit-tiny"), key=fedkl.Key.generate(length=16))
    lock = fedkl.lock(
        build("vit-tiny"), key=fedkl.Key.generate(length=16), layers=["embedding.patches", "blocks.0.norm1"]
    )
    assert lock.layers == ("embedding.patches.norm", "blocks.0.norm1")


# --- what the attacks need ---


@pytest.mark.parametrize("name", SMALL)
def test_the_gradient_of_every_model_is_differentiable_in_the_image(name):
    model = build(name)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    loss = F.cross_entropy(model(images), torch.tensor([1, 2]))
    gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (direction,) = torch.autograd.grad(sum(g.square().sum() for g in gradient), images)
    assert direction.isfinite().all()
    assert direction.abs().max() > 0
