"""Gradients of many batches at once: as many as the memory suffices for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkl.attacking import gradients as module
from fedkl.attacking.gradients import gradients


def network():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        )


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 5, 1, 8, 8, generator=generator), torch.arange(count * 5).view(count, 5) % 3


def taken(count=7):
    model = network()
    return gradients(
        model, *batches(count), names=[name for name, _ in model.named_parameters()], train_mode=True
    )


@pytest.mark.parametrize(("fit", "chunk"), [(1, 1), (3, 3), (7, None), (100, None)])
def test_as_many_at_once_as_fit_and_the_same_gradients(monkeypatch, fit, chunk):
    expected, chunks, real = taken(), [], torch.vmap

    def noting(*args, chunk_size=None, **kwargs):
        chunks.append(chunk_size)
        return real(*args, chunk_size=chunk_size, **kwargs)

    monkeypatch.setattr(torch, "vmap", noting)
    monkeypatch.setattr(module, "at_once", lambda each, device: fit)
    found = taken()
    assert chunks == [chunk]
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_single_batch_is_not_asked_about(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "at_once", lambda each, device: asked.append(each))
    taken(1)
    assert asked == []


def test_what_a_network_keeps_is_asked_where_pixels_alone_would_not_fit(monkeypatch):
    """First what it may keep at most, then what it does."""
    asked, images = [], batches(7)[0]
    monkeypatch.setattr(module, "at_once", lambda each, device: (asked.append(each), 2)[1])
    taken()
    most, real = asked
    assert most > 10_000 * images[0].nbytes
    assert images[0].nbytes < real < most
