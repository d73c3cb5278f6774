"""What the server has after a client's update, seen from the experiment, which knows the truth too."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.attacks import Auxiliary, LocalSteps, Observation
from fedkl.auditing.arms import Arm
from fedkl.data import Dataset
from fedkl.defenses.base import ServerView, plain_copy
from fedkl.defenses.completion import Completion
from fedkl.errors import DataError
from fedkl.locking import KEY, Split
from fedkl.types import ImageBatch, Labels


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
    local: LocalSteps | None = None,
    auxiliary: Auxiliary | None = None,
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
        local: The client's local steps; one if None.
        auxiliary: The server's own data; see `own_data`.

    Raises:
        DataError: The arm fits γ and β to auxiliary images, and there are none.
    """
    local, knowledge = local or LocalSteps(), arm.knowledge
    # Public γ and β are trained as such, not through the lock.
    trained = plain_copy(victim) if knowledge.affine_gradient else victim.model
    update = local_update(trained, trial.images, trial.labels, train_mode=train_mode, local=local)
    public = {name: update[name] for name in victim.public_parameters()}
    sent = victim.public_update(public, kind="gradient", num_samples=len(trial.images), round=0)
    gradient = dict(arm.defense.transform(sent).tensors)
    if knowledge.affine_gradient:
        gradient = update | gradient
    if knowledge.lock_gradient:
        gradient |= {name: update[name] for name in victim.private_parameters()}
    channels, height, width = trial.images.shape[1:]
    view = _completed(victim, arm, model, auxiliary)
    # What generates γ and β only matters where it is looked at or trains along: otherwise their values do.
    drawn = arm.filled_in == "drawn" and arm.regress != "affine"
    simulated = knowledge.lock_gradient or arm.regress == "key" or (local.steps > 1 and drawn)
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
        free={"nothing": (), "key": (KEY,), "affine": view.private}[arm.regress],
        transform=arm.defense.public_transform,
        auxiliary=auxiliary,
    )


def _completed(victim: Split, arm: Arm, model: nn.Module, auxiliary: Auxiliary | None) -> ServerView:
    """The server's model, with what it puts in place of γ and β."""
    view = arm.defense.server_view(victim, model, granted=arm.knowledge)
    if arm.filled_in == "drawn":
        return view
    completion = Completion(view.model, victim).neutral()
    if arm.filled_in == "calibrated":
        if auxiliary is None:
            raise DataError(f"{arm.name}: expected auxiliary images to fit γ and β to. Add --auxiliary 100.")
        completion = completion.refitted(auxiliary.images, auxiliary.labels, steps=_FIT_STEPS)
    return replace(view, model=completion.model)


_FIT_STEPS = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedClients:
    """`Auxiliary.simulate`: clients with fresh secrets, but for what the server was granted.

    Attributes:
        arm: What the server knows.
        victim: Its public tensors, and whatever of its secrets was granted, are used.
        model: The plain architecture.
        train_mode: Of the clients' norms.
        local: The clients' local steps.
    """

    arm: Arm
    victim: Split = field(repr=False)
    model: nn.Module = field(repr=False)
    train_mode: bool = True
    local: LocalSteps = field(default_factory=LocalSteps)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Updates of one client, stacked; see `Auxiliary`."""
        defense, knowledge = self.arm.defense, self.arm.knowledge
        client = self.victim if knowledge.affine else defense.imitated(
            self.victim, self.model, granted=knowledge
        )  # fmt: skip
        trained = plain_copy(client) if knowledge.affine else client.model
        names = set(client.public_parameters())
        if knowledge.affine_gradient:
            names = {name for name, _ in trained.named_parameters()}
        if knowledge.lock_gradient:
            names |= set(client.private_parameters())
        sent: dict[str, list[Tensor]] = {name: [] for name in sorted(names)}
        for x, y in zip(images, labels, strict=True):
            update = local_update(trained, x, y, train_mode=self.train_mode, local=self.local)
            part: Mapping[str, Tensor] = {name: update[name] for name in names}
            if defense.public_transform is not None:
                part = defense.public_transform(part)
            for name in names:
                sent[name].append(part[name])
        return {name: torch.stack(parts) for name, parts in sent.items()}


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
