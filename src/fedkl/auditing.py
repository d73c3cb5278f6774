"""What a server could reconstruct: arms (defense × what the server knows) × trials, scored per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import rng
from fedkl.attacks import Attack, Knowledge, Observation, Reconstruction
from fedkl.data import Dataset
from fedkl.defenses import AnyDefense, Defense, KeyLock, NoDefense, PrivateNorm
from fedkl.defenses.base import plain_copy
from fedkl.errors import DataError
from fedkl.locking import Split
from fedkl.metrics import Score, score
from fedkl.types import ImageBatch, Labels

CANDIDATES = 100
"""Test images among which a reconstruction must identify its own; more where more are attacked."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One column of the comparison.

    Attributes:
        name: Short name.
        description: What stands behind it, in one line.
        defense: What the client does.
        knowledge: What the server is granted.
    """

    name: str
    description: str
    defense: AnyDefense
    knowledge: Knowledge = field(default_factory=Knowledge)


def standard_arms(lock: KeyLock | None = None, *, labels: bool = True) -> tuple[Arm, ...]:
    """The locked arm and its controls.

    Args:
        lock: The lock; default options if None.
        labels: Whether the server is granted the true labels, in every arm.
    """
    lock = lock or KeyLock()

    def arm(name: str, description: str, defense: AnyDefense, **granted: bool) -> Arm:
        knowledge = Knowledge(labels=labels, **granted)
        return Arm(name=name, description=description, defense=defense, knowledge=knowledge)

    private = PrivateNorm(like=lock)
    return (
        arm("no-norm", "plain network, no lock", NoDefense()),
        arm("public-norm", "the locked network, γ and β public", lock, affine=True, affine_gradient=True),
        arm("private-norm", "γ and β private, no key (FedBN)", private),
        arm("lock", "key-lock, nothing private known", lock),
        arm("lock-known-key", "key-lock, key known", lock, key=True),
        arm("lock-known-layers", "key-lock, lock layers known, wrong key", lock, lock_layers=True),
        arm("lock-known-both", "key-lock, key and lock layers known", lock, key=True, lock_layers=True),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One attacked image batch with its truth, for the scoring only.

    Attributes:
        index: The trial's number.
        places: Where its images are among the test images.
        images: Shape ``(batch, channels, height, width)``.
        labels: Shape ``(batch,)``.
    """

    index: int
    places: tuple[int, ...]
    images: ImageBatch
    labels: Labels


