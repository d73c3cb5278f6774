"""An attack, into a run directory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from fedkl.attacking.floor import floor
from fedkl.attacking.grid import NotRun, TrialResult, attack_arms
from fedkl.attacking.observing import Trial, trials_of
from fedkl.attacking.reconstructions import save_reconstruction
from fedkl.attacking.results import VERSION, arm_summary, broken, floor_shares, not_run
from fedkl.attacking.views import chosen_arms
from fedkl.config import AttackConfig
from fedkl.configured import dataset_of, networks_of, prepared
from fedkl.data import Dataset
from fedkl.defenses import Arm
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import Scaling
from fedkl.runs import RunDirectory
from fedkl.study import Progress, begun, silent


def attack(config: AttackConfig, *, out: Path, progress: Progress = silent) -> RunDirectory:
    """Runs an attack; a finished one is left as it is, an interrupted one is continued.

    Args:
        config: The attack.
        out: The run directory.
        progress: Called after each step.

    Raises:
        FedKLError: The configuration, the data or the folder is not usable.
    """
    with begun(config, out=out) as directory:
        if directory.summary is None:
            dataset = dataset_of(config.data)
            _attack(config, directory, dataset, progress)
    return directory


def _attack(config: AttackConfig, directory: RunDirectory, dataset: Dataset, progress: Progress) -> None:
    arms = tuple(
        replace(arm, defense=prepared(arm.defense, config=config, dataset=dataset))
        for arm in chosen_arms(config)
    )
    trials = trials_of(dataset, trials=config.trials, batch_size=config.batch_size)
    kept = _Kept(directory, trials, arms, config, progress)
    attack_arms(
        arms,
        attack=config.attack,
        build=_networks(config, dataset),
        dataset=dataset,
        trials=trials,
        skip=kept.done,
        seed=config.seed,
        train_mode=config.norm_mode == "train",
        local=config.local,
        chunk=config.chunk,
        updates_per_client=config.updates_per_client,
        cohort=config.cohort,
        workers=_attack_workers(config),
        on_result=kept.keep,
        on_refusal=kept.note,
        on_evaluation=kept.show,
    )
    kept.close()
    scalings = {record["scaling"] for record in kept.records}
    guesses = _floor_records(config, directory, dataset, trials, scalings)
    directory.finish(_attack_summary(config, arms, kept.records, kept.left_out, guesses))


class _Kept:
    """What came of the trials: on disk as it comes, and shown.

    Args:
        directory: Where an interrupted run left trials, and where these go.
        trials: All.
        arms: All.
        config: The attack.
        progress: Called after each step.

    Attributes:
        records: Of trials that were attacked.
        left_out: Those that came to none.
        done: Numbers of the trials that an earlier run did.
    """

    def __init__(
        self,
        directory: RunDirectory,
        trials: Sequence[Trial],
        arms: Sequence[Arm],
        config: AttackConfig,
        progress: Progress,
    ) -> None:
        self._directory, self._trials, self._progress = directory, trials, progress
        self.records, self.left_out = _complete_trials(directory, arms, config)
        directory.restart_from([*self.records, *(refused.to_dict() for refused in self.left_out)])
        self.done = {r["trial"] for r in self.records} | {refused.trial for refused in self.left_out}
        self._total, self._shown = len(arms) * len(trials), 0.0
        self._start = perf_counter()
        self._earlier = max((record["elapsed"] for record in self.records), default=0.0)
        self._pending: list[NotRun] = []

    def keep(self, result: TrialResult) -> None:
        """A trial that was attacked."""
        images, trial = result.reconstruction.images, self._trials[result.trial]
        save_reconstruction(
            self._directory, result.arm, trial=result.trial, reconstruction=images, truth=trial.images
        )
        record = result.to_dict() | {"labels": trial.labels.tolist()}
        record |= {"elapsed": self._earlier + perf_counter() - self._start}
        self._directory.append(record)
        self.records.append(record)
        self._tell(0.0, result.arm)
        self._write_pending()

    def note(self, refused: NotRun) -> None:
        """A trial that came to none; written with the next result: a run of none leaves its folder free."""
        self.left_out.append(refused)
        self._pending.append(refused)

    def show(self, evaluations: int, running: int, done: float) -> None:
        """A step of the present batch."""
        self._tell(done, f"evaluation {evaluations}, {running} running")

    def close(self) -> None:
        """All trials were tried.

        Raises:
            AttackError: None was attacked.
        """
        if not self.records:
            raise AttackError(" ".join(dict.fromkeys(refused.reason for refused in self.left_out)))
        self._write_pending()

    def _tell(self, present: float, note: str) -> None:
        """Never goes back: the present batch's part is an estimate."""
        self._shown = max(self._shown, len(self.records) + len(self.left_out) + present)
        self._progress(self._shown, self._total, note)

    def _write_pending(self) -> None:
        while self._pending:
            self._directory.append(self._pending.pop(0).to_dict())


