"""What the server has after a client's update, seen from the experiment, which knows the truth too."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
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
    client: int | None = None,
    others: Sequence[Split] = (),
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
        client: The victim's number, where the server has more of its updates.
        others: The rest of a cohort that shares the batch evenly; the server sees the mean of all updates.

    Raises:
        DataError: The arm fits γ and β to auxiliary images, and there are none.
    """
    local, knowledge = local or LocalSteps(), arm.knowledge
    cohort = (victim, *others)
    shares = zip(cohort, trial.images.chunk(len(cohort)), trial.labels.chunk(len(cohort)), strict=True)
    single_step = train_mode and local.steps == 1 and not others
    gradient = _mean([_seen_of(one, arm, x, y, train_mode=train_mode, local=local) for one, x, y in shares])
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
        client=client,
        cohort=len(cohort),
        statistics=sent_statistics(victim, trial.images) if single_step else {},
    )


def _seen_of(
    client: Split, arm: Arm, images: ImageBatch, labels: Labels, *, train_mode: bool, local: LocalSteps
) -> dict[str, Tensor]:
    """One client's update as it is sent, and what else of it the server was granted."""
    knowledge = arm.knowledge
    # Public γ and β are trained as such, not through the lock.
    trained = plain_copy(client) if knowledge.affine_gradient else client.model
    update = local_update(trained, images, labels, train_mode=train_mode, local=local)
    public = {name: update[name] for name in client.public_parameters()}
    sent = client.public_update(public, kind="gradient", num_samples=len(images), round=0)
    seen = dict(arm.defense.transform(sent).tensors)
    if knowledge.affine_gradient:
        seen = update | seen
    if knowledge.lock_gradient:
        seen |= {name: update[name] for name in client.private_parameters()}
    return seen


