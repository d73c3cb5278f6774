"""What is found without the update: no more may be said to leak."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedkl import data, rng
from fedkl.attacking.floor import OWN_IMAGES, candidates_of, floor
from fedkl.attacking.observing import trials_of
from fedkl.attacking.victims import own_order
from fedkl.attacks.learned.prior_only import class_means
from fedkl.metrics import SUCCESS_DB, score


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


def test_noise_that_is_matched_by_correlation_is_not_above_it():
    """As attacks behind norms are scored, where the scale is not known: that finds more by chance."""
    dataset, size = data.load("mnist-sample"), 100
    trials = trials_of(dataset, trials=1, batch_size=size)
    about = {"candidates": candidates_of(dataset, trials), "candidate_index": trials[0].places}
    noise = torch.rand(trials[0].images.shape, generator=torch.Generator().manual_seed(1))
    ((_, scores),) = floor(dataset, trials, seed=0, scalings={"prior"})
    found = sum(each.identified for each in score(noise, trials[0].images, **about, scaling="prior"))
    assert found > 0.4 * size
    assert abs(sum(each.identified for each in scores) - found) < 0.15 * found


def test_the_better_guess_is_better_in_all_trials_and_not_in_each():
    """One that changed from trial to trial would know which of them is better in it: the truth."""
    dataset = data.load("mnist-sample")
    trials = trials_of(dataset, trials=6, batch_size=8)
    own = own_order(dataset, seed=0)[:OWN_IMAGES]
    images, labels = dataset.train_images[own], dataset.train_labels[own]

    def means(trial):
        return class_means(trial.labels, images=images, labels=labels)

    def noise(trial):
        return torch.rand(trial.images.shape, generator=rng.generator(0, "noise", trial.index))

    about = {"candidates": candidates_of(dataset, trials), "scaling": "clip"}
    hits = [
        [
            sum(s.identified for s in score(guess(t), t.images, candidate_index=t.places, **about))
            for t in trials
        ]
        for guess in (means, noise)
    ]
    total = sum(each.identified for _, scores in floor(dataset, trials, seed=0) for each in scores)
    assert total == max(map(sum, hits)) < sum(map(max, *hits))


def test_images_that_are_alike_are_recovered_without_the_update():
    """Flat images are near their labels' mean; noise identifies more of a batch, and recovers none."""
    whole, draws = data.load("mnist-sample"), torch.Generator().manual_seed(0)
    flat = {
        name: 0.5 + 0.005 * torch.randn(getattr(whole, name).shape, generator=draws)
        for name in ("train_images", "test_images")
    }
    dataset = replace(whole, **flat)
    found = floor(dataset, trials_of(dataset, trials=6, batch_size=16), seed=0)
    scores = [score for _, each in found for score in each]
    assert all(score.psnr >= SUCCESS_DB for score in scores)
    assert sum(score.identified for score in scores) > 1
