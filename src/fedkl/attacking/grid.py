"""What a server could reconstruct: arms (defense × what the server knows) × trials, scored per image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from fedkl import rng
from fedkl.attacking.floor import candidates_of
from fedkl.attacking.lots import Pace, lots_of
from fedkl.attacking.networks import Networks
from fedkl.attacking.observing import Trial, observe
from fedkl.attacking.victims import OwnData, Victims
from fedkl.attacks import Attack, Reason, Reconstruction, RefusedError
from fedkl.data import Dataset
from fedkl.defenses import Arm
from fedkl.errors import AttackError, ConfigError, LockError, TrainingError, UpdateError
from fedkl.metrics import Candidates, Score, score
from fedkl.protocol import Observation, Procedure


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


@dataclass(frozen=True, kw_only=True)
class NotRun:
    """One trial of one arm that came to no reconstruction.

    Attributes:
        arm: The arm's name.
        trial: The trial's number.
        kind: ``"does not apply"``: the attack is not made for such an observation. ``"too large"``: it would
            need more memory than there is. ``"broke"``: it began, and failed halfway.
        reason: In one sentence.
    """

    arm: str
    trial: int
    kind: Reason
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"event": "not-run"} | asdict(self)


def attack_arms(
    arms: Sequence[Arm],
    *,
    attack: Attack,
    build: Callable[[int], nn.Module],
    dataset: Dataset,
    trials: Sequence[Trial],
    seed: int,
    train_mode: bool = True,
    local: Procedure | None = None,
    skip: Collection[int] = (),
    chunk: int = 20,
    updates_per_client: int = 1,
    cohort: int = 1,
    workers: int = 1,
    sent: Mapping[int, Mapping[str, Tensor]] | None = None,
    on_result: Callable[[TrialResult], None],
    on_refusal: Callable[[NotRun], None] | None = None,
    on_evaluation: Callable[[int, int, float], None] | None = None,
) -> None:
    """Attacks every trial in every arm.

    An arm that the attack does not apply to, and a trial on which it breaks, end neither the others nor the
    run.

    Arms with the same defense attack the same victim (same weights, same γ and β) in a trial; every arm uses
    the same images, model seeds and attack seeds. Observations of one kind are attacked as one batch, across
    arms. Trials that share a network share γ and β where these are public; those of a lot (`lots_of`) share
    what is learned of the server's own data too.

    Args:
        arms: The arms.
        attack: The attack.
        build: The plain model of a trial by the trial's number, the same object for the same network; it
            decides the device.
        dataset: Its test images are the candidates of the identification; of its training images the server
            has as many as an arm grants.
        trials: The trials, from the dataset's test images.
        seed: Of the attack's randomness. Keys and lock layers come from the operating system.
        train_mode: Whether the client's norms use the batch's statistics.
        local: The client's local steps; one if None.
        skip: Numbers of trials that are not attacked, e.g. those of an earlier, interrupted run.
        chunk: Trials attacked at once at most; all of them where one serves the others
            (`Attack.divisible`). See `lots_of`.
        updates_per_client: So many trials in a row are updates of one client, with the same secrets; the
            server knows which. They must share a network.
        cohort: So many clients share a trial's batch; the server sees the mean of their updates.
        workers: Threads that share a lot out; see `Attack.reconstruct_many`.
        sent: Recorded updates by trial, in place of simulated clients'; None: there are none.
        on_result: Called with each result.
        on_refusal: Called with each trial of an arm that came to none; None: the first one ends the run.
        on_evaluation: Called with (evaluations so far, problems still running, trials that are done in
            parts) of the present batch, the last an estimate.

    Raises:
        AttackError: A trial came to no reconstruction, and nobody is there to be told.
    """
    candidates, victims = candidates_of(dataset, trials), Victims()
    for lot in lots_of(trials, attack, chunk=chunk, workers=workers, updates_per_client=updates_per_client):
        group = [trial for trial in lot if trial.index not in skip]
        seen = _observed(
            arms,
            group,
            victims=victims,
            build=build,
            dataset=dataset,
            seed=seed,
            train_mode=train_mode,
            local=local,
            updates_per_client=updates_per_client,
            cohort=cohort,
            sent=sent or {},
            on_refusal=on_refusal,
        )
        batches: dict[Hashable, list[_Seen]] = {}
        for one in seen:
            batches.setdefault(one.observation.kind, []).append(one)
        for batch in batches.values():
            pace = on_evaluation and Pace(on_evaluation, trials=len(batch), most=attack.most_evaluations)
            for one, found in _attacked(batch, attack, seed=seed, workers=workers, progress=pace):
                if isinstance(found, Reconstruction):
                    on_result(_scored(one.arm, one.trial, found, candidates))
                elif isinstance(found, RefusedError):
                    _tell(on_refusal, one, found.refusal.kind, found.refusal.reason)
                else:
                    _tell(on_refusal, one, "broke", _said(found))


def _tell(told: Callable[[NotRun], None] | None, one: _Seen, kind: Reason, reason: str) -> None:
    if told is None:
        raise AttackError(f"{one.arm.name}, trial {one.trial.index + 1}: {reason}")
    told(NotRun(arm=one.arm.name, trial=one.trial.index, kind=kind, reason=reason))


def _attacked(
    batch: Sequence[_Seen],
    attack: Attack,
    *,
    seed: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[_Seen, Reconstruction | Exception]]:
    """Attacks a batch; where that breaks, each observation alone, so that one of them breaks alone."""
    try:
        found = attack.reconstruct_many(
            [one.observation for one in batch],
            generators=[rng.generator(seed, "attack", one.trial.index) for one in batch],
            on_evaluation=progress,
            workers=workers,
        )
    except _BREAKS as error:
        if len(batch) == 1 or not attack.divisible or isinstance(error, RefusedError):
            yield from ((one, error) for one in batch)
            return
    else:
        yield from zip(batch, found, strict=True)
        return
    for one in batch:
        yield from _attacked([one], attack, seed=seed, workers=1, progress=progress)


_BREAKS = (AttackError, ArithmeticError, MemoryError, RuntimeError, ValueError, IndexError)
"""What an attack raises that fails halfway: its own refusals, linear algebra, memory, shapes."""


def _said(error: Exception) -> str:
    """The first line of what an attack said when it broke."""
    text = " ".join((str(error) or "no reason given").splitlines()[0].split())
    return f"{type(error).__name__}: {text:.200}" if not isinstance(error, AttackError) else f"{text:.300}"


class _Seen(NamedTuple):
    """What the server has of one trial in one arm."""

    arm: Arm
    trial: Trial
    observation: Observation


def _observed(
    arms: Sequence[Arm],
    group: Sequence[Trial],
    *,
    victims: Victims,
    build: Callable[[int], nn.Module],
    dataset: Dataset,
    seed: int,
    train_mode: bool,
    local: Procedure | None,
    updates_per_client: int,
    cohort: int,
    sent: Mapping[int, Mapping[str, Tensor]],
    on_refusal: Callable[[NotRun], None] | None,
) -> list[_Seen]:
    """Observes every trial of a lot in every arm; arms with the same defense share a trial's victims."""
    models = {trial.index: build(trial.index) for trial in group}
    victims.begin(models)
    own = OwnData(dataset, seed=seed, train_mode=train_mode, local=local or Procedure(), cohort=cohort)
    networks = Networks()
    seen = []
    for arm, trial in itertools.product(arms, group):
        model = models[trial.index]
        public = arm.knowledge.affine_gradient  # γ and β belong to the network then, not to a client
        client = trial.index // updates_per_client
        try:
            drawn = victims.of(arm.defense, model, client=None if public else client, cohort=cohort)
            victim, *others = drawn * cohort if public else drawn
            observation = observe(
                victim,
                arm=arm,
                model=model,
                trial=trial.to(next(model.parameters()).device),
                classes=dataset.spec.classes,
                train_mode=train_mode,
                local=local,
                auxiliary=own.of(arm, victim, model),
                client=client if updates_per_client > 1 else None,
                others=others,
                generator=rng.generator(seed, "guessed", arm.name, trial.index),
                networks=networks,
                sent=sent.get(trial.index),
            )
        except (AttackError, ConfigError, LockError, TrainingError, UpdateError) as error:
            if on_refusal is None:
                raise
            on_refusal(NotRun(arm=arm.name, trial=trial.index, kind="does not apply", reason=_said(error)))
            continue
        seen.append(_Seen(arm, trial, observation))
    return seen


def _scored(arm: Arm, trial: Trial, reconstruction: Reconstruction, candidates: Candidates) -> TrialResult:
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
