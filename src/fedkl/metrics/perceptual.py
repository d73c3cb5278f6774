"""LPIPS, the learned perceptual distance between images, without torchvision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from fedkl.errors import AttackError, DataError
from fedkl.metrics.image import PerImage, paired
from fedkl.types import ImageBatch, under

Backbone = Literal["vgg", "alex"]

WEIGHTS_VARIABLE = "FEDKL_LPIPS_WEIGHTS"
"""Environment variable: the folder of the backbones' weights."""

# torchvision's names of the ImageNet weights that LPIPS was trained on.
_FILES: dict[str, str] = {"vgg": "vgg16-397923af", "alex": "alexnet-owt-7be5be79"}
# torchvision's `features`: ("conv", outputs, kernel, stride, padding), a ReLU behind each, and "pool". A star
# marks the ReLUs that are compared. AlexNet pools 3×3, VGG 2×2, both with stride 2.
_VGG = tuple("64 64* p 128 128* p 256 256 256* p 512 512 512* p 512 512 512*".split())
_ALEX = tuple("64* p 192* p 384* 256* 256*".split())
_ALEX_KERNELS = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
_SMALLEST = {"vgg": 16, "alex": 31}  # pixels of a side: below, a pooling has nothing to pool
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the original's scaling layer
_TINY = 1e-10  # the original's ε of the unit norm


class LPIPS:
    """The distance of deep features: Σ over layers of the spatial mean of w · (f̂ − f̂′)².

    f̂ are a layer's features, divided by their norm over channels at each position; w are learned weights of
    the channels. Images are compared at their own size, as in the original: 32×32 ones are a single position
    in AlexNet's last layers.

    Unverified with the ImageNet weights, which were not at hand. With random ones and the linear heads, it
    equals the reference implementation (package lpips 0.1.4) to rounding.

    Args:
        backbone: ``"vgg"`` (VGG-16) or ``"alex"`` (AlexNet).
        features: State of torchvision's network; only ``features.*`` is used.
        heads: The channels' weights, as torchmetrics ships them: ``lin0.model.1.weight`` ….

    Raises:
        DataError: The tensors are not those of the backbone.

    Source:
        Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation
        1; version 0.1 of its linear weights.
    """

    def __init__(
        self, backbone: Backbone, *, features: Mapping[str, Tensor], heads: Mapping[str, Tensor]
    ) -> None:
        self.backbone = backbone
        self._layers, self._compared = _network(backbone)
        try:
            self._layers.load_state_dict(under(features, "features."))
            self._heads = [heads[f"lin{i}.model.1.weight"].reshape(1, -1, 1, 1) for i in range(5)]
        except (RuntimeError, KeyError) as error:
            raise DataError(
                f"LPIPS: these are not the weights of {_FILES[backbone]}, or of its linear heads. Expected "
                "torchvision's names, features.0.weight and so on."
            ) from error
        self._layers.eval().requires_grad_(requires_grad=False)

    @classmethod
    def load(cls, backbone: Backbone, *, folder: Path | None = None) -> LPIPS:
        """Reads the weights.

        Args:
            backbone: Which.
            folder: Where the backbone's file is, ``.safetensors`` or ``.pth``; None: the folder that the
                environment variable FEDKL_LPIPS_WEIGHTS names, or else torchvision's cache.

        Raises:
            DataError: A file is missing or damaged.
        """
        return cls(backbone, features=_backbone_state(backbone, folder), heads=_head_state(backbone))

    def __call__(self, reconstruction: ImageBatch, truth: ImageBatch) -> PerImage:
        """The distance of each pair; 0 where they are identical.

        Args:
            reconstruction: Images of shape (batch, channels, height, width) in [0, 1], 1 or 3 channels.
            truth: The same shape, in [0, 1].

        Raises:
            AttackError: Shapes differ, an image is not finite or too small, or the channels are not 1 or 3.
        """
        found, true = paired(reconstruction, truth)
        _, channels, height, width = found.shape
        smallest = _SMALLEST[self.backbone]
        if channels not in (1, 3) or min(height, width) < smallest:
            raise AttackError(
                f"LPIPS ({self.backbone}): expected images of 1 or 3 channels and at least {smallest} × "
                f"{smallest} pixels, got {channels} × {height} × {width}."
            )
        with torch.no_grad():
            pairs = zip(self._features(found), self._features(true), self._heads, strict=True)
            distances = [(head * (a - b).square()).sum(1).mean((1, 2)) for a, b, head in pairs]
        return torch.stack(distances).sum(0).double()

    def _features(self, images: ImageBatch) -> list[Float[Tensor, "batch c h w"]]:
        """Unit features of the compared layers."""
        x = 2 * images.float().expand(-1, 3, -1, -1) - 1
        x = (x - torch.tensor(_SHIFT).view(1, 3, 1, 1)) / torch.tensor(_SCALE).view(1, 3, 1, 1)
        found: list[Tensor] = []
        for index, layer in enumerate(self._layers):
            x = layer(x)
            if index in self._compared:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + _TINY))
        return found


def _network(backbone: Backbone) -> tuple[nn.Sequential, set[int]]:
    """The layers under torchvision's indexes, and which of them are compared."""
    alex = backbone == "alex"
    kernels = iter(_ALEX_KERNELS)
    layers: list[nn.Module] = []
    compared: set[int] = set()
    channels = 3
    for word in _ALEX if alex else _VGG:
        if word == "p":
            layers.append(nn.MaxPool2d(3 if alex else 2, 2))
            continue
        outputs = int(word.rstrip("*"))
        kernel, stride, padding = next(kernels) if alex else (3, 1, 1)
        layers += [nn.Conv2d(channels, outputs, kernel, stride, padding), nn.ReLU()]
        channels = outputs
        if word.endswith("*"):
            compared.add(len(layers) - 1)
    return nn.Sequential(*layers), compared


def _backbone_state(backbone: Backbone, folder: Path | None) -> dict[str, Tensor]:
    given = folder or os.environ.get(WEIGHTS_VARIABLE)
    where = Path(given) if given else Path(torch.hub.get_dir(), "checkpoints")
    for place in (where / f"{_FILES[backbone]}{end}" for end in (".safetensors", ".pth")):
        if place.is_file():
            return _read(place)
    network = "AlexNet" if backbone == "alex" else "VGG-16"
    raise DataError(
        f"LPIPS ({backbone}): {_FILES[backbone]}.pth is not in {where}. These are torchvision's ImageNet "
        f"weights of {network}: put that file (or the same tensors as .safetensors) there, or set "
        f"{WEIGHTS_VARIABLE} to the folder that has it, or leave LPIPS out."
    )


def _head_state(backbone: Backbone) -> dict[str, Tensor]:
    # Found without importing it: a broken torchvision breaks the import of torchmetrics.
    spec = find_spec("torchmetrics")
    root = Path(spec.origin).parent if spec and spec.origin else Path()
    place = root / "functional" / "image" / "lpips_models" / f"{backbone}.pth"
    if not place.is_file():
        raise DataError(f"LPIPS: {place} is missing, which torchmetrics ships. Install torchmetrics again.")
    return _read(place)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes())
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"{path}: damaged, or not a state of tensors. Fetch it again.") from error
    return state
