"""Histology: a network with GroupNorm that finds stained tissue, and a client that trains two epochs.

It needs the package ``scikit-image``, which has the picture inside.
"""

from __future__ import annotations

from pathlib import Path

import skimage.color
import skimage.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fedkl

SIDE = 24  # pixels of a tile: 21 x 21 tiles in a picture of 512 x 512
TRAINED = 7  # columns of tiles, from the left, that the weights were trained on
STAINED = 0.04  # mean of the brown stain: few tiles lie between those with glands and those without


def network() -> nn.Module:
    """Three 3x3 convolutions, each with GroupNorm, and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 3 * 3, 2)),
    )


def tiles(*, trained: bool) -> tuple[Tensor, Tensor]:
    """Tiles of one side of the picture, and whether each is stained, which a rule says and no pathologist.

    Args:
        trained: Whether those of the left third, which the weights were trained on, or the others.
    """
    picture = skimage.data.immunohistochemistry()
    brown = skimage.color.rgb2hed(picture)[..., 2:]
    pixels = torch.cat([torch.from_numpy(picture / 255), torch.from_numpy(brown)], dim=2).float()
    columns = pixels.unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE).transpose(0, 1)
    chosen = (columns[:TRAINED] if trained else columns[TRAINED:]).flatten(0, 1)
    return chosen[:, :3].contiguous(), (chosen[:, 3].mean((1, 2)) > STAINED).long()


def train(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """What a client does in a round: tiles have no upper side, so half of each batch is turned around."""
    network.train()
    loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        for batch, targets in loader:
            turned = torch.rand(len(batch), 1, 1, 1) < 0.5
            optimizer.zero_grad()
            F.cross_entropy(network(torch.where(turned, batch.rot90(2, (2, 3)), batch)), targets).backward()
            optimizer.step()


def subject() -> fedkl.Subject:
    """What is audited, with images that the weights were never trained on."""
    images, labels = tiles(trained=False)
    return fedkl.Subject(
        name="tiles",
        model=network,
        weights=Path(__file__).with_name("weights") / "tiles.safetensors",
        images=images,
        labels=labels,
        normalization=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        procedure=train,
        images_per_client=16,
    )
