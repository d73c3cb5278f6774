"""Runs an experiment into a run directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

from torch import nn

import fedkl
from fedkl import data, models
from fedkl.auditing import Arm, TrialResult, attack_arms, standard_arms, trials_of
from fedkl.config import AttackConfig, TrainConfig
from fedkl.data import Dataset
from fedkl.errors import ConfigError
from fedkl.federated import Federation, RoundResult, server_fill_ins
from fedkl.metrics import success_rate, summarize
from fedkl.runs import RunDirectory

SUCCESS_DB = 30.0


@runtime_checkable
class Progress(Protocol):
    """Where an experiment reports its progress."""

    def __call__(self, done: int, total: int, note: str, /) -> None:
        """`done` of `total` steps, and a short note on the last one."""


def _silent(done: int, total: int, note: str, /) -> None:
    return


def run(config: TrainConfig | AttackConfig, *, out: Path, progress: Progress = _silent) -> RunDirectory:
    """Runs an experiment; a finished one is left as it is, an interrupted one is continued or repeated.

    Args:
        config: The experiment.
        out: The run directory.
        progress: Called after each step.

    Raises:
        FedKLError: The configuration, the data or the folder is not usable.
    """
    directory = RunDirectory.create(out, config=config, version=fedkl.__version__)
    if directory.summary is not None:
        return directory
    dataset = data.load(config.data.name, root=config.data.root)
    if isinstance(config, TrainConfig):
        _train(config, directory, dataset, progress)
    else:
        _attack(config, directory, dataset, progress)
    return directory


def _builder(config: TrainConfig | AttackConfig, dataset: Dataset) -> Callable[[int], nn.Module]:
    def build(offset: int) -> nn.Module:
        return models.build_model(
            config.model.name,
            channels=dataset.spec.shape[0],
            classes=dataset.spec.classes,
            seed=config.seed + offset,
            initialization=config.model.initialization,
        )

    return build


def _train(config: TrainConfig, directory: RunDirectory, dataset: Dataset, progress: Progress) -> None:
    if config.auxiliary >= len(dataset.test_images):
        raise ConfigError(
            f"auxiliary: expected fewer than {len(dataset.test_images)}, got {config.auxiliary}."
        )
    directory.restart_from([])
    start = perf_counter()
    model = _builder(config, dataset)(0)
    federation = Federation(
        model, defense=config.defense, dataset=dataset, training=config.training, seed=config.seed
    )
    rounds: list[RoundResult] = []
    for result in federation.run():
        rounds.append(result)
        directory.append({"event": "round", **_round_record(result)})
        progress(result.round + 1, config.training.rounds, _accuracy_note(result.accuracy))
    directory.save_tensors("global", federation.server.state)
    fill_ins = _fill_ins(config, federation, model, dataset)
    for record in fill_ins:
        directory.append({"event": "fill-in", **record})
    directory.finish(_train_summary(config, federation, dataset, rounds, fill_ins, perf_counter() - start))


def _fill_ins(
    config: TrainConfig, federation: Federation, model: nn.Module, dataset: Dataset
) -> list[dict[str, Any]]:
    """The server's own model; the auxiliary images are taken from the test images, and not tested on."""
    if not federation.split.private_names:
        return []
    aux, images, labels = config.auxiliary, dataset.test_images, dataset.test_labels
    results = server_fill_ins(
        defense=config.defense,
        model=model,
        state=federation.server.state,
        split=federation.split,
        clients=federation.clients,
        auxiliary=(images[:aux].contiguous(), labels[:aux]),
        test=(images[aux:], labels[aux:]),
    )
    return [
        {"arm": r.arm, "statistics": r.statistics, "accuracy": r.accuracy, "auxiliary": r.auxiliary}
        for r in results
    ]


