"""How many of a client's images an attacker rebuilds, beside what it finds where nothing is hidden."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.attacking import Trial, TrialResult, attack_arms, observe, trials_of
from fedkl.attacking.floor import floor
from fedkl.attacking.grid import NotRun
from fedkl.attacking.results import broken, floor_shares, not_run, shares
from fedkl.attacking.verdict import SAFE_FROM
from fedkl.attacks import Refusal
from fedkl.attacks.memory import at_once, size_of
from fedkl.auditing.attackers import Attacker
from fedkl.auditing.clients import Clients
from fedkl.auditing.recognition import Pools
from fedkl.data import Dataset, DataSpec
from fedkl.defenses import Arm, own_arms
from fedkl.errors import AttackError, ConfigError, LockError, TrainingError, UpdateError, printable
from fedkl.metrics import match, summarize
from fedkl.protocol import Auxiliary, Knowledge, Procedure

SHOWN = 8
"""Pictures of a finding."""

FIRST_LOT = 2
"""Trials attacked before the clock is looked at; each later lot is twice as large."""

_COPIES = 4  # of an update: what is observed, in an attack's precision, and what the defense made of it


@dataclass(frozen=True, kw_only=True, eq=False)
class Rebuilt:
    """What one attacker made of some trials.

    Attributes:
        found: Shares ``success`` (recovered) and ``identified``, of the best of its guesses, how many
            ``updates`` were attacked, and on how many images it ``broke``; see
            `fedkl.attacking.results.shares`.
        floor: The same of a guess from the labels alone.
        control: The same of the attacker where nothing is hidden; None where nothing is hidden anyway.
        psnr: Median, in dB.
        ssim: Median.
        candidates: Images among which its own had to be identified.
        truth: Some originals, in [0, 1].
        images: What came out of each, as the attacker would show it, in [0, 1].
        cut_short: Whether the time was over before all trials were attacked.
    """

    found: dict[str, Any]
    floor: dict[str, Any]
    control: dict[str, Any] | None
    psnr: float | None
    ssim: float | None
    candidates: int
    truth: Tensor = field(repr=False)
    images: Tensor = field(repr=False)
    cut_short: bool = False


def dataset_of(clients: Clients, pools: Pools) -> Dataset:
    """A subject's images as attacks take them: the server's to learn from, the clients' to be attacked."""
    subject, own = clients.subject, pools.server
    channels, height, width = subject.images.shape[1:]
    return Dataset(
        spec=DataSpec(
            name=subject.name,
            shape=(channels, height, width),
            classes=subject.classes,
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
        ),
        train_images=own.images,
        train_labels=own.labels,
        test_images=pools.audited.images,
        test_labels=pools.audited.labels,
    )


def refusal(attacker: Attacker, clients: Clients, pools: Pools) -> Refusal | None:
    """Why an attacker does not begin with what these clients send, or breaks at that; None where it does.

    Raises:
        TrainingError: See `Clients.update`.
    """
    if not clients.subject.is_pictures:
        return _no("There are no pictures to rebuild: inputs are tokens.")
    looped = not isinstance(clients.procedure, Procedure)
    if looped and (attacker.replays or clients.sent is None):
        return _no(
            "It replays what a client does, which cannot be done with a function that trains. Describe it as "
            "a Procedure, or see the upper bounds."
        )
    if any(tensor.is_complex() for tensor in clients.network.parameters()):
        return _no("It computes with real numbers, and the network has complex parameters.")
    dataset = dataset_of(clients, pools)
    trial = _trials(clients, dataset, most=1)[0]
    arm = _arms(attacker, clients, dataset)[-1]
    own = Auxiliary(
        images=dataset.train_images[torch.arange(arm.knowledge.auxiliary)],
        labels=dataset.train_labels[: arm.knowledge.auxiliary],
        simulate=lambda images, labels: {},  # a refusal only asks whether there is something
        draw=dict,
    )
    victims = [clients.defense.prepare(clients.network) for _ in range(clients.exposure.clients)]
    try:
        observation = observe(
            victims[0],
            arm=arm,
            model=_network(clients),
            trial=trial,
            classes=clients.subject.classes,
            train_mode=clients.exposure.norm_mode == "train",
            local=None if looped else cast(Procedure, clients.procedure),
            auxiliary=own if attacker.own_images else None,
            others=victims[1:],
            generator=rng.generator(clients.seed, "planned"),
            sent=clients.sent.updates[0] if clients.sent else None,
        )
        return attacker.attack().refusal(observation)
    except (AttackError, ConfigError, LockError, TrainingError, UpdateError) as error:
        return _no(str(error))
    except Exception as error:  # the user's network runs in here: anything may be raised
        return Refusal(kind="broke", reason=f"{type(error).__name__}: {printable(str(error))}")


