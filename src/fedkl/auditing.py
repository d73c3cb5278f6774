"""What a server could reconstruct: arms (defense × what the server knows) × trials, scored per image."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import rng
from fedkl.attacks import Attack, Knowledge, LocalSteps, Observation, Reconstruction
from fedkl.data import Dataset
from fedkl.defenses import AnyDefense, Defense, KeyLock, NoDefense, PrivateNorm
from fedkl.defenses.base import plain_copy
from fedkl.errors import DataError
from fedkl.locking import KEY, Split
from fedkl.metrics import Score, score
from fedkl.types import ImageBatch, Labels

CANDIDATES = 100
"""Test images among which a reconstruction must identify its own; more where more are attacked."""


Regressed = Literal["nothing", "key", "affine"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One column of the comparison.

    Attributes:
        name: Short name.
        description: What stands behind it, in one line.
        defense: What the client does.
        knowledge: What the server is granted.
        regress: What the attack finds together with the images, instead of relying on the server's guess:
            the key, or γ and β themselves.
    """

    name: str
    description: str
    defense: AnyDefense
    knowledge: Knowledge = field(default_factory=Knowledge)
    regress: Regressed = "nothing"


def standard_arms(lock: KeyLock | None = None, *, labels: bool = True) -> tuple[Arm, ...]:
    """The locked arm, its controls, and every cell of the paper's threat-model grid.

    Args:
        lock: The lock; default options if None.
        labels: Whether the server is granted the true labels, in every arm.

    The gradient of the lock layers gives the first lock's key away without any attack, as the ratio of the
    gradients of W and b; the arms that see it only match it too, with the key they have.

    Source:
        The grid: arXiv 2305.04095, section 3; its public implementation.
    """
    lock = lock or KeyLock()

    def arm(
        name: str,
        description: str,
        defense: AnyDefense = lock,
        *,
        regress: Regressed = "nothing",
        **granted: bool,
    ) -> Arm:
        knowledge = Knowledge(labels=labels, **granted)
        return Arm(name=name, description=description, defense=defense, knowledge=knowledge, regress=regress)

    return (
        arm("no-norm", "plain network, no lock", NoDefense()),
        arm("public-norm", "the locked network, γ and β public", affine=True, affine_gradient=True),
        arm("private-norm", "γ and β private, no key (FedBN)", PrivateNorm(like=lock)),
        arm("lock", "key-lock, nothing private known"),
        arm("lock-known-key", "key-lock, key known", key=True),
        arm("lock-known-layers", "key-lock, lock layers known, wrong key", lock_layers=True),
        arm("lock-known-both", "key-lock, key and lock layers known", key=True, lock_layers=True),
        arm("lock-seen-gradient", "key-lock, gradient of the lock layers matched too", lock_gradient=True),
        arm(
            "lock-known-key-seen-gradient",
            "key-lock, key known, gradient of the lock layers matched too",
            key=True,
            lock_gradient=True,
        ),
        arm(
            "lock-regressed-key",
            "key-lock, lock layers known, the key found along with the image",
            regress="key",
            lock_layers=True,
        ),
        arm("lock-regressed-affine", "key-lock, γ and β found along with the image", regress="affine"),
        arm("lock-known-affine", "key-lock, γ and β known, not their gradient", affine=True),
    )


