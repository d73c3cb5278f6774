"""What an audit will do: which attacker on which exposure, why not the others, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from time import process_time

from fedkl.auditing.attackers import PRESENCE, Attacker, available
from fedkl.auditing.clients import Clients, Sent
from fedkl.auditing.rebuilding import refusal, work
from fedkl.auditing.recognition import LOOKED_AT, Pools, check_enough, clients_of
from fedkl.auditing.results import Cause, Exposure, Masking, NotRun
from fedkl.auditing.subject import Subject
from fedkl.defenses import Defense, NoDefense
from fedkl.defenses.masked import MaskedUpload
from fedkl.errors import DataError, FedKLError, TrainingError, printable
from fedkl.protocol import Procedure

ONE_GRADIENT = Procedure()

CONTROL = "gradient-of-1"
"""The exposure on which an attacker that fails elsewhere must succeed to say anything."""

_CHEAP = 0.25
"""Share of the time; what takes longer does not come first, even on real clients."""

_SUM = 3  # clients whose sum a server sees at least, with pairwise masks


@dataclass(frozen=True, kw_only=True, eq=False)
class Planned:
    """One attacker on one exposure.

    Attributes:
        attacker: Who; None: the presence test.
        clients: Whose updates.
        seconds: Of one core, about; for as many images as it attacks at most.
        least: The same for as few as it attacks before it looks at the clock.
        obstacle: Why it is not run; None where it is.
        control_hides: Whether clients hide something on the control, too.
    """

    attacker: Attacker | None
    clients: Clients
    seconds: float
    least: float = 0.0
    obstacle: NotRun | None = field(default=None)
    control_hides: bool = False

    @property
    def name(self) -> str:
        """The attacker's."""
        return PRESENCE if self.attacker is None else self.attacker.name

    @property
    def exposure(self) -> Exposure:
        """What the server sees."""
        return self.clients.exposure


def exposures_of(
    subject: Subject, *, defense: Defense, masking: Masking, batch_sizes: Sequence[int], seed: int
) -> list[Clients]:
    """What is looked at: the subject's own clients, and upper bounds on what any client shows.

    Args:
        subject: Whose.
        defense: What clients do against a curious server.
        masking: Mode of masks over it, or ``"none"``.
        batch_sizes: Images behind single gradients, for the upper bounds.
        seed: Of what is drawn.
    """

    def clients(exposure: Exposure, **changed: object) -> Clients:
        given = {"procedure": subject.procedure, "defense": defense} | changed
        return Clients.of(subject, exposure=exposure, seed=seed, **given)  # type: ignore[arg-type]

    hidden = MaskedUpload(mode=masking) if masking != "none" else defense
    real = _real(subject)
    found = [clients(real, defense=hidden)]
    if masking == "pairwise":
        seen = {
            "name": f"sum-of-{_SUM}",
            "title": f"the sum of {_SUM} clients, {real.title}",
            "clients": _SUM,
        }
        found.append(clients(real.model_copy(update=seen)))
    upper = [
        _one_gradient(subject, size)
        for size in dict.fromkeys(batch_sizes)
        if not _is_gradient_of(subject, size)
    ]
    if subject.weights is not None:
        upper.append(_one_gradient(subject, 1, trained=False))
    one = _one_step(subject)
    return found + [clients(each, procedure=one, defense=hidden) for each in upper]


def _one_step(subject: Subject) -> Procedure:
    """What is sent after one step, in the units of what the subject's clients send.

    Noise and limits of a defense are in these units. Of Adam, whose first step is no multiple of a gradient,
    and of a function that trains, whose learning rate is not known: a gradient.
    """
    own = subject.procedure
    if isinstance(own, Procedure) and own.algorithm == "fedavg" and own.optimizer == "sgd":
        return replace(own, epochs=1, steps=1, batch_size=None, augmentation="none", proximal=0.0)
    return ONE_GRADIENT


