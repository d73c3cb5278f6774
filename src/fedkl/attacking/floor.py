"""What a server scores that looks at no update: what is not above this is no leak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fedkl import rng
from fedkl.attacking.observing import Trial
from fedkl.attacking.victims import own_order
from fedkl.attacks.learned.prior_only import class_means
from fedkl.data import Dataset
from fedkl.metrics import Candidates, Score, score

OWN_IMAGES = 1000
"""Images of the server's own behind the guess from the labels alone, where an arm grants it none."""

CANDIDATES = 100
"""Test images among which a reconstruction must identify its own; more where more are attacked."""


def candidates_of(dataset: Dataset, trials: Sequence[Trial]) -> Candidates:
    """The images among which a reconstruction must identify its own: at least `CANDIDATES`."""
    return Candidates(dataset.test_images[: max(CANDIDATES, sum(len(trial.images) for trial in trials))])


def floor(
    dataset: Dataset, trials: Sequence[Trial], *, seed: int, auxiliary: int = 0
) -> Iterator[tuple[Trial, list[Score]]]:
    """What a server scores that looks at no update: the mean of its own images of each label, or noise.

    Reconstructions of a batch are matched to its images, and among many one that looks a little like an image
    is found by chance: of a batch of 100, noise "identifies" two of five. Of batches the better one counts.

    Args:
        dataset: Its training images are the server's own, its test images the candidates.
        trials: Whose labels are guessed from; the server is taken to know them.
        seed: Of which images the server has.
        auxiliary: How many; `OWN_IMAGES` if 0.
    """
    candidates = candidates_of(dataset, trials)
    own = own_order(dataset, seed=seed)[: auxiliary or OWN_IMAGES]
    images, labels = dataset.train_images[own], dataset.train_labels[own]
    for trial in trials:
        guesses = [class_means(trial.labels, images=images, labels=labels)]
        if len(trial.images) > 1:
            guesses += [torch.rand(guesses[0].shape, generator=rng.generator(seed, "noise", trial.index))]
        scored = [
            score(guess, trial.images, candidates=candidates, candidate_index=trial.places, scaling="clip")
            for guess in guesses
        ]
        yield trial, max(scored, key=lambda scores: sum(each.identified for each in scores))
