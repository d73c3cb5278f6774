"""A federated training, into a run directory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError
from torch import nn

from fedkl import rng
from fedkl.config import TrainConfig
from fedkl.configured import dataset_of, networks_of, prepared
from fedkl.curves import curves
from fedkl.data import Dataset, Subset
from fedkl.errors import ConfigError
from fedkl.federated import Checkpoints, Execution, Federation, RoundResult, server_fill_ins
from fedkl.norms import statistics_names
from fedkl.passphrases import default_passphrase
from fedkl.privacy import LedgerFile
from fedkl.run_records import Count, FillIn, Needed, Seconds, Share, Word
from fedkl.runs import RunDirectory, damaged_summary
from fedkl.study import Progress, begun, silent
from fedkl.validation import problems_of


def train(
    config: TrainConfig, *, out: Path, progress: Progress = silent, tensorboard: bool = False
) -> RunDirectory:
    """Runs a training; a finished one is left as it is, an interrupted one is continued.

    Args:
        config: The training.
        out: The run directory.
        progress: Called after each round.
        tensorboard: Whether its curves are written as TensorBoard events too.

    Raises:
        FedKLError: The configuration, the data or the folder is not usable.
    """
    with begun(config, out=out) as directory:
        if directory.summary is None:
            dataset = dataset_of(config.data)
            own = _prepared(config, dataset)
            _train(own, directory, dataset, progress, tensorboard=tensorboard)
    return directory


def restored(directory: RunDirectory) -> tuple[Federation, int]:
    """The federation of a training as its newest sound checkpoint has it, on the CPU.

    Nothing in the folder is changed. The training's images are needed: they say what network it has.

    Returns:
        The federation, and the number of rounds behind it.

    Raises:
        FedKLError: It is no training, has no checkpoint, or none that can be read, e.g. with this machine's
            passphrase; or its images are not there.
    """
    config = training_of(directory)
    dataset = dataset_of(config.data)
    own = _prepared(config, dataset)
    federation = _federation(own, networks_of(own, dataset)(0), dataset, Execution(workers=1))
    checkpoints = Checkpoints(directory.path / "checkpoints", passphrase=default_passphrase())
    rounds = checkpoints.restore(federation, going_on=False)
    if rounds is None:
        raise ConfigError(
            f"{directory.path}/checkpoints: no checkpoint here. What clients keep lies in these only."
        )
    return federation, rounds


def training_of(directory: RunDirectory) -> TrainConfig:
    """The training that a run directory is of.

    Raises:
        ConfigError: It is of something else.
    """
    config = directory.config
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{directory.path}: not a training, but '{config.type}'. Give one of fedkl train.")
    return config


def _prepared(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """With the defense as these images and networks need it."""
    return config.model_copy(update={"defense": prepared(config.defense, config=config, dataset=dataset)})


def _federation(config: TrainConfig, model: nn.Module, dataset: Dataset, execution: Execution) -> Federation:
    return Federation(
        model,
        defense=config.defense,
        dataset=dataset,
        training=config.training,
        seed=config.seed,
        execution=execution,
    )


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
            f"auxiliary: expected fewer than {len(dataset.test_images)}, the test images there are, got "
            f"{config.auxiliary}. So many of them are the server's, to use the model without a key. Give "
            "fewer, e.g. auxiliary=20, or more test images."
        )
    model = networks_of(config, dataset)(0)
    federation = _federation(config, model, dataset, config.execution)
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
    if (ledger := federation.ledger) is not None:
        LedgerFile(directory.path / "ledger.jsonl", delta=ledger.options.delta).keep(ledger, rounds=first)
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
            if federation.is_last(result.round) or perf_counter() - saved >= config.checkpoints.seconds:
                checkpoints.save(federation, round=done)
                saved = perf_counter()
            progress(done, total, _accuracy_note(result.accuracy))
    if records[-1]["accuracy"] is None:  # no privacy is left for the round that is evaluated
        records[-1] |= _evaluated(federation)
        checkpoints.save(federation, round=records[-1]["round"] + 1)  # with the statistics that it was with
        directory.restart_from([partition, *records])
    return records


def _evaluated(federation: Federation) -> dict[str, Any]:
    accuracies, local_accuracies = federation.evaluate()
    return {
        "accuracies": accuracies,
        "local_accuracies": local_accuracies,
        "accuracy": fmean(accuracies.values()),
        "local_accuracy": fmean(local_accuracies.values()) if local_accuracies else None,
    }


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
    if not federation.split.private_names or federation.aggregation.server_learns == "nothing":
        return []  # nothing to complete: no private tensors, or no model that the server could read
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
        "server_learns": federation.aggregation.server_learns,
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
        "lost_rounds": sum(bool(r.get("lost")) for r in rounds),
        "skipped_rounds": sum(not r["aggregated"] for r in rounds),
        "fill_ins": fill_ins,
        "privacy": _privacy(federation),
        "public_parameters": sum(p.numel() for p in federation.split.public_parameters().values()),
        "private_parameters": sum(p.numel() for p in federation.split.private_parameters().values()),
        "update_bytes": max(r["update_bytes"] for r in rounds),
        "seconds": seconds,
        "round_seconds": median(r["seconds"] for r in rounds),
    }


def _privacy(federation: Federation) -> dict[str, Any] | None:
    """What each client's rounds have spent; None where nothing is guaranteed."""
    ledger = federation.ledger
    if ledger is None:
        return None
    return {
        "delta": ledger.options.delta,
        "budget": ledger.options.budget,
        "protects": next(iter(ledger.costs.values())).protects,
        "epsilon": ledger.spent,
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


ORACLE = "mean-affine"
"""The completion that no server can have."""


class _Privacy(Needed):
    """What a training spent of its clients' privacy."""

    delta: Share
    budget: Annotated[float, Field(gt=0)] | None
    protects: Word
    epsilon: Annotated[dict[str, Annotated[float, Field(ge=0)]], Field(min_length=1)]


class _TrainSummary(Needed):
    """What the report takes from a training's summary; older runs lack what has a value here."""

    clients: Count
    rounds: Count
    accuracy: Share
    best_accuracy: Share
    accuracies: dict[str, Share]
    local_accuracy: Share | None = None
    fill_ins: list[FillIn]
    public_parameters: Count
    private_parameters: Count
    update_bytes: Count
    seconds: Seconds
    test_images: Count = 0
    classes: Count = 0
    statistics_shared: bool | None = None
    privacy: _Privacy | None = None
    dropped: Count = 0
    failed: Count = 0
    skipped_rounds: Count = 0


def training_summary(directory: RunDirectory) -> dict[str, Any] | None:
    """A training's summary, which has all that a report takes from it; None if the run was not finished.

    Raises:
        ConfigError: It is damaged, or of another experiment.
    """
    summary = directory.summary
    if summary is None:
        return None
    try:
        _TrainSummary.model_validate(summary)
        problems = _fill_in_problems(summary)
    except ValidationError as error:
        problems = problems_of(error)
    if problems:
        raise damaged_summary(directory, problems)
    return summary


def _fill_in_problems(summary: dict[str, Any]) -> list[str]:
    """A server can have all completions but the oracle; where there are any, it has one of its own."""
    arms = {fill_in["arm"] for fill_in in summary["fill_ins"]}
    return ["fill_ins: expected one that a server can have"] if arms == {ORACLE} else []
