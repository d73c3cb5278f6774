"""What it takes a new client to be as good as those that took part, and what a rotation costs.

    python benchmarks/enrollment.py --out runs/enroll --data mnist --model lenet --partition iid --rounds 30
    python benchmarks/enrollment.py --data cifar10 --model resnet20 --partition dirichlet --rounds 100

For each seed two federations are trained from the same start: without the last client, and with it. The last
client is then enrolled into the first one with 64, 256, 1024 and all of its images, and compared with (a) the
clients that took part and (b) itself, where it trains along. Then the first client's key is rotated, with γ
and β kept, and drawn anew. Every accuracy is of test images with the class frequencies of that client, as
`fedkl` evaluates clients. No test image is used for anything else.

Finished lines of results.jsonl are not run again, and a training goes on at its last checkpoint. `--summary`
only prints the table. Locks and checkpoints in the folder are toys, under a passphrase that is written here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.data import IID, Dataset, Dirichlet, load
from fedkl.defenses import KeyLock
from fedkl.enrollment import Fitting, enroll, rotate
from fedkl.federated import (
    ConstantSchedule,
    Execution,
    FederatedTraining,
    Federation,
    LocalTraining,
)
from fedkl.federated.checkpoint import Checkpoints
from fedkl.locking import recalibrate_norms_
from fedkl.metrics import class_accuracies
from fedkl.models import build_model

SIZES = (64, 256, 1024, 0)  # 0: all of its images
PASSPHRASE = "benchmark"  # noqa: S105 (nothing here is secret)


@dataclass(frozen=True, kw_only=True)
class Given:
    """A partition that was made before: each client's samples."""

    parts: tuple[Tensor, ...]
    type: str = "given"

    def split(self, labels: Tensor, *, clients: int, generator: torch.Generator) -> list[Tensor]:
        """As it was given."""
        assert len(self.parts) == clients
        return list(self.parts)


class Lines:
    """Results, one JSON object a line; what was finished is found again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def find(self, **where: Any) -> dict[str, Any] | None:
        """The line with these fields."""
        return next((row for row in self.rows if where.items() <= row.items()), None)

    def add(self, **row: Any) -> None:
        """Writes a line down."""
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One seed of one setting."""

    options: argparse.Namespace
    dataset: Dataset
    seed: int

    @property
    def name(self) -> dict[str, Any]:
        """What its lines say of it."""
        given = ("data", "model", "partition", "clients", "rounds", "images", "layers", "lr")
        return {name: getattr(self.options, name) for name in given} | {"seed": self.seed}

    @property
    def folder(self) -> Path:
        """Where its trainings are kept."""
        place = "-".join(str(value) for value in self.name.values())
        return self.options.out / place

    @property
    def defense(self) -> KeyLock:
        """Of all clients."""
        return KeyLock(layers=self.options.layers)

    def network(self) -> nn.Module:
        """With its initial weights."""
        spec, name = self.dataset.spec, self.options.model
        start: Any = {"initialization": "uniform"} if name == "lenet" else {}
        if name != "lenet":
            start["normalization"] = (spec.mean, spec.std)
        return build_model(name, channels=spec.shape[0], classes=spec.classes, seed=self.seed, **start)

    def parts(self) -> list[Tensor]:
        """Samples of every client; the last one's are those of the client that joins."""
        kind = Dirichlet(alpha=0.5, min_samples=64) if self.options.partition == "dirichlet" else IID()
        draws = rng.generator(self.seed, "partition")
        return kind.split(self.dataset.train_labels, clients=self.options.clients, generator=draws)

    def federation(self, clients: int) -> Federation:
        """The first so many clients, trained."""
        options = self.options
        training = FederatedTraining(
            clients=clients,
            rounds=options.rounds,
            partition=Given(parts=tuple(self.parts()[:clients])),  # type: ignore[arg-type]
            schedule=ConstantSchedule(),
            eval_every=options.rounds,
            norm_statistics="kept",  # `counted` says what recalibration gives
            local=LocalTraining(lr=options.lr, augmentation=options.augmentation),
        )
        federation = Federation(
            self.network(),
            defense=self.defense,
            dataset=self.dataset,
            training=training,
            seed=self.seed,
            execution=Execution(device=options.device),
        )
        checkpoints = Checkpoints(self.folder / f"clients-{clients}", passphrase=PASSPHRASE)
        first = checkpoints.restore(federation)
        if first is None:
            checkpoints.save(federation, round=0)
        for result in federation.run(start=first or 0):
            checkpoints.save(federation, round=result.round + 1)
        return federation

    def worth(self, model: nn.Module, part: Tensor) -> float:
        """Accuracy on test images with the class frequencies of these samples."""
        dataset, classes = self.dataset, self.dataset.spec.classes
        model = model.to(self.options.device)
        recalls = class_accuracies(model, dataset.test_images, dataset.test_labels, classes=classes)
        counts = torch.bincount(dataset.train_labels[part], minlength=classes).double()
        known = ~recalls.isnan()
        return float((recalls[known] * counts[known]).sum() / counts[known].sum())

    def mine(self, part: Tensor) -> dict[str, Any]:
        """Images and labels of these samples, on the device."""
        device = torch.device(self.options.device)
        return {
            "images": self.dataset.train_images[part].to(device),
            "labels": self.dataset.train_labels[part].to(device),
        }


