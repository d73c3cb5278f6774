"""What a server scores that looks at no update: what is not above this is no leak."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from fedkl import rng
from fedkl.attacking.observing import Trial
from fedkl.attacking.victims import own_order
from fedkl.attacks.learned.prior_only import class_means
from fedkl.data import Dataset
from fedkl.metrics import SUCCESS_DB, Candidates, Scaling, Score, score

OWN_IMAGES = 1000
"""Images of the server's own behind the guess from the labels alone, where an arm grants it none."""

CANDIDATES = 100
"""Test images among which a reconstruction must identify its own; more where more are attacked."""


def candidates_of(dataset: Dataset, trials: Sequence[Trial]) -> Candidates:
    """The images among which a reconstruction must identify its own: at least `CANDIDATES`."""
    return Candidates(dataset.test_images[: max(CANDIDATES, sum(len(trial.images) for trial in trials))])


def floor(
    dataset: Dataset,
    trials: Sequence[Trial],
    *,
    seed: int,
    auxiliary: int = 0,
    scalings: Collection[Scaling] = frozenset[Scaling]({"clip"}),
) -> list[tuple[Trial, list[Score]]]:
    """What a server scores that looks at no update: the mean of its own images of each label, or noise.

    Reconstructions of a batch are matched to its images, and among many one that looks a little like an image
    is found by chance: of a batch of 100, noise "identifies" two of five, and more than half where images
    are matched by their correlation. Of batches that guess counts that identifies the most in all trials,
    with the PSNR of the one that recovers the most: noise recovers nothing, means do where images are alike.

    Args:
        dataset: Its training images are the server's own, its test images the candidates.
        trials: Whose labels are guessed from; the server is taken to know them.
        seed: Of which images the server has.
        auxiliary: How many; `OWN_IMAGES` if 0.
        scalings: The rules by which the attacks were scored that are held against it.
    """
    candidates = candidates_of(dataset, trials)
    own = own_order(dataset, seed=seed)[: auxiliary or OWN_IMAGES]
    images, labels = dataset.train_images[own], dataset.train_labels[own]

    def means(trial: Trial) -> Tensor:
        return class_means(trial.labels, images=images, labels=labels)

    def noise(trial: Trial) -> Tensor:
        return torch.rand(trial.images.shape, generator=rng.generator(seed, "noise", trial.index))

    def scores(guess: Callable[[Trial], Tensor], trial: Trial, scaling: Scaling) -> list[Score]:
        places = trial.places
        return score(
            guess(trial), trial.images, candidates=candidates, candidate_index=places, scaling=scaling
        )

    # One image is not matched: noise is chance, and the scale decides nothing.
    batches = any(len(trial.images) > 1 for trial in trials)
    rules: list[Scaling] = sorted(scalings) if batches else ["clip"]
    scored = [
        [scores(guess, trial, rule) for trial in trials]
        for rule in rules
        for guess in ((means, noise) if batches else (means,))
    ]
    most_identified, most_recovered = (
        max(scored, key=lambda found: sum(map(counts, chain.from_iterable(found))))
        for counts in (_is_identified, _is_recovered)
    )
    best = [
        [replace(one, psnr=other.psnr) for one, other in zip(*each, strict=True)]
        for each in zip(most_identified, most_recovered, strict=True)
    ]
    return list(zip(trials, best, strict=True))


def _is_identified(score: Score) -> bool:
    return score.identified


def _is_recovered(score: Score) -> bool:
    return score.psnr is not None and score.psnr >= SUCCESS_DB