def work(attacker: Attacker, clients: Clients, pools: Pools) -> tuple[int, int]:
    """Updates of such a client that an attacker computes, about: in all, and before it looks at the clock."""
    count = _count(clients, most=attacker.images, there=len(pools.audited.images))
    first = next(_lots(count, most=count)) if attacker.attack().divisible else count
    guesses = len(_arms(attacker, clients, dataset_of(clients, pools)))
    whole, least = (guesses * (attacker.once + attacker.each * updates) for updates in (count, first))
    return whole, least


class _OverError(Exception):
    """The time is over in the middle of an attack."""


def rebuild(
    attacker: Attacker,
    clients: Clients,
    *,
    pools: Pools,
    enough: Callable[[], bool],
    over: Callable[[], bool] = lambda: False,
) -> Rebuilt | NotRun | None:
    """Attacks updates, a few first and then more as long as there is time.

    Args:
        attacker: Who.
        clients: Whose updates.
        pools: Whose images are whose.
        enough: Says after each lot whether to stop.
        over: Says at each step of an attack whether to give up the lot.

    Returns:
        What came out; or why nothing did; None where the time was over before.
    """

    def step(evaluations: int, running: int, done: float) -> None:
        if over():
            raise _OverError

    dataset, network = dataset_of(clients, pools), _network(clients)
    attack, arms, done = attacker.attack(), _arms(attacker, clients, dataset), 0
    together = () if attack.divisible else arms
    trials = _trials(clients, dataset, most=attacker.images, together=together)
    count = len(trials)
    found: list[TrialResult] = []
    refused: list[NotRun] = []
    with suppress(_OverError):
        for last in _lots(count, most=_fitting(clients, arms)) if attack.divisible else [count]:
            attack_arms(
                arms,
                attack=attack,
                build=lambda trial: network,
                dataset=dataset,
                trials=trials,
                seed=clients.seed,
                train_mode=clients.exposure.norm_mode == "train",
                local=clients.procedure if isinstance(clients.procedure, Procedure) else None,
                skip={*range(done), *range(last, count)},
                cohort=clients.exposure.clients,
                workers=os.cpu_count() or 1,
                sent=dict(enumerate(clients.sent.updates)) if clients.sent else None,
                on_result=found.append,
                on_refusal=refused.append,
                on_evaluation=step,
            )
            done = last
            if enough() or not found:
                break
    if not any(each.arm == arm.name for each in found for arm in arms if arm.control or len(arms) == 1):
        return refused[0] if refused else None
    figures = _figures(arms, found, refused, trials, dataset, clients.seed, attacker)
    return replace(figures, cut_short=done < count)


def _trials(clients: Clients, dataset: Dataset, *, most: int, together: Sequence[Arm] = ()) -> list[Trial]:
    """What is attacked; where all updates behind these arms are attacked at once, as many as fit."""
    count = _count(clients, most=most, there=len(dataset.test_images))
    if together:
        count = min(count, _fitting(clients, together))
    if clients.sent is None:
        return trials_of(dataset, trials=count, batch_size=clients.exposure.images_behind)
    return [
        Trial(
            index=index,
            places=tuple(places.tolist()),
            images=dataset.test_images[places],
            labels=dataset.test_labels[places],
        )
        for index, places in enumerate(clients.sent.places[:count])
    ]


