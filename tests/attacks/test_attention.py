"""Transformers with PyTorch's fused attention: attacks differentiate it twice, and forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkl import data
from fedkl.attacking.observing import observe, trials_of
from fedkl.attacks import InvertingGradients
from fedkl.defenses import NoDefense, own_arms


class Attending(nn.Module):
    """Four patches that attend to each other, by the fused kernel."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3 * 8 * 8, 32)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        patches = x.reshape(len(x), 3, 2, 8, 2, 8).permute(0, 2, 4, 1, 3, 5).reshape(len(x), 4, 192)
        tokens = self.embed(patches)
        query, key, value = (
            layer(tokens).unflatten(2, (2, 16)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(query, key, value)
        return self.head(seen.transpose(1, 2).flatten(1))


def seen():
    torch.manual_seed(0)
    model, arm = Attending(), own_arms(NoDefense())["no-norm"]
    (trial,) = trials_of(data.load("mnist-sample", size=16), trials=1)
    return observe(NoDefense().prepare(model), arm=arm, model=model, trial=trial, classes=10)


def test_the_fused_kernel_cannot_be_differentiated_twice():
    """Else this file would test nothing."""
    query = torch.rand(1, 2, 4, 16, requires_grad=True)
    with torch.enable_grad():
        (first,) = torch.autograd.grad(
            F.scaled_dot_product_attention(query, query, query).sum(), query, create_graph=True
        )
        with pytest.raises(RuntimeError, match="not implemented"):
            torch.autograd.grad(first.sum(), query)


def test_matching_comes_nearer():
    observation = seen()
    attack = InvertingGradients(iterations=60)
    assert attack.refusal(observation) is None
    found = attack.reconstruct(observation, generator=torch.Generator().manual_seed(0))
    begin = InvertingGradients(iterations=1).reconstruct(
        observation, generator=torch.Generator().manual_seed(0)
    )
    assert found.loss < 0.5 * begin.loss
    assert found.images.isfinite().all()
