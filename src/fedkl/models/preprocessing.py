"""Standardization inside the model: images are in [0, 1] at every boundary of this package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkl.errors import ConfigError, DataError

_NAME = "standardize"


class Standardize(nn.Module):
    """(x − mean) / std per channel.

    Mean and std are buffers that no state contains: they follow the model's device and dtype, and are neither
    trained, sent nor loaded.

    Args:
        mean: One number per channel.
        std: One positive number per channel.

    Raises:
        ConfigError: The lengths differ, or a number is not finite, or an std not positive.

    >>> Standardize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(map(math.isfinite, [*mean, *std])) or not all(s > 0 for s in std):
            raise ConfigError(
                "normalization: expected a finite mean and a positive finite std for every channel, got "
                f"mean {tuple(mean)} and std {tuple(std)}."
            )
        for name, values in (("mean", mean), ("std", std)):
            value = torch.tensor(list(values), dtype=torch.get_default_dtype()).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Standardized images.

        Raises:
            DataError: The images have another number of channels, which broadcasting would hide.
        """
        if x.shape[1] != len(self.mean):
            raise DataError(
                f"Expected images of {len(self.mean)} channels, as the model's normalization has, "
                f"got {x.shape[1]}. Build the model with a mean and std for every channel of the images."
            )
        return (x - self.mean) / self.std


def standardize_input_(model: nn.Module, standardize: Standardize) -> None:
    """Makes a model standardize its images, its first argument ``x``, before its own forward pass.

    Names of parameters and the model's `state_dict()` stay as they are: the standardization is a child
    without state, called by a forward pre-hook.

    Args:
        model: The model, changed in place.
        standardize: How.

    Raises:
        ConfigError: The model standardizes already.
    """
    if hasattr(model, _NAME):
        raise ConfigError(f"{type(model).__name__} has an attribute '{_NAME}' already; standardize once.")
    model.add_module(_NAME, standardize)
    # A function, not a bound method: deep copies of the model then call their own child.
    model.register_forward_pre_hook(_standardize_first, with_kwargs=True)


def _standardize_first(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    standardize = model.get_submodule(_NAME)
    if args:
        return (standardize(args[0]), *args[1:]), kwargs
    return args, {name: standardize(value) if name == "x" else value for name, value in kwargs.items()}
