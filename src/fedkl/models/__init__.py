"""The model zoo: plain architectures, locked by `fedkl.lock` like anyone's model.

A new model is any `nn.Module` in a new file; a line in `MODELS` makes it known to the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn

from fedkl.errors import ConfigError
from fedkl.models.lenet import LeNet

__all__ = ["MODELS", "LeNet", "ModelInitialization", "build_model"]

ModelInitialization = Literal["default", "uniform"]

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "lenet": lambda channels, classes: LeNet(channels=channels, classes=classes),
}


def build_model(
    name: str, *, channels: int, classes: int, seed: int, initialization: ModelInitialization = "default"
) -> nn.Module:
    """Builds a model of the zoo with seeded weights; the global generator is left as it was.

    Args:
        name: One of `MODELS`.
        channels: Channels of the images.
        classes: Number of classes.
        seed: Of the weights.
        initialization: ``"default"``: PyTorch's own. ``"uniform"``: every weight and bias from U(−0.5, 0.5),
            as in the original DLG study (Zhu et al. 2019) and the leakage experiments of arXiv 2305.04095.

    Raises:
        ConfigError: The name or the initialization is unknown.
    """
    if name not in MODELS:
        raise ConfigError(f"Unknown model {name!r}. Choose one of {', '.join(sorted(MODELS))}.")
    if initialization not in get_args(ModelInitialization):
        known = ", ".join(get_args(ModelInitialization))
        raise ConfigError(f"Unknown initialization {initialization!r}. Choose one of {known}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](channels, classes)
        if initialization == "uniform":
            for parameter in model.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
    return model
