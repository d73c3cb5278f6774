"""What it gives that clients recalibrate their norms' private statistics before they use the global model.

    python benchmarks/recalibration.py --out runs/recalibration --partition iid,dirichlet --seeds 3
    python benchmarks/recalibration.py --data mnist --model lenet --lr 0.05 --arms fedkl --most 64,256,1024

One training an arm, partition and seed. Each model that is looked at is evaluated twice: with the statistics
that clients' last training left ("kept"), and with those of their own training images (`recalibrate_norms_`),
over at most so many images (`--most`). Statistics change no weight: both are of one training. FedAvg's
are public, and have one way only. Accuracy is a mean over the clients, on the whole test set and with each
client's own class frequencies.

Finished lines of results.jsonl are not run again, and a training goes on at its last checkpoint. `--summary`
only prints the table. Checkpoints in the folder are toys, under a passphrase that is written here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedkl.data import IID, AnyPartition, Dataset, Dirichlet, Subset, load
from fedkl.defenses import Defense, KeyLock, NoDefense, PrivateNorm, PublicNorm
from fedkl.federated import Checkpoints, Execution, FederatedTraining, Federation, LocalTraining, StepSchedule
from fedkl.federated.client import Client
from fedkl.locking import recalibrate_norms_
from fedkl.metrics import class_accuracies
from fedkl.models import build_model

ARMS: dict[str, Defense] = {
    "fedavg": NoDefense(),
    "public-norm": PublicNorm(),
    "fedbn": PrivateNorm(),
    "fedkl": KeyLock(),
}
PARTITIONS: dict[str, AnyPartition] = {"iid": IID(), "dirichlet": Dirichlet(alpha=0.5, min_samples=64)}
PASSPHRASE = "benchmark"  # noqa: S105 (nothing here is secret)
SETTING = ("data", "model", "images", "test_images", "clients", "rounds", "lr", "augmentation")


def rows(path: Path) -> list[dict[str, Any]]:
    """What was finished."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def dataset(options: argparse.Namespace) -> Dataset:
    """The first so many images."""
    full = load(options.data)
    train, test = options.images or len(full.train_labels), options.test_images or len(full.test_labels)
    return Dataset(
        full.spec,
        train_images=Subset(full.train_images, slice(train)),
        train_labels=full.train_labels[:train],
        test_images=Subset(full.test_images, slice(test)),
        test_labels=full.test_labels[:test],
    )


def federation(options: argparse.Namespace, data: Dataset, arm: str, partition: str, seed: int) -> Federation:
    """Not trained yet."""
    spec = data.spec
    start: Any = {"initialization": "uniform"} if options.model == "lenet" else {}
    network = build_model(
        options.model,
        channels=spec.shape[0],
        classes=spec.classes,
        seed=seed,
        normalization=(spec.mean, spec.std),
        **start,
    )
    training = FederatedTraining(
        clients=options.clients,
        rounds=options.rounds,
        partition=PARTITIONS[partition],
        schedule=StepSchedule(),
        eval_every=options.rounds,
        norm_statistics="kept",
        local=LocalTraining(lr=options.lr, augmentation=options.augmentation),
    )
    execution = Execution(device=options.device, channels_last=options.model != "lenet")
    return Federation(
        network, defense=ARMS[arm], dataset=data, training=training, seed=seed, execution=execution
    )


def worth(run: Federation, client: Client, most: int | None) -> tuple[float, float]:
    """Accuracy on all test images and at home, with statistics of so many images; None: kept, 0: of all."""
    data, split = run.dataset, run.split
    client.enter(split, run.server.state)
    if most is not None:
        own = Subset(data.train_images, client.samples)
        recalibrate_norms_(split, own, most=most or len(own))
    recalls = class_accuracies(split.model, data.test_images, data.test_labels, classes=data.spec.classes)
    known = ~recalls.isnan()

    def weighted(labels: torch.Tensor) -> float:
        counts = torch.bincount(labels, minlength=data.spec.classes).double()[known]
        return float((recalls[known] * counts).sum() / counts.sum())

    return weighted(data.test_labels), weighted(data.train_labels[client.samples])


def measured(options: argparse.Namespace, run: Federation, *, private: bool) -> Iterator[dict[str, Any]]:
    """A line for each way in which clients may have their statistics."""
    ways: list[int | None] = [None, *options.most] if private else [None]
    for most in ways:
        found = [worth(run, client, most) for client in run.clients]
        whole, home = (statistics.fmean(values) for values in zip(*found, strict=True))
        yield {"most": most, "accuracy": whole, "at_home": home}


def cell(options: argparse.Namespace, data: Dataset, arm: str, partition: str, seed: int) -> None:
    """One training, evaluated every so many rounds."""
    name = {each: getattr(options, each) for each in SETTING}
    name |= {"arm": arm, "partition": partition, "seed": seed}
    path, folder = options.out / "results.jsonl", options.out / "-".join(map(str, name.values()))
    done = {row["round"] for row in rows(path) if name.items() <= row.items()}
    if options.rounds in done:
        return
    run = federation(options, data, arm, partition, seed)
    store = Checkpoints(folder, passphrase=PASSPHRASE)
    first = store.restore(run)
    if first is None:
        store.save(run, round=0)
    for round in range((first or 0) + 1, options.rounds + 1):
        seconds = run.run_round(round - 1).seconds
        if round not in done and (round % options.eval_every == 0 or round == options.rounds):
            lines = [
                name | {"round": round, "seconds": seconds} | line
                for line in measured(options, run, private=arm != "fedavg")
            ]
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
            print(*map(json.dumps, lines), sep="\n", flush=True)
        store.save(run, round=round)


def table(found: list[dict[str, Any]]) -> None:
    """Means over the seeds."""
    by = (*SETTING, "partition", "arm", "round", "most")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(tuple(row[each] for each in by), []).append(row)
    print("| setting | partition | arm | round | statistics | accuracy | at home | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for key, group in groups.items():
        *setting, partition, arm, round, most = key
        way = "public" if arm == "fedavg" else "kept" if most is None else f"of {most or 'all'}"
        values = " | ".join(mean([100 * row[each] for row in group]) for each in ("accuracy", "at_home"))
        cells = (" ".join(map(str, setting)), partition, arm, round, way, values, len(group))
        print(f"| {' | '.join(map(str, cells))} |")


def mean(values: list[float]) -> str:
    """With its standard deviation, where there is one."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/recalibration"))
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--arms", default="fedavg,fedbn,fedkl", help=", ".join(ARMS))
    parser.add_argument("--partition", default="iid", help=", ".join(PARTITIONS))
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--images", type=int, default=10_000, help="training images of all; 0: all there are")
    parser.add_argument("--test-images", type=int, default=2_000, help="0: all there are")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--augmentation", default="crop-flip")
    parser.add_argument("--most", default="1024", help="images for statistics, comma-separated; 0: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    options.most = [int(each) for each in options.most.split(",")]
    path = options.out / "results.jsonl"
    if not options.summary:
        options.out.mkdir(parents=True, exist_ok=True)
        data = dataset(options)
        for seed in range(options.seeds):
            for partition in options.partition.split(","):
                for arm in options.arms.split(","):
                    cell(options, data, arm, partition, seed)
    table(rows(path))


if __name__ == "__main__":
    main()
