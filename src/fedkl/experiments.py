"""Runs an experiment into a run directory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

import fedkl
from fedkl import data, models, rng
from fedkl.auditing import MAIN_ARMS, Arm, TrialResult, attack_arms, standard_arms, trials_of
from fedkl.config import AttackConfig, DataConfig, TrainConfig
from fedkl.curves import curves
from fedkl.data import Dataset, Subset
from fedkl.errors import ConfigError, DataError, shown
from fedkl.federated import Checkpoints, Federation, RoundResult, server_fill_ins
from fedkl.files import exclusive
from fedkl.lockfile import default_passphrase
from fedkl.metrics import success_rate, summarize
from fedkl.norms import statistics_names
from fedkl.runs import RunDirectory

SUCCESS_DB = 30.0
"""PSNR from which an image counts as recovered."""

SSIM_SUCCESS = 0.6
"""SSIM from which an attack counts as successful, for the attack success rate."""


@runtime_checkable
class Progress(Protocol):
    """Where an experiment reports its progress."""

    def __call__(self, done: int, total: int, note: str, /) -> None:
        """`done` of `total` steps, and a short note on the last one."""


def _silent(done: int, total: int, note: str, /) -> None:
    return


def run(
    config: TrainConfig | AttackConfig,
    *,
    out: Path,
    progress: Progress = _silent,
    tensorboard: bool = False,
) -> RunDirectory:
    """Runs an experiment; a finished one is left as it is, an interrupted one is continued.

    Args:
        config: The experiment.
        out: The run directory.
        progress: Called after each step.
        tensorboard: Whether a training's curves are written as TensorBoard events too.

    Raises:
        FedKLError: The configuration, the data or the folder is not usable.
    """
    with exclusive(out):
        directory = RunDirectory.create(out, config=config, version=fedkl.__version__)
        if directory.summary is not None:
            return directory
        dataset = _dataset(config.data)
        config = _for_images(config, dataset.spec.shape)
        if isinstance(config, TrainConfig):
            _train(config, directory, dataset, progress, tensorboard=tensorboard)
        else:
            _attack(config, directory, dataset, progress)
    return directory


def _dataset(config: DataConfig) -> Dataset:
    """What an experiment trains on and attacks.

    Raises:
        DataError: It is not there, or has fewer images than are asked for.
    """
    dataset = data.load(config.name, root=config.root, size=config.size)
    kept: dict[str, Any] = {}
    for part, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        wanted = getattr(config, f"{part}_images")
        if wanted is None:
            continue
        if wanted > len(images):
            raise DataError(
                f"data.{part}_images: expected at most {len(images)}, the {part} images of {config.name}, "
                f"got {wanted}."
            )
        kept |= {f"{part}_images": images[:wanted], f"{part}_labels": labels[:wanted]}
    return replace(dataset, **kept)


def _for_images(
    config: TrainConfig | AttackConfig, shape: tuple[int, int, int]
) -> TrainConfig | AttackConfig:
    """The experiment with a defense that knows the images' shape, where it has to, and untrained models."""
    if isinstance(config, TrainConfig):
        return config.model_copy(update={"defense": config.defense.for_images(shape).for_untrained()})
    return config.model_copy(update={"lock": config.lock.for_images(shape).for_untrained()})


def _builder(config: TrainConfig | AttackConfig, dataset: Dataset) -> Callable[[int], nn.Module]:
    spec = dataset.spec

    def build(offset: int) -> nn.Module:
        model = models.build_model(
            config.model.name,
            channels=spec.shape[0],
            classes=spec.classes,
            seed=config.seed + offset,
            initialization=config.model.initialization,
            normalization=(spec.mean, spec.std) if config.model.standardize else None,
        )
        return model.to(config.device) if isinstance(config, AttackConfig) else model

    return build


