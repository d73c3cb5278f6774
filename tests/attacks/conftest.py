from __future__ import annotations

import pytest
import torch

from fedkl import data, models
from fedkl.attacks import Observation
from fedkl.auditing import full_gradient


@pytest.fixture(scope="session")
def dataset():
    return data.load("mnist-sample")


@pytest.fixture
def observe_plain(dataset):
    """An undefended observation of test images, with its truth."""

    def observe(first=0, *, batch_size=1, labels=True, model=None, **changes):
        images = dataset.test_images[first : first + batch_size].contiguous()
        truth = dataset.test_labels[first : first + batch_size]
        model = model or models.build_model(
            "lenet", channels=3, classes=10, seed=first, initialization="default"
        )
        fields = {
            "model": model,
            "gradient": full_gradient(model, images, truth),
            "image_shape": (3, 32, 32),
            "classes": 10,
            "batch_size": batch_size,
            "labels": truth if labels else None,
        }
        return Observation(**(fields | changes)), images, truth

    return observe


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
