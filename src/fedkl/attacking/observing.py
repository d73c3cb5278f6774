"""What the server has after a client's update, seen from the experiment, which knows the truth too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.attacking.networks import Networks
from fedkl.attacking.updates import difference, local_update, mean_of, sent_statistics, trained_tensors
from fedkl.data import Dataset
from fedkl.defenses import Arm, Defense, ServerView
from fedkl.defenses.completion import Completion
from fedkl.errors import DataError
from fedkl.locking import KEY, Split
from fedkl.protocol import Auxiliary, Observation, Procedure, Sending, Transform, trained_parameters
from fedkl.types import ImageBatch, Inputs, Labels

_FIT_STEPS = 200
_FIT_IMAGES = 100


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
    arm: Arm,
    model: nn.Module,
    trial: Trial,
    classes: int,
    train_mode: bool = True,
    local: Procedure | None = None,
    auxiliary: Auxiliary | None = None,
    client: int | None = None,
    others: Sequence[Split] = (),
    generator: torch.Generator | None = None,
    networks: Networks | None = None,
    sent: Mapping[str, Tensor] | None = None,
) -> Observation:
    """What the server has after one update of the victim: the update as it is sent.

    Where γ and β are known or found as numbers and there are several local steps, the server simulates their
    change as that of ordinary parameters: it cannot know how the lock layers trained.

    Args:
        victim: The client's split, by the arm's defense; not changed.
        arm: What the server knows, guesses and looks for.
        model: The plain architecture, which the server knows.
        trial: The client's batch.
        classes: Number of classes.
        train_mode: Whether the client's norms use the batch's statistics.
        local: What the client does; one gradient if None.
        auxiliary: The server's own data, if the arm grants any.
        client: The victim's number, where the server has more of its updates.
        others: The rest of a cohort that shares the batch evenly; the server sees the mean of all updates.
        generator: The attacker's, of what it draws in place of secrets; None: the operating system's.
        networks: Those of the observations that have equal tensors in common with this one; None: it has its
            own.
        sent: The update itself, where it was recorded; None: the victim is let do what clients do.

    Raises:
        DataError: The arm fits γ and β to auxiliary images, and there are none.
    """
    local, knowledge = arm.defense.procedure(local or Procedure()), arm.knowledge
    cohort = (victim, *others)
    shares = zip(cohort, trial.images.chunk(len(cohort)), trial.labels.chunk(len(cohort)), strict=True)
    steps = local.step_count(len(trial.images) // len(cohort))
    plain = _is_plain(local, len(trial.images)) and train_mode and not others and sent is None
    buffers: dict[str, Tensor] = {}
    gradient = sent or mean_of(
        [
            sent_by(
                *(one, arm, x, y),
                train_mode=train_mode,
                local=local,
                generator=rng.generator(trial.index, "audited-augmentation", member),
                buffers=buffers,
            )
            for member, (one, x, y) in enumerate(shares)
        ]
    )
    # A gradient has no statistics beside it.
    sends = local.algorithm == "fedavg" or arm.defense.shares_statistics
    known = plain and sends and (bool(buffers) or not arm.defense.changes_updates)
    channels, height, width = trial.images.shape[1:]
    view = _completed(victim, arm, model, auxiliary, generator)
    # What generates γ and β only matters where it is looked at or trains along: otherwise their values do.
    drawn = arm.filled_in == "drawn" and arm.regress != "affine"
    simulated = knowledge.lock_gradient or arm.regress == "key" or (steps > 1 and drawn)
    found = Observation(
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
        free={"nothing": (), "key": (KEY,), "affine": view.private}[arm.regress],
        transform=_public_transform(arm.defense) if knowledge.defense else None,
        auxiliary=auxiliary,
        client=client,
        cohort=len(cohort),
        statistics=sent_statistics(victim, trial.images, sent=buffers or None) if known else {},
    )
    if knowledge.defense:
        found = replace(found, model=arm.defense.informed(found.model, found.as_gradient().gradient))
    if networks:
        found = replace(found, model=networks.shared(found.model, of=model, defense=arm.defense))
    return found


def _is_plain(local: Procedure, images: int) -> bool:
    """Whether a client computes one step on all of its images as they are, in full precision."""
    whole = local.step_count(images) == 1 and len(local.batches(images)[0]) == images
    return whole and local.augmentation == "none" and local.precision == "float32"


@cache
def _public_transform(defense: Defense) -> Transform | None:
    """One object for a defense: observations of one kind are attacked together."""
    return defense.public_transform


def sent_by(
    client: Split,
    arm: Arm,
    images: Inputs,
    labels: Labels,
    *,
    train_mode: bool,
    local: Procedure,
    generator: torch.Generator,
    buffers: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """One client's update as it is sent, and what else of it the server was granted.

    Args:
        client: Its split, by the arm's defense; not changed.
        arm: What the server is granted.
        images: The client's.
        labels: Theirs.
        train_mode: Whether its norms use the batch's statistics.
        local: What it does, with what the defense makes of that.
        generator: Of its augmentation.
        buffers: Gets those that are sent along with weights after a defense changed them.

    Returns:
        By name, of what is trained: the gradient, or (before − after) / lr where weights are sent.
    """
    knowledge, public = arm.knowledge, client.trained_parameters()
    # Public γ and β are trained as such, not through the lock.
    trained = client.bake() if knowledge.affine_gradient else client.model
    private = () if knowledge.affine_gradient else client.private_parameters()
    given: dict[str, Any] = {"train_mode": train_mode, "local": local, "private": private}
    frozen, tied = client.frozen_parameters(), client.tied_names()
    at_hand = Sending.of(client.public_state(), client.model, images, labels, frozen=frozen, tied=tied)
    if local.algorithm == "fedavg":
        after = trained_tensors(trained, images, labels, **given, generator=generator)
        state = {name: after[name] for name in client.public_state()}
        sent = client.public_update(state, kind="weights", num_samples=len(images), round=0, search=False)
        weights = arm.defense.transform(sent, client=at_hand).tensors
        if buffers is not None and arm.defense.changes_updates:
            parameters = client.public_parameters()
            buffers |= {name: tensor for name, tensor in weights.items() if name not in parameters}
        before = trained_parameters(trained)
        update = difference(before, after, lr=local.lr)
        seen = difference({name: before[name] for name in public}, weights, lr=local.lr)
    else:
        update = local_update(trained, images, labels, **given, generator=generator)
        state = {name: update[name] for name in public}
        sent = client.public_update(state, kind="gradient", num_samples=len(images), round=0, search=False)
        seen = dict(arm.defense.transform(sent, client=at_hand).tensors)
    if knowledge.affine_gradient:
        seen = update | seen
    if knowledge.lock_gradient:
        seen |= {name: update[name] for name in client.private_parameters()}
    return seen


def _completed(
    victim: Split,
    arm: Arm,
    model: nn.Module,
    auxiliary: Auxiliary | None,
    generator: torch.Generator | None,
) -> ServerView:
    """The server's model, with what it puts in place of γ and β."""
    view = arm.defense.server_view(victim, model, granted=arm.knowledge, generator=generator)
    if arm.filled_in == "drawn":
        return view
    completion = Completion(view.model, victim).neutral()
    if arm.filled_in == "calibrated":
        if auxiliary is None:
            raise DataError(f"{arm.name}: expected auxiliary images to fit γ and β to. Add --auxiliary 100.")
        images, labels = auxiliary.images[:_FIT_IMAGES], auxiliary.labels[:_FIT_IMAGES]
        completion = completion.refitted(images, labels, steps=_FIT_STEPS)
    return replace(view, model=completion.model)
