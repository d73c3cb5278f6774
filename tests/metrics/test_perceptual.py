"""LPIPS with random backbones, against the formula, torchmetrics and the original package."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torchmetrics.functional.image.lpips as torchmetrics_lpips
from torch import nn
from torch.nn import functional as F

from fedkl.errors import AttackError, DataError
from fedkl.metrics import perceptual
from fedkl.metrics.perceptual import LPIPS

# torchvision's indexes of the convolutions in `features`, their outputs, and whether a pooling comes before.
VGG = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512,
       28: 512}  # fmt: skip
ALEX = {0: (64, 11), 3: (192, 5), 6: (384, 3), 8: (256, 3), 10: (256, 3)}


def weights(backbone):
    shapes = {i: (o, 3) for i, o in VGG.items()} if backbone == "vgg" else ALEX
    state, inputs = {}, 3
    for index, (outputs, kernel) in shapes.items():
        state[f"features.{index}.weight"] = torch.randn(outputs, inputs, kernel, kernel) / inputs**0.5
        state[f"features.{index}.bias"] = torch.randn(outputs) / 10
        inputs = outputs
    return state | {"classifier.0.weight": torch.zeros(1)}


def features(x, backbone, state):
    found = []

    def conv(x, index, **options):
        return F.conv2d(
            x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], **options
        ).relu()

    if backbone == "vgg":
        for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            x = F.max_pool2d(x, 2) if found else x
            for index in block:
                x = conv(x, index, padding=1)
            found.append(x)
        return found
    found.append(conv(x, 0, stride=4, padding=2))
    found.append(conv(F.max_pool2d(found[-1], 3, 2), 3, padding=2))
    found.append(conv(F.max_pool2d(found[-1], 3, 2), 6, padding=1))
    found.append(conv(found[-1], 8, padding=1))
    return [*found, conv(found[-1], 10, padding=1)]


def oracle(a, b, backbone, state, heads):
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total = torch.zeros(len(a))
    pairs = [features(((2 * x - 1).movedim(1, -1) - shift).div(scale).movedim(-1, 1), backbone, state)
             for x in (a, b)]  # fmt: skip
    for layer, (x, y) in enumerate(zip(*pairs, strict=True)):
        difference = (F.normalize(x, dim=1) - F.normalize(y, dim=1)) ** 2
        w = heads[f"lin{layer}.model.1.weight"][0, :, 0, 0]
        total += torch.einsum("nchw,c->n", difference, w) / (x.shape[2] * x.shape[3])
    return total.double()


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_lpips_is_the_formula(backbone):
    state = weights(backbone)
    heads = perceptual._head_state(backbone)
    measure = LPIPS(backbone, features=state, heads=heads)
    a, b = torch.rand(2, 2, 3, 32, 32)
    expected = oracle(a, b, backbone, state, heads)
    assert (expected > 0.01).all()
    torch.testing.assert_close(measure(a, b), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measure(b, a), measure(a, b))
    assert measure(a, a).tolist() == [0.0, 0.0]
    gray = a[:, :1]
    torch.testing.assert_close(
        measure(gray, b[:, :1]), measure(gray.repeat(1, 3, 1, 1), b[:, :1].repeat(1, 3, 1, 1))
    )
    smallest = {"vgg": 16, "alex": 31}[backbone]
    measure(a[..., :smallest, :smallest], b[..., :smallest, :smallest])
    with pytest.raises(AttackError, match=f"at least {smallest} × {smallest}"):
        measure(a[..., : smallest - 1], b[..., : smallest - 1])


def torchvision_features(backbone, state):
    """What torchvision's network has as `features`, with these weights."""
    layers = []
    for index in VGG if backbone == "vgg" else ALEX:
        weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
        stride, padding = (4, 2) if weight.shape[-1] == 11 else (1, weight.shape[-1] // 2)
        while len(layers) < index:
            layers.append(nn.MaxPool2d(2 if backbone == "vgg" else 3, 2))
        conv = nn.Conv2d(*weight.shape[1::-1], weight.shape[-1], stride, padding)
        conv.load_state_dict({"weight": weight, "bias": bias})
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_lpips_is_that_of_torchmetrics(backbone, monkeypatch):
    state = weights(backbone)
    features = torchvision_features(backbone, state)
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: features)
    reference = torchmetrics_lpips._LPIPS(net=backbone)
    own = LPIPS(backbone, features=state, heads=perceptual._head_state(backbone))
    a, b = torch.rand(2, 3, 3, 48, 32)
    expected = reference(a, b, normalize=True).flatten().double()
    torch.testing.assert_close(own(a, b), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_lpips_is_that_of_the_original_package(backbone, monkeypatch):
    """Runs after `pip install --no-deps lpips`; CI does without, since torchvision does not import there."""
    state = weights(backbone)
    stub = ModuleType("torchvision")
    stub.models = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torchvision", stub)
    original = pytest.importorskip("lpips")
    features = SimpleNamespace(features=torchvision_features(backbone, state))
    network = SimpleNamespace(vgg16=lambda **_: features, alexnet=lambda **_: features)
    monkeypatch.setattr(original.pretrained_networks, "tv", network)
    reference = original.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    heads = perceptual._read(Path(original.__file__).parent / "weights" / "v0.1" / f"{backbone}.pth")
    own = LPIPS(backbone, features=state, heads=heads)
    a, b = torch.rand(2, 3, 3, 48, 32)
    expected = reference(a, b, normalize=True).flatten().double()
    torch.testing.assert_close(own(a, b), expected, rtol=1e-5, atol=0)


def test_weights_are_read_from_the_named_folder(tmp_path, monkeypatch):
    state = weights("alex")
    torch.save(state, tmp_path / "alexnet-owt-7be5be79.pth")
    monkeypatch.setenv("FEDKL_LPIPS_WEIGHTS", str(tmp_path))
    a, b = torch.rand(2, 1, 3, 32, 32)
    own = LPIPS("alex", features=state, heads=perceptual._head_state("alex"))
    torch.testing.assert_close(LPIPS.load("alex")(a, b), own(a, b))


def test_missing_damaged_and_foreign_weights(tmp_path):
    with pytest.raises(DataError, match=r"vgg16-397923af\.pth is not in .*FEDKL_LPIPS_WEIGHTS"):
        LPIPS.load("vgg", folder=tmp_path)
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="damaged"):
        LPIPS.load("vgg", folder=tmp_path)
    with pytest.raises(DataError, match="not the weights of alexnet"):
        LPIPS("alex", features={"features.0.weight": torch.zeros(1)}, heads={})
