"""Defenses of the representation, attacked by a server that knows them and by one that does not."""

from __future__ import annotations

import torch

from fedkl import rng
from fedkl.attacking import observe
from fedkl.defenses import own_arms


def seen(defense, network, trials):
    return {
        name: [
            observe(arm.defense.prepare(network), arm=arm, model=network, trial=trial, classes=10)
            for trial in trials
        ]
        for name, arm in own_arms(defense).items()
    }


def errors(attack, observations, trials):
    generators = [rng.generator(0, "attack", trial.index) for trial in trials]
    found = attack.reconstruct_many(observations, generators=generators)
    pairs = zip(found, trials, strict=True)
    return torch.stack([(each.images - trial.images).square().mean() for each, trial in pairs])
