"""The zoo's models by the names that the command line and experiments know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from fedkl.errors import ConfigError
from fedkl.models.lenet import LeNet
from fedkl.models.preprocessing import Standardize, standardize_input_
from fedkl.models.resnet import ResNet
from fedkl.models.resnet_cifar import CifarResNet
from fedkl.models.vgg import VGG
from fedkl.models.vit import ViT

ModelInitialization = Literal["default", "uniform"]


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model of the zoo.

    Attributes:
        info: What it is, in one line.
        size: Height and width of the images it is used with, in pixels.
        build: Builds it from the images' channels and the number of classes.
    """

    info: str
    size: int
    build: Callable[[int, int], nn.Module]


_R32, _R34 = (5, 5, 5), (3, 4, 6, 3)

MODELS: dict[str, ModelEntry] = {
    "lenet": ModelEntry(
        info="three 5×5 convolutions, sigmoid, no norm (the DLG network)",
        size=32,
        build=lambda c, k: LeNet(channels=c, classes=k),
    ),
    "resnet20": ModelEntry(
        info="CIFAR ResNet, option-A shortcuts, Kaiming initialization",
        size=32,
        build=lambda c, k: CifarResNet(channels=c, classes=k),
    ),
    "resnet20-groupnorm": ModelEntry(
        info="resnet20 with GroupNorm, which DP-SGD trains",
        size=32,
        build=lambda c, k: CifarResNet(channels=c, classes=k, norm="group"),
    ),
    "resnet20-projection": ModelEntry(
        info="resnet20 with 1×1 projections and PyTorch's initialization (locked arm of Table 1)",
        size=32,
        build=lambda c, k: CifarResNet(channels=c, classes=k, shortcut="projection", kaiming=False),
    ),
    "resnet32": ModelEntry(
        info="CIFAR ResNet, option-A shortcuts, Kaiming initialization",
        size=32,
        build=lambda c, k: CifarResNet(channels=c, classes=k, blocks=_R32),
    ),
    "resnet32-projection": ModelEntry(
        info="resnet32 with 1×1 projections and PyTorch's initialization (locked arm of Table 1)",
        size=32,
        build=lambda c, k: CifarResNet(
            channels=c, classes=k, blocks=_R32, shortcut="projection", kaiming=False
        ),
    ),
    "resnet18": ModelEntry(
        info="torchvision's ResNet-18",
        size=224,
        build=lambda c, k: ResNet(channels=c, classes=k),
    ),
    "resnet18-nopool": ModelEntry(
        info="resnet18 without max-pooling, PyTorch's initialization (locked arm of Table 1)",
        size=224,
        build=lambda c, k: ResNet(channels=c, classes=k, max_pool=False, kaiming=False),
    ),
    "resnet34": ModelEntry(
        info="torchvision's ResNet-34",
        size=224,
        build=lambda c, k: ResNet(channels=c, classes=k, blocks=_R34),
    ),
    "resnet34-nopool": ModelEntry(
        info="resnet34 without max-pooling, PyTorch's initialization (locked arm of Table 1)",
        size=224,
        build=lambda c, k: ResNet(channels=c, classes=k, blocks=_R34, max_pool=False, kaiming=False),
    ),
    "vgg16": ModelEntry(
        info="torchvision's VGG-16, without BatchNorm",
        size=224,
        build=lambda c, k: VGG(channels=c, classes=k),
    ),
    "vgg16-bn": ModelEntry(
        info="torchvision's VGG-16 with BatchNorm (locked arm of Table 1)",
        size=224,
        build=lambda c, k: VGG(channels=c, classes=k, batch_norm=True),
    ),
    "vit-tiny": ModelEntry(
        info="vision transformer, 4×4 patches, 6 blocks of width 192, LayerNorm",
        size=32,
        build=lambda c, k: ViT(channels=c, classes=k),
    ),
}


def build_model(
    name: str,
    *,
    channels: int,
    classes: int,
    seed: int,
    initialization: ModelInitialization = "default",
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> nn.Module:
    """Builds a model of the zoo with seeded weights; the global generator is left as it was.

    Args:
        name: One of `MODELS`.
        channels: Channels of the images.
        classes: Number of classes.
        seed: Of the weights.
        initialization: ``"default"``: the architecture's own. ``"uniform"``: every weight and bias from
            U(−0.5, 0.5), as in the original DLG study (Zhu et al. 2019) and the leakage experiments of
            arXiv 2305.04095.
        normalization: Mean and std per channel. If given, the model standardizes its images, which are in
            [0, 1], itself; names of parameters and its state stay those of the plain architecture.

    Raises:
        ConfigError: The name or the initialization is unknown, or the normalization is not usable.

    >>> model = build_model("resnet20", channels=3, classes=10, seed=0, normalization=([0.5] * 3, [0.2] * 3))
    >>> model(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if name not in MODELS:
        raise ConfigError(
            f"Unknown model {name!r}. Choose one of {', '.join(sorted(MODELS))}. A network of your own "
            "trains in Python, with fedkl.federated.Federation(Net(), …): docs/masking.md has the lines."
        )
    if initialization not in get_args(ModelInitialization):
        known = ", ".join(get_args(ModelInitialization))
        raise ConfigError(f"Unknown initialization {initialization!r}. Choose one of {known}.")
    standardize = None if normalization is None else _standardize(normalization, channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name].build(channels, classes)
        if initialization == "uniform":
            for parameter in model.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
    if standardize is not None:
        standardize_input_(model, standardize)
    return model


def _standardize(normalization: tuple[Sequence[float], Sequence[float]], channels: int) -> Standardize:
    mean, std = normalization
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(
            f"normalization: expected mean and std of {channels} channels, got {len(mean)} and {len(std)}."
        )
    return Standardize(mean, std)
