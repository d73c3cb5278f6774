"""A small trained federation whose new client is enrolled, on digits."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from fedkl import data
from fedkl.defenses import KeyLock
from fedkl.enrollment import Fitting
from tests.federated.setting import federation, trained
from tests.seeding import seeded

DEFENSE = KeyLock(key_length=16)
FITTING = Fitting(epochs=6, patience=3)
TRAINED, OWN = 400, 240  # images of the federation, and of the client that joins


def net():
    """Two norms: the first is locked, the second one's γ and β are public."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Flatten(), nn.Linear(200, 10),
        )  # fmt: skip


def images(part):
    """Images and labels: ``"own"`` of the new client, ``"test"`` of nobody."""
    full = data.load("mnist-sample")
    if part == "own":
        chosen = slice(TRAINED, TRAINED + OWN)
        return full.train_images[chosen], full.train_labels[chosen]
    return full.test_images[:300], full.test_labels[:300]


@cache
def _federation(defense):
    full = data.load("mnist-sample")
    dataset = data.Dataset(
        full.spec,
        train_images=full.train_images[:TRAINED],
        train_labels=full.train_labels[:TRAINED],
        test_images=full.test_images[:300],
        test_labels=full.test_labels[:300],
    )
    local = {"batch_size": 16, "lr": 0.05, "epochs": 3}
    with seeded("federation"):
        return trained(
            federation(dataset, defense, model=net(), clients=2, rounds=3, local=local, eval_every=3)
        )


def public(defense=DEFENSE):
    """The trained federation's public tensors."""
    return {name: tensor.clone() for name, tensor in _federation(defense).server.state.items()}


def member_lock(defense=DEFENSE):
    """The lock of a client that took part, with the public tensors in it."""
    run = _federation(defense)
    lock = defense.prepare(net())
    run.clients[0].enter(lock, run.server.state)
    return lock