def _floor_records(
    config: AttackConfig,
    directory: RunDirectory,
    dataset: Dataset,
    trials: Sequence[Trial],
    scalings: Collection[Scaling],
) -> list[dict[str, Any]]:
    """What a server scores on the same images that looks at no update; kept with the results."""
    found = []
    known = floor(dataset, trials, seed=config.seed, auxiliary=config.auxiliary, scalings=scalings)
    for trial, scores in known:
        record = {
            "event": "floor",
            "trial": trial.index,
            "scores": [each.to_dict() for each in scores],
            "labels": trial.labels.tolist(),
        }
        directory.append(record)
        found.append(record)
    return found


def _networks(config: AttackConfig, dataset: Dataset) -> Callable[[int], nn.Module]:
    """The network of each trial, or one for all of them."""
    build = networks_of(config, dataset)
    if config.networks == "each":
        return build
    model = build(0)
    return lambda trial: model


def _attack_workers(config: AttackConfig) -> int:
    if config.device == "cuda":
        return 1
    return config.workers or os.cpu_count() or 1


def _complete_trials(
    directory: RunDirectory, arms: Sequence[Arm], config: AttackConfig
) -> tuple[list[dict[str, Any]], list[NotRun]]:
    """Records of an interrupted run whose client has all its trials, in all arms; what came to none apart.

    The others are repeated: arms and trials of a client share a victim, whose key and lock layers are gone.

    Raises:
        ConfigError: A record is none of this experiment's, or there twice.
    """
    kept = [r for r in directory.results(continued=True) if r["event"] in ("trial", "not-run")]
    places = Counter((record["arm"], record["trial"]) for record in kept)
    own = {(arm.name, trial) for arm in arms for trial in range(config.trials)}
    sizes = {len(record["scores"]) for record in kept if "scores" in record} - {config.batch_size}
    if sizes or not places.keys() <= own or max(places.values(), default=1) > 1:
        raise ConfigError(
            f"{directory.path}/results.jsonl: expected each trial of this attack at most once in each arm, "
            f"with {config.batch_size} scores. Remove the lines that are not its own, or the whole file."
        )
    counts = Counter(trial // config.updates_per_client for _, trial in places)
    whole = len(arms) * config.updates_per_client
    complete = [record for record in kept if counts[record["trial"] // config.updates_per_client] == whole]
    return (
        [record for record in complete if record["event"] == "trial"],
        [
            NotRun(arm=r["arm"], trial=r["trial"], kind=r["kind"], reason=r["reason"])
            for r in complete
            if r["event"] == "not-run"
        ],
    )


def _attack_summary(
    config: AttackConfig,
    arms: tuple[Arm, ...],
    records: list[dict[str, Any]],
    left_out: Sequence[NotRun],
    guesses: list[dict[str, Any]],
) -> dict[str, Any]:
    together = config.updates_per_client
    attacked, left = {record["arm"] for record in records}, not_run(left_out)
    return {
        "type": "attack",
        "version": VERSION,
        "attack": config.attack.type,
        "trials": config.trials,
        "batch_size": config.batch_size,
        "model": config.model.name,
        "dataset": config.data.name,
        "norm_mode": config.norm_mode,
        "local_steps": config.local.step_count(config.batch_size // config.cohort),
        "initialization": config.model.initialization,
        "arms": [
            arm_summary(
                arm,
                [r for r in records if r["arm"] == arm.name],
                updates_per_client=together,
                broke=broken(left, arm.name) * config.batch_size,
            )
            for arm in arms
            if arm.name in attacked
        ],
        "floor": floor_shares(guesses),
        "not_run": left,
        "seconds": max(record["elapsed"] for record in records),
    }
