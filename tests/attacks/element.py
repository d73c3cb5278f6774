"""A lock with a scale and a shift per element, as the server knows it: how γ and β are drawn."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedkl.attacking import SimulatedClients, observe, trials_of
from fedkl.attacks import Auxiliary, Knowledge, Procedure
from fedkl.defenses import Arm, PrivateLayers
from fedkl.locking import Split, withhold


class Affine(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        return x * self.weight + self.bias


@dataclass(frozen=True, kw_only=True)
class ElementLock(PrivateLayers):  # one of the known defenses, for the type checks of Arm
    layer: str = "0"
    draw: object = None
    head: str = ""

    def prepare(self, model, *, key=None):
        own = copy.deepcopy(model)
        layer = own.get_submodule(self.layer)
        shape = (layer.out_channels, 8, 8)
        layer.norm = nn.BatchNorm2d(layer.out_channels, affine=False)
        layer.register_forward_hook(lambda module, args, output: module.norm(output))
        layer.norm.affine = Affine(*self.draw(torch.randn(shape), torch.randn(shape)))
        layer.norm.register_forward_hook(lambda module, args, output: module.affine(output))
        split = Split(own)
        withhold(layer.norm.affine, ("weight", "bias"))
        if self.head:
            withhold(own.get_submodule(self.head), ("weight", "bias"))
        return split


def seen_of(defense, model, images, *, trials, auxiliary=600, client=None, prepared_once=False, labels=True):
    """Observations of the first test images, with auxiliary ones of the training images; and their trials."""
    arm = Arm(name="seen", description="", defense=defense, knowledge=Knowledge(labels=labels))
    chosen = trials_of(images, trials=trials)
    victims = [defense.prepare(model) for _ in range(1 if prepared_once else trials)]
    clients = SimulatedClients.of(arm, victims[0], model, local=Procedure())
    own = Auxiliary(
        images=images.train_images[:auxiliary],
        labels=images.train_labels[:auxiliary],
        simulate=clients,
        draw=itertools.cycle([clients.draw() for _ in range(5)]).__next__,
    )
    seen = [
        replace(
            observe(victims[k % len(victims)], arm=arm, model=model, trial=t, classes=10, auxiliary=own),
            client=client,
        )
        for k, t in enumerate(chosen)
    ]
    return seen, chosen


def correlations(found, trials):
    """Of each found image with the true one."""
    pairs = [
        torch.stack([f.images.flatten(), t.images.flatten()]) for f, t in zip(found, trials, strict=True)
    ]
    return torch.tensor([float(torch.corrcoef(pair)[0, 1]) for pair in pairs])