def recorded_exposures_of(subject: Subject, sent: Sent, *, seed: int) -> list[Clients]:
    """What real clients sent, and the control.

    Args:
        subject: Whose.
        sent: By clients that did what the subject's do.
        seed: Of what is drawn.
    """
    count, real = len(sent.updates), _real(subject)
    seen = {"name": "recorded", "title": f"{count} recorded update{'s' * (count > 1)}, {real.title}"}
    open = NoDefense()
    recorded = Clients.of(
        subject,
        exposure=real.model_copy(update=seen),
        procedure=subject.procedure,
        defense=open,
        seed=seed,
    )
    control = Clients.of(
        subject, exposure=_one_gradient(subject, 1), procedure=ONE_GRADIENT, defense=open, seed=seed
    )
    return [replace(recorded, sent=sent), control]


def _real(subject: Subject) -> Exposure:
    size, images = subject.images_per_client, _images(subject.images_per_client)
    if not isinstance(subject.procedure, Procedure):
        steps, what = 0, f"your training loop on {images}"
    elif subject.procedure.is_gradient:
        steps, what = 1, f"one gradient of {images}"
    else:
        steps = subject.procedure.step_count(size)
        what = f"{steps} local step{'s' * (steps > 1)} on {images}"
    return Exposure(
        name="your-client",
        title=what,
        headline=True,
        trained=subject.weights is not None,
        images=size,
        steps=steps,
        norm_mode=subject.norm_mode,
    )


def _one_gradient(subject: Subject, size: int, *, trained: bool = True) -> Exposure:
    kind = "" if trained else ", untrained network"
    what = "one gradient of" if _one_step(subject).is_gradient else "one step on"
    return Exposure(
        name=f"gradient-of-{size}" if trained else "untrained",
        title=f"{what} {_images(size)}{kind}",
        headline=False,
        trained=trained and subject.weights is not None,
        images=size,
        steps=1,
        norm_mode=subject.norm_mode,
    )


def _images(size: int) -> str:
    return "one image" if size == 1 else f"{size} images"


def _is_gradient_of(subject: Subject, size: int) -> bool:
    """Whether that is what the real clients do."""
    own = isinstance(subject.procedure, Procedure) and subject.procedure.is_gradient
    return own and subject.images_per_client == size


def plan(
    exposures: Sequence[Clients],
    *,
    pools: Pools,
    within: float = math.inf,
    told: Callable[[str], None] = lambda text: None,
) -> list[Planned]:
    """Every attacker on every exposure, in the order in which they are run.

    Presence of real clients comes first, then the attackers of pictures on real clients from the cheapest
    on, then the attackers of pictures on upper bounds, then presence of these. Before real clients comes the
    attacker's control: it says whether the attacker can do anything at all. An attacker that takes more than
    a quarter of the time for its first real clients has its turn among the upper bounds.

    Args:
        exposures: See `exposures_of`.
        pools: Whose images are whose.
        within: Seconds that there are for all of it.
        told: Called with what is looked at.

    Raises:
        TrainingError: See `Clients.update`.
    """
    found = []
    for clients in exposures:
        told(clients.exposure.title)
        found += _on(clients, pools)
    hides = any(each.exposure.name == CONTROL and each.hides for each in exposures)
    found = [replace(each, control_hides=hides) for each in found]
    # Beside recorded updates the upper bound is a control only: of attackers that run on them.
    idle = {each.name for each in found if each.clients.sent is not None and each.obstacle is not None}
    found = [each for each in found if each.clients.sent is not None or each.name not in idle]
    order = {id(each): place for place, each in enumerate(found)}
    tried = [each for each in found if each.exposure.headline and each.obstacle is None]
    real = {each.name for each in tried if each.attacker is None or each.least <= _CHEAP * within}
    late = {each.name for each in tried} - real
    return sorted(
        found,
        key=lambda each: (
            not _is_of_real(each, real, late),
            _turn(each),
            each.exposure.name != CONTROL,
            not each.exposure.headline,
            order[id(each)],
        ),
    )