def _train(
    config: TrainConfig,
    directory: RunDirectory,
    dataset: Dataset,
    progress: Progress,
    *,
    tensorboard: bool,
) -> None:
    if config.auxiliary >= len(dataset.test_images):
        raise ConfigError(
            f"auxiliary: expected fewer than {len(dataset.test_images)}, got {config.auxiliary}."
        )
    model = _builder(config, dataset)(0)
    federation = Federation(
        model,
        defense=config.defense,
        dataset=dataset,
        training=config.training,
        seed=config.seed,
        execution=config.execution,
    )
    records = _rounds(config, directory, federation, progress, tensorboard=tensorboard)
    directory.save_tensors("global", federation.server.state)
    start = perf_counter()
    fill_ins = _fill_ins(config, federation, model, dataset)
    for record in fill_ins:
        directory.append({"event": "fill-in", **record})
    seconds = records[-1]["elapsed"] + perf_counter() - start
    directory.finish(_train_summary(config, federation, dataset, records, fill_ins, seconds))


def _rounds(
    config: TrainConfig,
    directory: RunDirectory,
    federation: Federation,
    progress: Progress,
    *,
    tensorboard: bool,
) -> list[dict[str, Any]]:
    """Trains what is left to train; returns the records of all rounds.

    A round is in the results before it is in a checkpoint, so what the checkpoint lacks is repeated.
    """
    checkpoints = Checkpoints(
        directory.path / "checkpoints", passphrase=default_passphrase(), keep=config.checkpoints.keep
    )
    first = checkpoints.restore(federation)
    if first is None:
        checkpoints.save(federation, round=0)  # keys are born here: no later attempt may draw others
    first, total = first or 0, config.training.rounds
    records = _finished_rounds(directory, first)
    partition = {"event": "partition", "class_counts": federation.class_counts.tolist()}
    directory.restart_from([partition, *records])
    earlier = records[-1]["elapsed"] if records else 0.0
    start = saved = perf_counter()
    with curves(directory.path / "tensorboard", first=first, enabled=tensorboard) as plot:
        for result in federation.run(start=first):
            record = {"event": "round", **_round_record(result), "elapsed": earlier + perf_counter() - start}
            directory.append(record)
            records.append(record)
            with directory.writing():
                plot(record)
            done = result.round + 1
            if done == total or perf_counter() - saved >= config.checkpoints.seconds:
                checkpoints.save(federation, round=done)
                saved = perf_counter()
            progress(done, total, _accuracy_note(result.accuracy))
    return records


def _finished_rounds(directory: RunDirectory, first: int) -> list[dict[str, Any]]:
    """The records of all rounds before round `first`, which the checkpoint has behind it.

    Raises:
        ConfigError: One is missing, there twice or in another place.
    """
    if first == 0:
        return []  # whatever is there will be repeated
    rounds = [r for r in directory.results(continued=True) if r["event"] == "round" and r["round"] < first]
    if [record["round"] for record in rounds] != list(range(first)):
        raise ConfigError(
            f"{directory.path}/results.jsonl: expected the {first} rounds that the checkpoint has behind it, "
            f"each once and in order, got {len(rounds)}. Restore it, or remove the folder 'checkpoints' to "
            "start again."
        )
    return rounds


def _fill_ins(
    config: TrainConfig, federation: Federation, model: nn.Module, dataset: Dataset
) -> list[dict[str, Any]]:
    """The server's own model; the auxiliary images are drawn from the test images, and not tested on."""
    if not federation.split.private_names:
        return []
    images, labels = dataset.test_images, dataset.test_labels
    order = torch.randperm(len(labels), generator=rng.generator(config.seed, "auxiliary"))
    auxiliary, test = order[: config.auxiliary], order[config.auxiliary :].sort().values
    results = server_fill_ins(
        defense=config.defense,
        model=model,
        state=federation.server.state,
        split=federation.split,
        clients=federation.evaluated_clients(),
        auxiliary=(images[auxiliary].contiguous(), labels[auxiliary]),
        test=(Subset(images, test), labels[test]),
    )
    return [
        {"arm": r.arm, "statistics": r.statistics, "accuracy": r.accuracy, "auxiliary": r.auxiliary}
        for r in results
    ]


