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
from fedkl.defenses import Defense
from fedkl.defenses.base import Known, ServerView, plain_copy
from fedkl.defenses.completion import Completion
from fedkl.errors import DataError
from fedkl.locking import KEY, Split
from fedkl.types import ImageBatch, Labels

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
        auxiliary: The server's own data, if the arm grants any.

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
        images, labels = auxiliary.images[:_FIT_IMAGES], auxiliary.labels[:_FIT_IMAGES]
        completion = completion.refitted(images, labels, steps=_FIT_STEPS)
    return replace(view, model=completion.model)


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedClients:
    """`Auxiliary.simulate`: clients with fresh secrets, but for what the server was granted.

    Nothing of the victim is in here that was not granted.

    Attributes:
        defense: What clients do.
        model: The plain architecture.
        known: What the server has of the victim.
        baked: The victim's network with γ and β as numbers, where they are known; None: they are drawn.
        names: The tensors that are observed.
        private: The plain network's parameters that clients do not send.
        train_mode: Of the clients' norms.
        local: The clients' local steps.
    """

    defense: Defense
    model: nn.Module = field(repr=False)
    known: Known = field(repr=False)
    baked: nn.Module | None = field(repr=False)
    names: tuple[str, ...]
    private: tuple[str, ...]
    train_mode: bool
    local: LocalSteps

    @classmethod
    def of(
        cls, arm: Arm, victim: Split, model: nn.Module, *, train_mode: bool = True, local: LocalSteps
    ) -> SimulatedClients:
        """The clients of an arm.

        Args:
            arm: What the server knows.
            victim: Only what is public or granted is taken.
            model: The plain architecture.
            train_mode: Of the clients' norms.
            local: The clients' local steps.
        """
        granted = arm.knowledge
        plain = plain_copy(victim)
        baked = plain if granted.affine else None
        names = set(victim.public_parameters())
        parameters = {name for name, _ in plain.named_parameters()}
        private = parameters - names
        if granted.affine_gradient and baked is not None:
            names = parameters
        if granted.lock_gradient:
            names |= set(victim.private_parameters())
        return cls(
            defense=arm.defense,
            model=model,
            known=arm.defense.known(victim, granted=granted),
            baked=baked,
            names=tuple(sorted(names)),
            private=tuple(sorted(private)),
            train_mode=train_mode,
            local=local,
        )

    def draw(self) -> dict[str, Tensor]:
        """The private parameters of one client; see `Auxiliary`."""
        plain = self.baked
        if plain is None:
            plain = plain_copy(self.defense.imitated(self.model, known=self.known))
        return {name: plain.get_parameter(name).detach().clone() for name in self.private}

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Updates of one client, stacked; see `Auxiliary`."""
        trained = self.baked
        if trained is None:
            trained = self.defense.imitated(self.model, known=self.known).model
        transform = self.defense.public_transform
        sent: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for x, y in zip(images, labels, strict=True):
            update = local_update(trained, x, y, train_mode=self.train_mode, local=self.local)
            part: Mapping[str, Tensor] = {name: update[name] for name in self.names}
            for name, tensor in (part if transform is None else transform(part)).items():
                sent[name].append(tensor)
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
