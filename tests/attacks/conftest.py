from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkl import data, models
from fedkl.attacking import full_gradient, observe, trials_of
from fedkl.attacks import Knowledge, Observation
from fedkl.defenses import Arm, NoDefense


@pytest.fixture(scope="session")
def dataset():
    return data.load("mnist-sample")


@pytest.fixture
def observe_plain(dataset):
    """An undefended observation of test images, with its truth."""

    def observe(first=0, *, batch_size=1, labels=True, model=None, of=dataset, **changes):
        images = of.test_images[first : first + batch_size].contiguous()
        truth = of.test_labels[first : first + batch_size]
        model = model or models.build_model(
            "lenet", channels=3, classes=10, seed=first, initialization="default"
        )
        fields = {
            "model": model,
            "gradient": full_gradient(model, images, truth),
            "image_shape": tuple(images.shape[1:]),
            "classes": 10,
            "batch_size": batch_size,
            "labels": truth if labels else None,
        }
        return Observation(**(fields | changes)), images, truth

    return observe


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


class Small(nn.Sequential):
    """A sigmoid LeNet for images of 16×16, small enough that every test takes a moment."""

    def __init__(self, *, width=8, act=nn.Sigmoid, between=nn.Identity):
        super().__init__(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            act(),
            nn.Conv2d(width, width, 5, stride=2, padding=2),
            between(),
            act(),
            nn.Flatten(),
            nn.Linear(width * 16, 10),
        )


@pytest.fixture(scope="session")
def images():
    return data.load("mnist-sample", size=16)


@pytest.fixture
def small():
    return Small


@pytest.fixture
def observed(images):
    """What the server sees of one small real image, with the victim and the truth."""

    def observation(
        defense=None, *, model=None, index=0, dataset=images, batch_size=1, local=None, **knowledge
    ):
        torch.manual_seed(index)
        model = model or Small()
        defense = defense or NoDefense()
        victim = defense.prepare(model)
        trial = trials_of(dataset, trials=index + 1, batch_size=batch_size)[index]
        arm = Arm(
            name="seen", description="", defense=defense, knowledge=Knowledge(labels=False, **knowledge)
        )
        seen = observe(victim, arm=arm, model=model, trial=trial, classes=10, local=local)
        return seen, victim, trial

    return observation