def _train_summary(
    config: TrainConfig,
    federation: Federation,
    dataset: Dataset,
    rounds: list[dict[str, Any]],
    fill_ins: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    last = rounds[-1]
    return {
        "type": "train",
        "defense": config.defense.type,
        "model": config.model.name,
        "dataset": config.data.name,
        "clients": config.training.clients,
        "rounds": len(rounds),
        "workers": federation.workers,
        "test_images": len(dataset.test_images),
        "classes": dataset.spec.classes,
        "accuracy": last["accuracy"],
        "local_accuracy": last["local_accuracy"],
        "best_accuracy": max((r["accuracy"] for r in rounds if r["accuracy"] is not None), default=None),
        "accuracies": last["accuracies"],
        "statistics_shared": _statistics_shared(federation),
        "dropped": sum(len(r["dropped"]) for r in rounds),
        "failed": sum(len(r["failed"]) for r in rounds),
        "skipped_rounds": sum(not r["aggregated"] for r in rounds),
        "fill_ins": fill_ins,
        "public_parameters": sum(p.numel() for p in federation.split.public_parameters().values()),
        "private_parameters": sum(p.numel() for p in federation.split.private_parameters().values()),
        "update_bytes": max(r["update_bytes"] for r in rounds),
        "seconds": seconds,
        "round_seconds": median(r["seconds"] for r in rounds),
    }


def _statistics_shared(federation: Federation) -> bool | None:
    """Whether norm statistics are sent; None where there are none."""
    split = federation.split
    names = {
        f"{name}.{statistic}"
        for name, module in split.model.named_modules()
        for statistic in statistics_names(module)
    }
    return bool(names & set(split.public_state())) if names else None


def _round_record(result: RoundResult) -> dict[str, Any]:
    return asdict(result) | {"accuracy": result.accuracy, "local_accuracy": result.local_accuracy}


def _accuracy_note(accuracy: float | None) -> str:
    return "" if accuracy is None else f"accuracy {100 * accuracy:.2f} %"


def chosen_arms(config: AttackConfig) -> tuple[Arm, ...]:
    """The arms that a configuration names; the lock and its controls if it names none.

    Raises:
        ConfigError: A name is unknown.
    """
    known = standard_arms(config.lock, labels=config.labels_known, auxiliary=config.auxiliary)
    arms = {arm.name: arm for arm in known}
    unknown = [name for name in config.arms if name not in arms]
    if unknown:
        named = ", ".join(map(shown, unknown[:10]))
        raise ConfigError(f"arms: unknown {named}. Choose from {', '.join(arms)}.")
    return tuple(arms[name] for name in config.arms or MAIN_ARMS)


def _attack(config: AttackConfig, directory: RunDirectory, dataset: Dataset, progress: Progress) -> None:
    arms = chosen_arms(config)
    trials = trials_of(dataset, trials=config.trials, batch_size=config.batch_size)
    records = _complete_trials(directory, arms, config)
    directory.restart_from(records)
    done = {record["trial"] for record in records}
    start = perf_counter()
    earlier = max((record["elapsed"] for record in records), default=0.0)
    total = len(arms) * len(trials)

    def keep(result: TrialResult) -> None:
        images, truth = result.reconstruction.images, trials[result.trial].images
        directory.save_pictures(result.arm, result.trial, reconstruction=images, truth=truth)
        record = result.to_dict() | {"labels": trials[result.trial].labels.tolist()}
        record |= {"elapsed": earlier + perf_counter() - start}
        directory.append(record)
        records.append(record)
        progress(len(records), total, result.arm)

    def show(evaluations: int, running: int) -> None:
        if evaluations % 20 == 0:
            progress(len(records), total, f"evaluation {evaluations}, {running} running")

    attack_arms(
        arms,
        attack=config.attack,
        build=_networks(config, dataset),
        dataset=dataset,
        trials=trials,
        skip=done,
        seed=config.seed,
        train_mode=config.norm_mode == "train",
        local=config.local,
        chunk=config.chunk,
        updates_per_client=config.updates_per_client,
        cohort=config.cohort,
        workers=_attack_workers(config),
        on_result=keep,
        on_evaluation=show,
    )
    directory.finish(_attack_summary(config, arms, records))


def _networks(config: AttackConfig, dataset: Dataset) -> Callable[[int], nn.Module]:
    """The network of each trial, or one for all of them."""
    build = _builder(config, dataset)
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
) -> list[dict[str, Any]]:
    """Records of an interrupted run whose client has all its trials, in all arms.

    The others are repeated: arms and trials of a client share a victim, whose key and lock layers are gone.

    Raises:
        ConfigError: A record is none of this experiment's, or there twice.
    """
    records = [record for record in directory.results(continued=True) if record["event"] == "trial"]
    places = Counter((record["arm"], record["trial"]) for record in records)
    own = {(arm.name, trial) for arm in arms for trial in range(config.trials)}
    sizes = {len(record["scores"]) for record in records} - {config.batch_size}
    if sizes or not places.keys() <= own or max(places.values(), default=1) > 1:
        raise ConfigError(
            f"{directory.path}/results.jsonl: expected each trial of this attack at most once in each arm, "
            f"with {config.batch_size} scores. Remove the lines that are not its own, or the whole file."
        )
    counts = Counter(trial // config.updates_per_client for _, trial in places)
    whole = len(arms) * config.updates_per_client
    return [record for record in records if counts[record["trial"] // config.updates_per_client] == whole]


def _attack_summary(
    config: AttackConfig, arms: tuple[Arm, ...], records: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "type": "attack",
        "attack": config.attack.type,
        "trials": config.trials,
        "batch_size": config.batch_size,
        "model": config.model.name,
        "dataset": config.data.name,
        "norm_mode": config.norm_mode,
        "local_steps": config.local.steps,
        "initialization": config.model.initialization,
        "arms": [
            arm_summary(
                arm,
                [r for r in records if r["arm"] == arm.name],
                updates_per_client=config.updates_per_client,
            )
            for arm in arms
        ],
        "seconds": max(record["elapsed"] for record in records),
    }


def arm_summary(arm: Arm, records: list[dict[str, Any]], *, updates_per_client: int = 1) -> dict[str, Any]:
    """What an arm is, and its figures over all its images."""
    about = {"name": arm.name, "description": arm.description, "knows": arm.knowledge.describe()}
    return about | arm_figures(records, updates_per_client=updates_per_client)


def arm_figures(records: list[dict[str, Any]], *, updates_per_client: int = 1) -> dict[str, Any]:
    """Figures over all images of some trials: failures count as images that were not recovered.

    Where clients send several updates, intervals of shares are by client: its images share its secrets.
    """
    scores = [score for record in records for score in record["scores"]]
    clients = None
    if updates_per_client > 1:
        clients = [record["trial"] // updates_per_client for record in records for _ in record["scores"]]
    rate = partial(success_rate, groups=clients)

    def values(name: str) -> list[float | None]:
        return [score[name] for score in scores]

    def flags(name: str) -> list[float | None]:
        return [None if score[name] is None else float(score[name]) for score in scores]

    figures: dict[str, Any] = {
        name: summarize(values(name)).to_dict()
        for name in ("psnr", "ssim", "mse", "correlation", "psnr_raw", "psnr_affine", "ssim_affine")
    }
    success = rate(values("psnr"), threshold=SUCCESS_DB)
    similar = rate(values("ssim"), threshold=SSIM_SUCCESS)
    identified = rate(flags("identified"), threshold=1.0)
    found = rate(flags("label_correct"), threshold=1.0)
    return {
        "scaling": records[0]["scaling"],
        "candidates": scores[0]["candidates"],
        "figures": figures,
        "success": success._asdict(),
        "ssim_success": similar._asdict(),
        "identified": identified._asdict(),
        "label_correct": found._asdict(),
        "evaluations": summarize([float(r["evaluations"]) for r in records]).to_dict(),
        "loss": summarize([r["loss"] for r in records]).to_dict(),
    }