def train(setting: Setting, lines: Lines) -> Federation:
    """Both federations; returns the one without the last client."""
    clients = setting.options.clients
    if lines.find(**setting.name, part="along") is None:
        along = setting.federation(clients)
        _, at_home = along.evaluate()
        others = [at_home[f"client-{index}"] for index in range(clients - 1)]
        lines.add(
            **setting.name,
            part="along",
            own=at_home[f"client-{clients - 1}"],
            others=statistics.fmean(others),
        )
    without = setting.federation(clients - 1)
    if lines.find(**setting.name, part="without") is None:
        _, at_home = without.evaluate()
        lines.add(**setting.name, part="without", others=statistics.fmean(at_home.values()))
    return without


def enrollments(setting: Setting, lines: Lines, federation: Federation) -> None:
    """The last client joins the first federation."""
    part = setting.parts()[-1]
    draws = rng.generator(setting.seed, "images of the client that joins")
    drawn = part[torch.randperm(len(part), generator=draws)]  # Dirichlet's parts are sorted by class
    public = {name: tensor.cpu() for name, tensor in federation.server.state.items()}
    for size in SIZES:
        count = len(part) if size == 0 else size
        if count > len(part) or lines.find(**setting.name, part="enrolled", asked=size) is not None:
            continue
        network = setting.network().to(setting.options.device)
        done = enroll(
            network,
            public=public,
            defense=setting.defense,
            fitting=Fitting(seed=setting.seed),
            **setting.mine(drawn[:count]),
        )
        own = setting.worth(done.lock.model, part)
        lines.add(
            **setting.name,
            part="enrolled",
            asked=size,
            n=count,
            own=own,
            steps=done.steps,
            seconds=done.seconds,
        )


def counted(setting: Setting, lines: Lines, federation: Federation) -> None:
    """The clients that took part, before and after they count their norms' statistics anew."""
    if lines.find(**setting.name, part="counted") is not None:
        return
    before, after = [], []
    for client in federation.clients:
        client.enter(federation.split, federation.server.state)
        lock = federation.split
        before.append(setting.worth(lock.model, client.samples))
        recalibrate_norms_(lock, setting.mine(client.samples)["images"])  # type: ignore[arg-type]
        after.append(setting.worth(lock.model, client.samples))
    means = {"before": statistics.fmean(before), "after": statistics.fmean(after)}
    lines.add(**setting.name, part="counted", **means)


def rotations(setting: Setting, lines: Lines, federation: Federation) -> None:
    """The first client gets another key."""
    client = federation.clients[0]
    for kept in (True, False):
        if lines.find(**setting.name, part="rotated", kept=kept) is not None:
            continue
        client.enter(federation.split, federation.server.state)
        lock = federation.split
        before = setting.worth(lock.model, client.samples)
        done = rotate(
            lock,  # type: ignore[arg-type]
            keep_function=kept,
            fitting=Fitting(seed=setting.seed),
            **setting.mine(client.samples),
        )
        after = setting.worth(done.lock.model, client.samples)
        lines.add(
            **setting.name,
            part="rotated",
            kept=kept,
            n=client.num_samples,
            before=before,
            after=after,
            steps=done.steps,
            seconds=done.seconds,
        )


def table(lines: Lines) -> None:
    """Means over the seeds."""
    fields = ("data", "model", "partition", "clients", "rounds", "images", "layers")
    settings = {tuple(row[name] for name in fields): None for row in lines.rows}
    for setting in settings:
        rows = [row for row in lines.rows if tuple(row[name] for name in fields) == setting]
        print("\n" + ", ".join(f"{name} {value}" for name, value in zip(fields, setting, strict=True)))
        print("| | accuracy at home | images | steps | seconds | seeds |\n|---|---|---|---|---|---|")
        show("clients that took part", [r for r in rows if r["part"] == "without"], "others")
        show("the same, statistics counted anew", [r for r in rows if r["part"] == "counted"], "after")
        show("the new client, trained along", [r for r in rows if r["part"] == "along"], "own")
        for size in SIZES:
            found = [r for r in rows if r["part"] == "enrolled" and r["asked"] == size]
            show(f"enrolled with {size or 'all'}", found, "own")
        for kept in (True, False):
            found = [r for r in rows if r["part"] == "rotated" and r["kept"] == kept]
            kind = "γ and β kept" if kept else "drawn anew"
            show(f"before rotation, {kind}", [{"before": r["before"]} for r in found], "before")
            show(f"after rotation, {kind}", found, "after")


def show(name: str, rows: list[dict[str, Any]], field: str) -> None:
    """One row of the table."""
    if not rows:
        return
    values = [100 * row[field] for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    others = [
        f"{statistics.fmean(row[each] for row in rows):.{digits}f}" if each in rows[0] else ""
        for each, digits in (("n", 0), ("steps", 0), ("seconds", 1))
    ]
    print(f"| {name} | {statistics.fmean(values):.2f}{spread} | {' | '.join(others)} | {len(rows)} |")


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/enrollment"))
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--partition", choices=["iid", "dirichlet"], default="iid")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=0, help="training images of all clients; 0: all")
    parser.add_argument("--layers", choices=["first", "all"], default="first")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--augmentation", default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--summary", action="store_true", help="print the table only")
    options = parser.parse_args()
    lines = Lines(options.out / "results.jsonl")
    if not options.summary:
        dataset = load(options.data)
        count = options.images or len(dataset.train_labels)
        dataset = Dataset(
            dataset.spec,
            train_images=dataset.train_images[:count],
            train_labels=dataset.train_labels[:count],
            test_images=dataset.test_images,
            test_labels=dataset.test_labels,
        )
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            setting = Setting(options=options, dataset=dataset, seed=seed)
            federation = train(setting, lines)
            enrollments(setting, lines, federation)
            rotations(setting, lines, federation)
            counted(setting, lines, federation)
    table(lines)


if __name__ == "__main__":
    main()
