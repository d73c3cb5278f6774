"""Clients of a subject, played on its images, and which of them a recorded update looks like."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.attacking.updates import difference, local_update
from fedkl.auditing.recorded.likeness import Comparison, Likeness
from fedkl.auditing.subject import Subject
from fedkl.errors import DataError, printable
from fedkl.protocol import Procedure, trained_parameters

NormMode = Literal["train", "eval"]
Otherwise = Literal["nothing", "norm mode", "step size", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What makes played clients look like the recorded update.

    Attributes:
        otherwise: What they do otherwise than the subject says; ``"unknown"``: nothing that was tried helps.
        comparison: With these clients; with those of the subject, if nothing helps.
        reversed: Whether it is the negative of the update that looks like theirs.
        factors: Between which factors an update's size is not odd.
    """

    otherwise: Otherwise
    comparison: Comparison
    reversed: bool
    factors: tuple[float, float]


def explained(
    subject: Subject, update: Mapping[str, Tensor], *, clients: int, generator: torch.Generator
) -> Explanation:
    """Plays clients as the subject says, and otherwise where these do not look like the update.

    Args:
        subject: Whose clients are played.
        update: By the network's names, in the unit of `played`.
        clients: How many are played each time, at least 40.
        generator: Draws their images.
    """
    drawn = int(torch.randint(2**31, (1,), generator=generator))
    with rng.seeded(drawn):  # for dropout, and for functions that train
        return _explained(subject, update, clients, generator)


def _explained(
    subject: Subject, update: Mapping[str, Tensor], clients: int, generator: torch.Generator
) -> Explanation:
    network = subject.build()
    stated = _likeness(subject, network, subject.norm_mode, clients, generator)
    first = stated.compare(update)
    found = _either_sign("nothing", stated, update)
    if found is None and _has_modes(network):
        other: NormMode = "eval" if subject.norm_mode == "train" else "train"
        with contextlib.suppress(DataError):  # a batch of one image may have no statistics
            likeness = _likeness(subject, network, other, clients, generator)
            found = _either_sign("norm mode", likeness, update)
    if found is None and (steps := _other_steps(subject, first.factor)):
        likeness = _likeness(steps, network, subject.norm_mode, clients, generator)
        found = _either_sign("step size", likeness, update)
        if found:  # its size is told in the subject's unit
            found = replace(found, comparison=replace(found.comparison, factor=first.factor, odd_size=True))
    return found or Explanation(otherwise="unknown", comparison=first, reversed=False, factors=stated.factors)


def _either_sign(
    otherwise: Otherwise, likeness: Likeness, update: Mapping[str, Tensor]
) -> Explanation | None:
    """The update as it is, or else its negative, if that looks like the clients'."""
    as_is = likeness.compare(update)
    negative = likeness.compare({name: -tensor for name, tensor in update.items()})
    is_reversed = negative.fits and (as_is.sign == "reversed" or not as_is.fits)
    if not as_is.fits and not is_reversed:
        return None
    return Explanation(
        otherwise=otherwise,
        comparison=negative if is_reversed else as_is,
        reversed=is_reversed,
        factors=likeness.factors,
    )


def _likeness(
    subject: Subject, network: nn.Module, mode: NormMode, clients: int, generator: torch.Generator
) -> Likeness:
    weights = {name: parameter.detach() for name, parameter in trained_parameters(network).items()}
    updates = played(subject, network, mode=mode, clients=clients, generator=generator)
    return Likeness(updates, count=clients, weights=weights)


def played(
    subject: Subject, network: nn.Module, *, mode: NormMode, clients: int, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Updates of clients who do what a subject says.

    Each has images of some classes, from one to all of them, as real clients do. They are drawn with
    replacement: without it, clients of few images would be too much alike.

    Args:
        subject: What they do.
        network: What they receive; not changed.
        mode: Of the norms.
        clients: How many.
        generator: Draws their images.

    Yields:
        The gradient, or (before − after) / lr; with a function that trains, before − after.

    Raises:
        DataError: One cannot be played.
    """
    model = subject.classifier(copy.deepcopy(network))
    for _ in range(clients):
        images, labels = _drawn(subject, generator)
        try:
            yield _update(subject, network, model, images, labels, mode)
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{subject.name}: a client with {len(images)} images cannot be played in {mode} mode "
                f"({type(error).__name__}: {printable(str(error))}). Correct the subject's procedure, "
                "images_per_client or norm_mode."
            ) from error


def _update(
    subject: Subject, network: nn.Module, model: nn.Module, images: Tensor, labels: Tensor, mode: NormMode
) -> dict[str, Tensor]:
    if isinstance(subject.procedure, Procedure):
        return local_update(model, images, labels, train_mode=mode == "train", local=subject.procedure)
    client = copy.deepcopy(network)
    subject.procedure(client, subject.inputs(images), labels)
    return difference(trained_parameters(network), dict(client.named_parameters()), lr=1.0)


def _drawn(subject: Subject, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    present = torch.tensor(sorted(set(subject.labels.tolist())))
    count = int(torch.randint(1, len(present) + 1, (1,), generator=generator))
    classes = present[torch.randperm(len(present), generator=generator)[:count]]
    pool = torch.isin(subject.labels, classes).nonzero().flatten()
    chosen = pool[torch.randint(len(pool), (subject.images_per_client,), generator=generator)]
    return subject.images[chosen], subject.labels[chosen]


def _has_modes(network: nn.Module) -> bool:
    """Whether norms use other statistics in train mode."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    return any(isinstance(module, kinds) and module.track_running_stats for module in network.modules())


def _other_steps(subject: Subject, factor: float) -> Subject | None:
    """The same with so many times the step size; None: of a single step that has no other direction."""
    how = subject.procedure
    if not isinstance(how, Procedure) or how.step_count(subject.images_per_client) == 1:
        return None
    return replace(subject, procedure=replace(how, lr=how.lr * factor))
