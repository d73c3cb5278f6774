"""Updates that real clients sent, audited: which of their images are recognized and rebuilt from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from fedkl.auditing.clients import Sent
from fedkl.auditing.plan import Planned, recorded_exposures_of
from fedkl.auditing.recognition import FALSE_ALARMS, Pool, Pools, check_enough, first_copies, learn
from fedkl.auditing.recorded import RecordedUpdate, fits
from fedkl.auditing.results import Audit
from fedkl.auditing.run import run_all, settings_of
from fedkl.auditing.subject import Subject
from fedkl.errors import ConfigError, gathered
from fedkl.study import Progress, silent
from fedkl.types import NamedTensors

_DIGITS = 16  # of a hash: enough to tell audits apart
_SHOWN = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedClient:
    """A client whose update was recorded, and what it trained on.

    Attributes:
        update: What it sent.
        members: Its images: all of them, as places in `Subject.images`. They are the truth that an attack is
            held against, no attacker sees them.
    """

    update: RecordedUpdate
    members: Sequence[int] = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Suspected:
    """How much speaks for each of a subject's images having been trained on.

    Attributes:
        scores: Shape ``(updates, images)``.
        threshold: Under clients that are played, 1 % of the images reach it that were not trained on.
    """

    scores: Tensor = field(repr=False)
    threshold: float

    @property
    def recognized(self) -> Tensor:
        """How many images reach the threshold; shape ``(updates,)``."""
        return (self.scores >= self.threshold).sum(1)

    @property
    def by_chance(self) -> float:
        """How many would if none was trained on."""
        return FALSE_ALARMS * self.scores.shape[1]


def audit_recorded(
    subject: Subject,
    clients: Sequence[RecordedClient],
    *,
    out: Path | str,
    anyway: bool = False,
    minutes: float = 10.0,
    seed: int = 0,
    target: str | None = None,
    source: str | None = None,
    line: int | None = None,
    baseline: Audit | None = None,
    planned: Callable[[Sequence[Planned]], None] = lambda entries: None,
    progress: Progress = silent,
) -> Audit:
    """Audits what real clients sent; `fedkl.audit` does the same with clients that it simulates.

    The server's images, from which the tests and attacks learn, are those that no recorded client trained on.

    Args:
        subject: The network with the weights that the clients received, what they did with it, and images:
            theirs and others. With others fewer than five times those of a client, presence is not tested.
        clients: All of one round.
        out: The audit's folder; see `fedkl.audit`.
        anyway: Whether to go on where an update does not fit the subject.
        minutes: For the attackers.
        seed: Of everything that is drawn.
        target: As it was named, for reports; the subject's name if None.
        source: File of the target, for reports.
        line: Where in it the target begins.
        baseline: An earlier audit that this one will be held against; see `fedkl.audit`.
        planned: Called with the plan before the work.
        progress: Called with the share of the time that is used up, of 1, and what is done or was found.

    Raises:
        ConfigError: An update does not fit the subject, members are none of its images, an option is not
            usable, or the baseline or what the folder holds is of something else.
        DataError: The network does not fit the images, or clients cannot be played.
        TrainingError: A client cannot train.
    """
    if not 0 < 60 * minutes < math.inf:
        raise ConfigError(f"audit_recorded: expected minutes above 0 and no infinite number, got {minutes}.")
    _check_members(subject, clients, anyway=anyway)
    updates = _updates(subject, [each.update for each in clients], anyway=anyway, progress=progress)
    pools, places = _pools(subject, [each.members for each in clients], seed=seed)
    exposures = recorded_exposures_of(subject, Sent(updates=updates, places=places), seed=seed)
    kinds = {each.update.kind for each in clients}
    settings = settings_of(
        subject,
        exposures,
        target=target or subject.name,
        source=source,
        line=line,
        seed=seed,
        minutes=minutes,
        recorded=tuple(_digest(each) for each in clients),
        recorded_kind=kinds.pop() if len(kinds) == 1 else None,
        anyway=anyway,
    )
    return run_all(settings, exposures, pools, out=out, baseline=baseline, planned=planned, progress=progress)


def suspect(
    subject: Subject,
    updates: Sequence[RecordedUpdate],
    *,
    anyway: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Suspected:
    """The presence test where nobody says who was trained on: what it says is not held against the truth.

    The threshold is that of images under updates of played clients, because among the subject's images no
    one knows which are surely not the client's. Where many are, their scores are too low: fewer are
    recognized than by `audit_recorded`, and fewer than 1 % of the others.

    Args:
        subject: See `audit_recorded`.
        updates: What clients sent.
        anyway: Whether to go on where an update does not fit the subject.
        seed: Of everything that is drawn.
        progress: Called with what is done.

    Raises:
        ConfigError: An update does not fit the subject.
        DataError: There are too few images, or the network does not fit them.
        TrainingError: A client cannot train.
    """
    found = _updates(subject, updates, anyway=anyway, progress=progress)
    pools = Pools.of(subject.images, subject.labels, seed=seed)
    check_enough(subject.images_per_client, pools)
    clients = recorded_exposures_of(subject, Sent(updates=found, places=()), seed=seed)[0]
    progress(0, 1, "presence")
    test, played = learn(clients, pools=pools)
    images, labels = subject.images, subject.labels
    null, _ = test.both(played, kept_back=pools.kept_back, images=images[:1], labels=labels[:1])
    _, scores = test.both(found, kept_back=pools.kept_back, images=images, labels=labels)
    return Suspected(scores=scores, threshold=float(null.flatten().quantile(1 - FALSE_ALARMS)))


def _check_members(subject: Subject, clients: Sequence[RecordedClient], *, anyway: bool) -> None:
    """An image that is left out would be taken for one that nobody trained on: attacks then seem to fail."""
    last, problems = len(subject.images) - 1, []
    for each in clients:
        name, members = each.update.source, list(each.members)
        wrong = [place for place in members if not 0 <= place <= last]
        if not members:
            problems.append(f"{name}: no members")
        if wrong:
            problems.append(f"{name}: expected members from 0 to {last}, got {wrong[:_SHOWN]}")
        if len(set(members)) < len(members):
            problems.append(f"{name}: members are named twice")
        said = each.update.images
        expected = subject.images_per_client if said is None else said
        if 0 < len(members) < expected and not anyway:
            by = "Subject.images_per_client is" if said is None else "the update says"
            problems.append(
                f"{name}: expected {expected} members, as {by}, got {len(members)}; `--anyway` or "
                "anyway=True goes on"
            )
    others = len(subject.images) - len(set(chain.from_iterable(each.members for each in clients)))
    if not problems and clients and others < subject.classes:
        problems.append(f"only {others} images are of no recorded client, from which a server could learn")
    if not clients or problems:
        raise ConfigError(
            gathered(
                "Recorded clients: not usable.",
                problems or ["none is given"],
                "Name the places in Subject.images of the images that each client trained on, once each; "
                "give the subject other images beside them.",
            )
        )


def _updates(
    subject: Subject, recorded: Sequence[RecordedUpdate], *, anyway: bool, progress: Progress
) -> tuple[NamedTensors, ...]:
    """What attacks take, of each.

    Raises:
        ConfigError: One does not fit, and is not wanted anyway, or cannot be had.
    """
    found: list[Mapping[str, Tensor]] = []
    problems = []
    for each in recorded:
        progress(0, 1, f"does {each.source} fit?")
        fit = fits(subject, each)
        if fit.update is not None and (fit.fits or anyway):
            found.append(fit.update)
        else:
            problems += [f"{each.source}: {problem}" for problem in fit.problems]
    if problems:
        raise ConfigError(
            gathered(
                "The recorded updates do not fit the subject: attacks that fail would say nothing.",
                problems,
                "Correct these, see docs/recorded.md.",
            )
        )
    return tuple(found)


def _pools(
    subject: Subject, members: Sequence[Sequence[int]], *, seed: int
) -> tuple[Pools, tuple[Tensor, ...]]:
    """Whose images are whose; the audited ones begin with the members, each client's places among them."""
    first = list(dict.fromkeys(chain.from_iterable(members)))
    place = {member: index for index, member in enumerate(first)}
    # What is no member, nor a copy of one: that would be recognized as well, and counted as a false alarm.
    single = first_copies(torch.cat([subject.images[first], subject.images]))
    strangers = single[single >= len(first)] - len(first)
    others = Pools.of(subject.images[strangers], subject.labels[strangers], seed=seed)
    audited = Pool(
        images=torch.cat([subject.images[first], others.audited.images]),
        labels=torch.cat([subject.labels[first], others.audited.labels]),
    )
    places = tuple(torch.tensor([place[member] for member in each]) for each in members)
    return others._replace(audited=audited), places


def _digest(client: RecordedClient) -> str:
    """Tells the audit of one recording from that of another."""
    found = hashlib.sha256(repr(list(client.members)).encode())
    for name, tensor in sorted(client.update.tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().double().numpy().tobytes())
    return found.hexdigest()[:_DIGITS]