def _on(clients: Clients, pools: Pools) -> list[Planned]:
    """Every attacker on one exposure; none on an upper bound for which no client can train.

    Raises:
        TrainingError: What clients really do cannot be done.
    """
    exposure, subject = clients.exposure, clients.subject
    attackers: list[Attacker | None] = [None, *available()]
    try:
        seconds = _seconds_of_update(clients, pools)
    except (Exception, SystemExit) as error:  # the user's network and loop run in here
        said = f"{type(error).__name__}: {printable(str(error))}"
        if exposure.headline and isinstance(error, FedKLError):
            raise
        if exposure.headline:
            raise TrainingError(
                f"{subject.name}: a client cannot send {exposure.title} ({said}). Give a procedure, "
                "images_per_client and norm_mode with which the network trains."
            ) from error
        reason = f"No client of this network can send that. {said}"
        return [_idle(each, clients, kind="does not apply", reason=reason) for each in attackers]
    return [
        _presence(clients, pools, seconds) if each is None else _rebuilding(each, clients, pools, seconds)
        for each in attackers
    ]


def shortfalls(entries: Sequence[Planned]) -> list[str]:
    """What a plan cannot say of real clients for want of images, one sentence an exposure, with the remedy.

    Args:
        entries: See `plan`.
    """
    found = []
    for entry in entries:
        if entry.attacker is None and entry.exposure.headline and entry.obstacle is not None:
            same = [each for each in entries if each.exposure.name == entry.exposure.name]
            idle = all(each.obstacle is not None for each in same)
            what = "There will be no result" if idle else "Presence will not be tested"
            found.append(
                f"{what} for what your clients really send, {entry.exposure.title}. {entry.obstacle.reason}"
            )
    return found


def _is_of_real(entry: Planned, attackers: Collection[str], late: Collection[str]) -> bool:
    """Whether it is on real clients, in time, or the control of an attacker that is."""
    if entry.exposure.headline:
        return entry.name not in late
    return entry.exposure.name == CONTROL and entry.name in attackers


def _turn(entry: Planned) -> int:
    """Presence of real clients and its control first, that of other upper bounds after all pictures."""
    if entry.attacker is not None:
        return available().index(entry.attacker)
    return -1 if entry.exposure.headline or entry.exposure.name == CONTROL else len(available())


def _seconds_of_update(clients: Clients, pools: Pools) -> float:
    size = clients.exposure.images_behind
    images, labels = pools.audited.first(size)
    if len(images) < size:
        return 0.0
    clients.update(images, labels, number=0)  # the first one pays for what PyTorch loads once
    start = process_time()
    clients.update(images, labels, number=0)
    return process_time() - start


def _presence(clients: Clients, pools: Pools, seconds: float) -> Planned:
    exposure = clients.exposure
    count = clients_of(exposure.images_behind)
    lower = "images_per_client" if exposure.headline else "batch_sizes"
    try:
        check_enough(
            exposure.images_behind,
            pools,
            lower=lower if clients.sent is None else None,
            clients=exposure.clients,
        )
    except DataError as error:
        return _idle(None, clients, kind="does not apply", reason=str(error))
    hidden = 2 if clients.hides else 1  # the control is measured too
    looked_at = 2 * LOOKED_AT * seconds / exposure.images_behind
    whole = hidden * (2 * count * seconds + looked_at + 5) + clients.seconds_of_rounds(pools.own)
    return Planned(attacker=None, clients=clients, seconds=whole)


def _rebuilding(attacker: Attacker, clients: Clients, pools: Pools, seconds: float) -> Planned:
    exposure = clients.exposure
    size = exposure.images_behind
    if size > len(pools.audited.images):
        reason = f"There are only {len(pools.audited.images)} images of clients, {size} are in an update."
        return _idle(attacker, clients, kind="does not apply", reason=reason)
    refused = refusal(attacker, clients, pools)
    if refused is None:
        whole, least = (seconds * updates for updates in work(attacker, clients, pools))
        return Planned(attacker=attacker, clients=clients, seconds=whole, least=least)
    return _idle(attacker, clients, kind=refused.kind, reason=refused.reason)


def _idle(attacker: Attacker | None, clients: Clients, *, kind: Cause, reason: str) -> Planned:
    """An entry that is not run, and why."""
    entry = Planned(attacker=attacker, clients=clients, seconds=0.0)
    return replace(entry, obstacle=NotRun.of(entry.name, clients.exposure, kind=kind, reason=reason))