def _mean(updates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Over clients; of a single one its update as it is."""
    if len(updates) == 1:
        return dict(updates[0])
    return {name: torch.stack([update[name] for update in updates]).mean(0) for name in updates[0]}


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
        known: What the server has of the victim, the first of a cohort.
        baked: The victim's network with γ and β as numbers, where they are known; None: they are drawn.
        common: Whether γ and β are public, and so those of every client.
        names: The tensors that are observed.
        private: The plain network's parameters that clients do not send.
        train_mode: Of the clients' norms.
        local: The clients' local steps.
        cohort: So many clients share each batch; what is seen is their mean.
    """

    defense: Defense
    model: nn.Module = field(repr=False)
    known: Known = field(repr=False)
    baked: nn.Module | None = field(repr=False)
    common: bool
    names: tuple[str, ...]
    private: tuple[str, ...]
    train_mode: bool
    local: LocalSteps
    cohort: int = 1

    @classmethod
    def of(
        cls,
        arm: Arm,
        victim: Split,
        model: nn.Module,
        *,
        train_mode: bool = True,
        local: LocalSteps,
        cohort: int = 1,
    ) -> SimulatedClients:
        """The clients of an arm.

        Args:
            arm: What the server knows.
            victim: Only what is public or granted is taken.
            model: The plain architecture.
            train_mode: Of the clients' norms.
            local: The clients' local steps.
            cohort: So many clients share each batch.
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
            common=granted.affine_gradient,
            names=tuple(sorted(names)),
            private=tuple(sorted(private)),
            train_mode=train_mode,
            local=local,
            cohort=cohort,
        )

    def draw(self) -> dict[str, Tensor]:
        """The private parameters of one client; see `Auxiliary`."""
        plain = self.baked
        if plain is None:
            plain = plain_copy(self.defense.imitated(self.model, known=self.known))
        return {name: plain.get_parameter(name).detach().clone() for name in self.private}

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Updates of one client or cohort, stacked; see `Auxiliary`."""
        members = [self._client(granted=self.common or not member) for member in range(self.cohort)]
        shares = zip(members, images.chunk(self.cohort, 1), labels.chunk(self.cohort, 1), strict=True)
        sent = [self._sent(*share) for share in shares]
        return _mean(sent)

    def _client(self, *, granted: bool) -> nn.Module:
        """The victim's network, as far as the server was granted its secrets, or another client's."""
        if granted and self.baked is not None:
            return copy.deepcopy(self.baked)
        known = self.known if granted else replace(self.known, key=None, private={})
        split = self.defense.imitated(self.model, known=known)
        # In one step it is all the same whether γ and β are generated or numbers, but to the lock's gradient.
        alike = self.local.steps == 1 and not set(self.names).intersection(split.private_parameters())
        return plain_copy(split) if alike else split.model

    def _sent(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What it sends for each batch, stacked."""
        if self.local.steps == 1:
            updates = _gradients(network, images, labels, names=self.names, train_mode=self.train_mode)
        else:
            update = partial(_updated, network, train_mode=self.train_mode, local=self.local)
            updates = _stacked([update(x, y) for x, y in zip(images, labels, strict=True)], self.names)
        transform = self.defense.public_transform
        return updates if transform is None else dict(torch.vmap(transform)(updates))


def sent_statistics(victim: Split, images: ImageBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """What a server solves for that sees a client's running statistics before and after one train-mode step.

    new = (1 − m) · old + m · batch, with the norm's momentum m. The running variance takes the unbiased one;
    how many values a channel has, the architecture says. Dividing by m amplifies float32's rounding.

    Args:
        victim: Not changed. Norms whose statistics are private are left out.
        images: The client's batch.

    Returns:
        Mean and biased variance of the batch per channel, by the norm's qualified name.
    """
    before, client = victim.public_state(), copy.deepcopy(victim.model).train()
    norms = {
        name: norm
        for name, norm in client.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and f"{name}.running_var" in before
    }
    sizes: dict[nn.Module, int] = {}
    for norm in norms.values():
        norm.register_forward_pre_hook(
            lambda norm, args: sizes.update({norm: args[0].numel() // args[0].shape[1]})
        )
    if norms:
        with torch.no_grad():
            client(images)
    after = dict(client.named_buffers())
    found = {}
    for name, norm in norms.items():
        if norm not in sizes:  # it was not called
            continue
        share = norm.momentum or 1 / float(after[f"{name}.num_batches_tracked"])
        mean, variance = (
            (after[tensor] - (1 - share) * before[tensor]) / share
            for tensor in (f"{name}.running_mean", f"{name}.running_var")
        )
        found[name] = (mean, (variance * (1 - 1 / sizes[norm])).clamp_min(0))
    return found


def local_update(
    model: nn.Module, images: ImageBatch, labels: Labels, *, train_mode: bool, local: LocalSteps
) -> dict[str, Tensor]:
    """The sum of the gradients of a client's local steps, for every parameter; the model is not changed."""
    return _updated(copy.deepcopy(model), images, labels, train_mode=train_mode, local=local)


def _updated(
    model: nn.Module, images: ImageBatch, labels: Labels, *, train_mode: bool, local: LocalSteps
) -> dict[str, Tensor]:
    """As `local_update`, but for the model's mode and its norms' running statistics."""
    if local.steps == 1:
        return full_gradient(model, images, labels, train_mode=train_mode)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    total: dict[str, Tensor] = {}
    for step in range(local.steps):
        batch = local.batch(step, len(images))
        gradient = full_gradient(model, images[batch], labels[batch], train_mode=train_mode)
        total = {name: total[name] + g if total else g for name, g in gradient.items()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(gradient[name], alpha=local.lr)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return total


def _gradients(
    model: nn.Module, images: Tensor, labels: Tensor, *, names: Sequence[str], train_mode: bool
) -> dict[str, Tensor]:
    """Gradients of several batches, stacked; the model is changed."""
    try:
        return _gradients_at_once(model, images, labels, names=names, train_mode=train_mode)
    except RuntimeError:  # of what torch.func cannot trace, such as steps that depend on values
        each = [
            full_gradient(model, x, y, train_mode=train_mode) for x, y in zip(images, labels, strict=True)
        ]
        return _stacked(each, names)


def _gradients_at_once(
    model: nn.Module, images: Tensor, labels: Tensor, *, names: Sequence[str], train_mode: bool
) -> dict[str, Tensor]:
    model.train(train_mode)
    if train_mode:  # running statistics would be updated in place, and are not looked at
        torch.func.replace_all_batch_norm_modules_(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(wanted: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters | wanted, (x,)), y)

    gradient = torch.func.grad(loss)
    wanted = {name: parameters[name] for name in names}
    found = torch.vmap(gradient, in_dims=(None, 0, 0), randomness="different")(wanted, images, labels)
    return dict(found)


def _stacked(updates: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: torch.stack([update[name] for update in updates]) for name in names}


def full_gradient(
    model: nn.Module, images: ImageBatch, labels: Labels, *, train_mode: bool = True
) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy with respect to every parameter."""
    parameters = dict(model.train(train_mode).named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))