MAIN_ARMS = (
    "no-norm",
    "public-norm",
    "private-norm",
    "lock",
    "lock-known-key",
    "lock-known-layers",
    "lock-known-both",
)
"""What an attack runs if no arms are named: the lock and its controls."""


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

    def to(self, device: torch.device) -> Trial:
        """The same trial with its tensors on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


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
    regress: Regressed = "nothing",
    train_mode: bool = True,
    local: LocalSteps | None = None,
) -> Observation:
    """What the server has after one update of the victim: the update as it is sent.

    Where γ and β are known or found as numbers and there are several local steps, the server simulates their
    change as that of ordinary parameters: it cannot know how the lock layers trained.

    Args:
        victim: The client's split; not changed.
        defense: The client's defense, which the server knows.
        model: The plain architecture, which the server knows.
        trial: The client's batch.
        classes: Number of classes.
        knowledge: What the server is granted.
        regress: What the attack is to find besides the images.
        train_mode: Whether the client's norms use the batch's statistics.
        local: The client's local steps; one if None.
    """
    local = local or LocalSteps()
    # Public γ and β are trained as such, not through the lock.
    trained = plain_copy(victim) if knowledge.affine_gradient else victim.model
    update = local_update(trained, trial.images, trial.labels, train_mode=train_mode, local=local)
    public = {name: update[name] for name in victim.public_parameters()}
    sent = victim.public_update(public, kind="gradient", num_samples=len(trial.images), round=0)
    gradient = dict(defense.transform(sent).tensors)
    if knowledge.affine_gradient:
        gradient = update | gradient
    if knowledge.lock_gradient:
        gradient |= {name: update[name] for name in victim.private_parameters()}
    channels, height, width = trial.images.shape[1:]
    view = defense.server_view(victim, model, granted=knowledge)
    # What generates γ and β only matters where it is looked at or trains along: otherwise their values do.
    simulated = knowledge.lock_gradient or regress == "key" or (local.steps > 1 and regress != "affine")
    return Observation(
        model=view.model,
        gradient=gradient,
        image_shape=(channels, height, width),
        classes=classes,
        batch_size=len(trial.images),
        train_mode=train_mode,
        labels=trial.labels if knowledge.labels else None,
        local=local,
        secrets=view.secrets if simulated else {},
        generate=view.generate if simulated else None,
        free={"nothing": (), "key": (KEY,), "affine": view.private}[regress],
        transform=defense.public_transform,
    )


def local_update(
    model: nn.Module, images: ImageBatch, labels: Labels, *, train_mode: bool, local: LocalSteps
) -> dict[str, Tensor]:
    """The sum of the gradients of a client's local steps, for every parameter; the model is not changed."""
    if local.steps == 1:
        return full_gradient(copy.deepcopy(model), images, labels, train_mode=train_mode)
    trained = copy.deepcopy(model)
    total: dict[str, Tensor] = {}
    for step in range(local.steps):
        batch = local.batch(step, len(images))
        gradient = full_gradient(trained, images[batch], labels[batch], train_mode=train_mode)
        total = {name: total[name] + g if total else g for name, g in gradient.items()}
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                parameter.sub_(gradient[name], alpha=local.lr)
    return total


def full_gradient(
    model: nn.Module, images: ImageBatch, labels: Labels, *, train_mode: bool = True
) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy with respect to every parameter."""
    parameters = dict(model.train(train_mode).named_parameters())
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
    train_mode: bool = True,
    local: LocalSteps | None = None,
    skip: Collection[int] = (),
    chunk: int = 20,
    workers: int = 1,
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
        build: Builds the plain model of a trial from the trial's number; it decides the device.
        dataset: Its test images are the candidates of the identification.
        trials: The trials, from the dataset's test images.
        seed: Of the attack's randomness. Keys and lock layers come from the operating system.
        train_mode: Whether the client's norms use the batch's statistics.
        local: The client's local steps; one if None.
        skip: Numbers of trials that are not attacked, e.g. those of an earlier, interrupted run.
        chunk: Trials attacked at once.
        workers: Threads that share a chunk out; see `Attack.reconstruct_many`.
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
                trial=trial.to(next(model.parameters()).device),
                classes=dataset.spec.classes,
                knowledge=arm.knowledge,
                regress=arm.regress,
                train_mode=train_mode,
                local=local,
            )
            batches.setdefault(observation.kind, []).append((arm, trial, observation))
        for batch in batches.values():
            generators = [rng.generator(seed, "attack", trial.index) for _, trial, _ in batch]
            found = attack.reconstruct_many(
                [o for _, _, o in batch],
                generators=generators,
                on_evaluation=on_evaluation,
                workers=workers,
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
