"""What a client does: one epoch over its share of the images. Data and model are made once per process."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.data import Dataset, load
from fedkl.models import build_model

BATCH = 64


def new_model() -> nn.Module:
    """The initial model, the same in every process."""
    return build_model("lenet", channels=3, classes=10, seed=0, initialization="uniform")


@lru_cache(maxsize=1)
def process_model() -> nn.Module:
    """The process's one model; every message loads its weights into it."""
    return new_model()


@lru_cache(maxsize=1)
def dataset(name: str) -> Dataset:
    """The process's one copy of the data, as tensors in memory."""
    return load(name)


def train(model: nn.Module, images: Tensor, labels: Tensor, *, lr: float) -> float:
    """One epoch of SGD with Nesterov momentum over shuffled batches; the last batch's loss."""
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    loss = torch.zeros(())
    for batch in torch.randperm(len(images)).split(BATCH):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.inference_mode()
def count_correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Number of images whose largest logit is the label's."""
    model.eval()
    pairs = zip(images.split(512), labels.split(512), strict=True)
    return sum(int((model(batch).argmax(1) == wanted).sum()) for batch, wanted in pairs)