@dataclass(frozen=True, kw_only=True, eq=False)
class TrialResult:
    """One trial of one arm.

    Attributes:
        arm: The arm's name.
        trial: The trial's number.
        scores: One per image.
        reconstruction: What the attack found.
    """

    arm: str
    trial: int
    scores: tuple[Score, ...]
    reconstruction: Reconstruction

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without images."""
        return {
            "event": "trial",
            "arm": self.arm,
            "trial": self.trial,
            "loss": self.reconstruction.loss if math.isfinite(self.reconstruction.loss) else None,
            "evaluations": self.reconstruction.evaluations,
            "scaling": self.reconstruction.scaling,
            "scores": [score.to_dict() for score in self.scores],
        }


def trials_of(dataset: Dataset, *, trials: int, batch_size: int = 1) -> list[Trial]:
    """The first test images, in batches.

    Raises:
        DataError: The dataset has too few test images.
    """
    needed = trials * batch_size
    if trials < 1 or batch_size < 1 or needed > len(dataset.test_images):
        raise DataError(
            f"Expected trials ≥ 1 and batch_size ≥ 1 with at most {len(dataset.test_images)} test images in "
            f"all, got {trials} × {batch_size}."
        )
    batches = torch.split(torch.arange(needed), batch_size)
    return [
        Trial(
            index=index,
            places=tuple(batch.tolist()),
            images=dataset.test_images[batch].contiguous(),
            labels=dataset.test_labels[batch],
        )
        for index, batch in enumerate(batches)
    ]


def observe(
    victim: Split,
    *,
    defense: Defense,
    model: nn.Module,
    trial: Trial,
    classes: int,
    knowledge: Knowledge,
) -> Observation:
    """What the server has after one FedSGD step of the victim, in train mode: the update as it is sent.

    Args:
        victim: The client's split.
        defense: The client's defense, which the server knows.
        model: The plain architecture, which the server knows.
        trial: The client's batch.
        classes: Number of classes.
        knowledge: What the server is granted.
    """
    loss = F.cross_entropy(victim.model.train()(trial.images), trial.labels)
    sent = victim.public_update(
        victim.public_gradient(loss), kind="gradient", num_samples=len(trial.images), round=0
    )
    gradient = dict(defense.transform(sent).tensors)
    if knowledge.affine_gradient:
        granted = full_gradient(plain_copy(victim), trial.images, trial.labels)
        gradient |= {name: g for name, g in granted.items() if name not in gradient}
    channels, height, width = trial.images.shape[1:]
    return Observation(
        model=defense.server_view(victim, model, granted=knowledge),
        gradient=gradient,
        image_shape=(channels, height, width),
        classes=classes,
        batch_size=len(trial.images),
        labels=trial.labels if knowledge.labels else None,
    )


def full_gradient(model: nn.Module, images: ImageBatch, labels: Labels) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy with respect to every parameter, in train mode."""
    parameters = dict(model.train().named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def attack_arms(
    arms: Sequence[Arm],
    *,
    attack: Attack,
    build: Callable[[int], nn.Module],
    dataset: Dataset,
    trials: Sequence[Trial],
    seed: int,
    skip: Collection[int] = (),
    chunk: int = 20,
    on_result: Callable[[TrialResult], None],
    on_evaluation: Callable[[int, int], None] | None = None,
) -> None:
    """Attacks every trial in every arm.

    Arms with the same defense attack the same victim (same weights, same γ and β) in a trial; every arm uses
    the same images, model seeds and attack seeds. Observations of one kind are attacked as one batch, across
    arms.

    Args:
        arms: The arms.
        attack: The attack.
        build: Builds the plain model of a trial from the trial's number.
        dataset: Its test images are the candidates of the identification.
        trials: The trials, from the dataset's test images.
        seed: Of the attack's randomness. Keys and lock layers come from the operating system.
        skip: Numbers of trials that are not attacked, e.g. those of an earlier, interrupted run.
        chunk: Trials attacked at once.
        on_result: Called with each result.
        on_evaluation: Called with (evaluations so far, problems still running) of the present batch.
    """
    candidates = dataset.test_images[: max(CANDIDATES, sum(len(trial.images) for trial in trials))]
    due = [trial for trial in trials if trial.index not in skip]
    for first in range(0, len(due), chunk):
        group = due[first : first + chunk]
        models = {trial.index: build(trial.index) for trial in group}
        victims: dict[tuple[Defense, int], Split] = {}
        batches: dict[Hashable, list[tuple[Arm, Trial, Observation]]] = {}
        for arm, trial in ((arm, trial) for arm in arms for trial in group):
            model, place = models[trial.index], (arm.defense, trial.index)
            if place not in victims:
                victims[place] = arm.defense.prepare(model)
            observation = observe(
                victims[place],
                defense=arm.defense,
                model=model,
                trial=trial,
                classes=dataset.spec.classes,
                knowledge=arm.knowledge,
            )
            batches.setdefault(observation.kind, []).append((arm, trial, observation))
        for batch in batches.values():
            generators = [rng.generator(seed, "attack", trial.index) for _, trial, _ in batch]
            found = attack.reconstruct_many(
                [o for _, _, o in batch], generators=generators, on_evaluation=on_evaluation
            )
            for (arm, trial, _), reconstruction in zip(batch, found, strict=True):
                on_result(_scored(arm, trial, reconstruction, candidates))


def _scored(arm: Arm, trial: Trial, reconstruction: Reconstruction, candidates: Tensor) -> TrialResult:
    scores = score(
        reconstruction.images,
        trial.images,
        candidates=candidates,
        candidate_index=trial.places,
        labels_true=trial.labels,
        labels_found=reconstruction.labels,
        scaling=reconstruction.scaling,
    )
    return TrialResult(arm=arm.name, trial=trial.index, scores=tuple(scores), reconstruction=reconstruction)
