"""A small vision transformer of Hugging Face's on MNIST, and a client that trains an epoch of AdamW.

It needs the package ``transformers``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

import fedkl
from fedkl.data import load

UNSEEN = 2000  # training images of MNIST that the weights were not trained on: those that fedkl brings along


def network() -> nn.Module:
    """49 patches of 4x4 pixels, learned position embeddings, three layers of width 64."""
    config = ViTConfig(
        image_size=28,
        num_channels=1,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def train(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """What a client does in a round."""
    network.train()
    loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    for batch, targets in loader:
        optimizer.zero_grad()
        network(pixel_values=batch, labels=targets).loss.backward()
        optimizer.step()


def subject() -> fedkl.Subject:
    """What is audited, with images that the weights were never trained on. They travel inside fedkl."""
    sample = load("mnist-sample", size=28, channels=1)
    return fedkl.Subject(
        name="vit",
        model=network,
        weights=Path(__file__).with_name("weights") / "vit.safetensors",
        images=torch.cat([sample.train_images[:UNSEEN], sample.test_images[:]]),
        labels=torch.cat([sample.train_labels[:UNSEEN], sample.test_labels]),
        normalization=((0.5,), (0.5,)),
        procedure=train,
        images_per_client=64,
    )