def _train_summary(
    config: TrainConfig,
    federation: Federation,
    dataset: Dataset,
    rounds: list[RoundResult],
    fill_ins: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    evaluated = [r.accuracy for r in rounds if r.accuracy is not None]
    return {
        "type": "train",
        "defense": config.defense.type,
        "clients": config.training.clients,
        "rounds": len(rounds),
        "test_images": len(dataset.test_images),
        "classes": dataset.spec.classes,
        "accuracy": evaluated[-1],
        "best_accuracy": max(evaluated),
        "accuracies": rounds[-1].accuracies,
        "fill_ins": fill_ins,
        "public_parameters": sum(p.numel() for p in federation.split.public_parameters().values()),
        "private_parameters": sum(p.numel() for p in federation.split.private_parameters().values()),
        "update_bytes": rounds[-1].update_bytes,
        "seconds": seconds,
    }


def _round_record(result: RoundResult) -> dict[str, Any]:
    return {
        "round": result.round,
        "seconds": result.seconds,
        "accuracy": result.accuracy,
        "accuracies": result.accuracies,
        "update_bytes": result.update_bytes,
    }


def _accuracy_note(accuracy: float | None) -> str:
    return "" if accuracy is None else f"accuracy {100 * accuracy:.2f} %"


def chosen_arms(config: AttackConfig) -> tuple[Arm, ...]:
    """The arms that a configuration names; all of them if it names none.

    Raises:
        ConfigError: A name is unknown.
    """
    arms = {arm.name: arm for arm in standard_arms(config.lock, labels=config.labels_known)}
    unknown = [name for name in config.arms if name not in arms]
    if unknown:
        raise ConfigError(f"arms: unknown {', '.join(unknown)}. Choose from {', '.join(arms)}.")
    return tuple(arms[name] for name in config.arms or arms)


def _attack(config: AttackConfig, directory: RunDirectory, dataset: Dataset, progress: Progress) -> None:
    arms = chosen_arms(config)
    trials = trials_of(dataset, trials=config.trials, batch_size=config.batch_size)
    records = _complete_trials(directory, arms)
    directory.restart_from(records)
    done = {record["trial"] for record in records}
    start = perf_counter()
    earlier = max((record["elapsed"] for record in records), default=0.0)
    total = len(arms) * len(trials)

    def keep(result: TrialResult) -> None:
        place = f"reconstructions/{result.arm}-{result.trial}"
        truth = trials[result.trial].images
        directory.save_tensors(place, {"reconstruction": result.reconstruction.images, "truth": truth})
        record = result.to_dict() | {"elapsed": earlier + perf_counter() - start}
        directory.append(record)
        records.append(record)
        progress(len(records), total, result.arm)

    def show(evaluations: int, running: int) -> None:
        if evaluations % 20 == 0:
            progress(len(records), total, f"evaluation {evaluations}, {running} running")

    attack_arms(
        arms,
        attack=config.attack,
        build=_builder(config, dataset),
        dataset=dataset,
        trials=trials,
        skip=done,
        seed=config.seed,
        on_result=keep,
        on_evaluation=show,
    )
    directory.finish(_attack_summary(config, arms, records))


def _complete_trials(directory: RunDirectory, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Records of an interrupted run whose trial has all its arms.

    A trial that lacks one is repeated in all: its arms share a victim, whose key and lock layers are gone.
    """
    records = [record for record in directory.results() if record["event"] == "trial"]
    counts = Counter(record["trial"] for record in records)
    return [record for record in records if counts[record["trial"]] == len(arms)]


def _attack_summary(
    config: AttackConfig, arms: tuple[Arm, ...], records: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "type": "attack",
        "attack": config.attack.type,
        "trials": config.trials,
        "batch_size": config.batch_size,
        "initialization": config.model.initialization,
        "arms": [arm_summary(arm, [r for r in records if r["arm"] == arm.name]) for arm in arms],
        "seconds": max(record["elapsed"] for record in records),
    }


def arm_summary(arm: Arm, records: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm's figures over all its images: failures count as images that were not recovered."""
    scores = [score for record in records for score in record["scores"]]

    def values(name: str) -> list[float | None]:
        return [score[name] for score in scores]

    def flags(name: str) -> list[float | None]:
        return [None if score[name] is None else float(score[name]) for score in scores]

    figures: dict[str, Any] = {
        name: summarize(values(name)).to_dict()
        for name in ("psnr", "ssim", "mse", "correlation", "psnr_raw", "psnr_affine", "ssim_affine")
    }
    success = success_rate(values("psnr"), threshold=SUCCESS_DB)
    identified = success_rate(flags("identified"), threshold=1.0)
    found = success_rate(flags("label_correct"), threshold=1.0)
    return {
        "name": arm.name,
        "description": arm.description,
        "knows": arm.knowledge.describe(),
        "scaling": records[0]["scaling"],
        "candidates": scores[0]["candidates"],
        "figures": figures,
        "success": success._asdict(),
        "identified": identified._asdict(),
        "label_correct": found._asdict(),
        "evaluations": summarize([float(r["evaluations"]) for r in records]).to_dict(),
        "loss": summarize([r["loss"] for r in records]).to_dict(),
    }