def _count(clients: Clients, *, most: int, there: int) -> int:
    """Updates that are attacked: of about so many images at most, and one at least."""
    size = clients.exposure.images_behind
    count = max(1, min(most, there) // size)
    if most >= SAFE_FROM > count * size and (count + 1) * size <= there:
        count += 1  # with 96 of 100 images a verdict would say nothing
    return count


def _network(clients: Clients) -> nn.Module:
    """What clients receive, as attackers call it."""
    return clients.network if isinstance(clients.procedure, Procedure) else clients.view()


def _lots(count: int, *, most: int) -> Iterator[int]:
    """Ends of lots that grow, up to `most` each."""
    last = min(FIRST_LOT, most)
    while last < count:
        yield last
        last += min(last, most)
    yield count


def _fitting(clients: Clients, arms: Sequence[Arm]) -> int:
    """So many updates may be attacked at once, as far as they and the clients' networks take memory."""
    held = _COPIES + clients.exposure.clients
    return at_once(held * len(arms) * size_of(clients.network.parameters()))


def _arms(attacker: Attacker, clients: Clients, dataset: Dataset) -> list[Arm]:
    """The control, if there is something to hide, and what a server that knows the defense guesses."""
    own = own_arms(clients.defense)
    controls = dict.fromkeys(each.control for each in clients.guesses if each.control)
    arms = [*(own[name] for name in controls), *clients.guesses]
    auxiliary = min(attacker.own_images, len(dataset.train_images))
    granted = {arm.name: replace(arm.knowledge, labels=True, auxiliary=auxiliary) for arm in arms}
    return [replace(arm, knowledge=granted[arm.name]) for arm in arms]


def knew(attacker: Attacker, clients: Clients, pools: Pools) -> str:
    """What the attacker has beside model and update, in words."""
    own = min(attacker.own_images, pools.server_images)
    return Knowledge(labels=True, auxiliary=own).describe()


def _figures(
    arms: Sequence[Arm],
    found: Sequence[TrialResult],
    refused: Sequence[NotRun],
    trials: Sequence[Trial],
    dataset: Dataset,
    seed: int,
    attacker: Attacker,
) -> Rebuilt:
    by_arm = {arm.name: [each for each in found if each.arm == arm.name] for arm in arms}
    left_out, size = not_run(refused), len(trials[0].images)
    rates = {
        name: shares(
            [each.to_dict() for each in results],
            broke=broken(left_out, name) * size,
        )
        for name, results in by_arm.items()
        if results
    }
    guesses = [arm for arm in arms if arm.name in rates and (arm.control or len(arms) == 1)]
    # Of several guesses the best counts, which is to the attacker's advantage.
    best = max(guesses, key=lambda arm: tuple(rates[arm.name][n]["rate"] for n in ("success", "identified")))
    results = by_arm[best.name]
    attacked = [trials[each.trial] for each in results]
    scalings = {each.reconstruction.scaling for each in results}
    known = floor(dataset, attacked, seed=seed, auxiliary=attacker.own_images, scalings=scalings)
    guessed = [{"trial": trial.index, "scores": [one.to_dict() for one in scores]} for trial, scores in known]
    scores = [score.to_dict() for each in results for score in each.scores]
    return Rebuilt(
        found=rates[best.name],
        floor=floor_shares(guessed),
        control=rates.get(best.control or ""),
        psnr=summarize([score["psnr"] for score in scores]).median,
        ssim=summarize([score["ssim"] for score in scores]).median,
        candidates=results[0].scores[0].candidates,
        truth=torch.cat([trial.images for trial in attacked])[:SHOWN],
        images=torch.cat([_shown(each, trials[each.trial]) for each in results])[:SHOWN],
    )


def _shown(result: TrialResult, trial: Trial) -> Tensor:
    """What came out of each of a trial's images, in their order; gray where nothing did."""
    found = match(result.reconstruction.images, trial.images, scaling=result.reconstruction.scaling)
    return torch.where(found.failed[:, None, None, None], 0.5, found.scaled).float()


def _no(reason: str) -> Refusal:
    return Refusal(kind="does not apply", reason=reason)
