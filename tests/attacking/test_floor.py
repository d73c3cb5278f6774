"""What is found without the update: no more may be said to leak."""

from __future__ import annotations

import torch

from fedkl import data
from fedkl.attacking.floor import candidates_of, floor
from fedkl.attacking.observing import trials_of
from fedkl.metrics import score


def test_noise_in_place_of_a_large_batch_is_not_above_it():
    """Matched to the images of a batch, it is taken for many of them; the mean of each label is for few."""
    dataset, size = data.load("mnist-sample"), 64
    trials = trials_of(dataset, trials=1, batch_size=size)
    ((trial, scores),) = floor(dataset, trials, seed=0)
    noise = torch.rand(trial.images.shape, generator=torch.Generator().manual_seed(1))
    about = {"candidates": candidates_of(dataset, trials), "candidate_index": trial.places, "scaling": "clip"}
    found = sum(each.identified for each in score(noise, trial.images, **about))
    assert found > 0.15 * size
    assert sum(each.identified for each in scores) > 0.7 * found
