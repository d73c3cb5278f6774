"""Speed and memory of federated training: against plain PyTorch, against Flower, of the lock, by clients.

    python benchmarks/training_speed.py round                        # a round against plain PyTorch: ≤ 1.15×
    python benchmarks/training_speed.py flower --flower-python PATH  # a whole run against Flower's: ≥ 5×
    python benchmarks/training_speed.py lock                         # with and without the lock: ≤ 3 %
    python benchmarks/training_speed.py memory                       # peak memory at 3 … 10,000 clients

Every part prints a table and one JSON line per result. The data is MNIST (`fedkl data fetch mnist`;
FEDKL_DATA names its folder), the model the LeNet of the paper, batches of 64. README.md says what is compared
and how to make the interpreter for Flower.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flower_app.launch import FlowerRunError, run_flower
from lock_overhead import overhead, resnet18
from plain_training import VARIANTS, PlainTraining, Variant
from torch import Tensor, nn

import fedkl
from fedkl.data import Dataset, DataSpec, load
from fedkl.defenses import Defense, KeyLock, NoDefense
from fedkl.federated import ConstantSchedule, Execution, FederatedTraining, Federation
from fedkl.models import build_model

SEED = 0
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SCENARIOS = {  # clients, samples of each, rounds, whether every round is evaluated
    "20x2000": (20, 2000, 3, False),
    "20x100": (20, 100, 8, False),
    "3x2000": (3, 2000, 5, True),
}


def lenet() -> nn.Module:
    """The initial model, the same for every side."""
    return build_model("lenet", channels=3, classes=10, seed=SEED, initialization="uniform")


def federation(
    dataset: Dataset,
    *,
    clients: int,
    rounds: int,
    model: nn.Module | None = None,
    defense: Defense | None = None,
    cohort: int | None = None,
    evaluated: bool = False,
    workers: int = 0,
) -> Federation:
    """The side of fedkl in every comparison: an epoch of SGD, lr 0.01, Nesterov momentum 0.9, batches of 64.

    Args:
        dataset: All of its training images are divided evenly.
        clients: Number of clients.
        rounds: Rounds that will be run.
        model: The initial model; LeNet if None.
        defense: None: undefended.
        cohort: Clients sampled each round; None: all.
        evaluated: Evaluate every round, else none.
        workers: Clients that train at once; 0: fedkl's own choice.
    """
    training = FederatedTraining(
        clients=clients,
        cohort=cohort,
        schedule=ConstantSchedule(),
        # The last round of a training is always evaluated: one more round, which is never run.
        rounds=rounds if evaluated else rounds + 1,
        eval_every=1 if evaluated else rounds + 1,
    )
    return Federation(
        lenet() if model is None else model,
        defense=NoDefense() if defense is None else defense,
        dataset=dataset,
        training=training,
        seed=SEED,
        execution=Execution(workers=workers),
    )


def first(dataset: Dataset, samples: int) -> Dataset:
    """The dataset with its first training samples only."""
    if samples > len(dataset.train_labels):
        raise SystemExit(f"{dataset.spec.name} has {len(dataset.train_labels)} images, {samples} are needed.")
    return Dataset(
        dataset.spec,
        train_images=dataset.train_images[:samples],
        train_labels=dataset.train_labels[:samples],
        test_images=dataset.test_images,
        test_labels=dataset.test_labels,
    )


def timed(run_round: Callable[[int], object], index: int) -> tuple[float, float]:
    """Wall seconds and CPU seconds (all threads of this process) of one round, and of nothing else."""
    wall, cpu = time.perf_counter(), time.process_time()
    run_round(index)
    return time.perf_counter() - wall, time.process_time() - cpu


def emit(part: str, **values: Any) -> None:
    """One JSON line, with the machine's load: the figures of a busy machine say little."""
    line = {"part": part, "cores": CORES, "load_1min": round(os.getloadavg()[0], 2), **values}
    print(json.dumps(line), flush=True)


# ------------------------------------------------------------------------------------------ a: plain PyTorch


def round_part(options: argparse.Namespace) -> None:
    """A round of fedkl and of the fastest plain loops, in turn.

    Timed: the whole of `Federation.run_round` without evaluation, and the whole of
    `PlainTraining.run_round`: shuffling, gathering the batches, training, averaging. Not timed: loading,
    building, the search for the fastest loops, and a first round of every side.
    """
    dataset = first(load("mnist"), options.clients * options.samples)
    torch.set_num_threads(CORES)
    ours = federation(dataset, clients=options.clients, rounds=options.rounds + 1, workers=options.workers)
    parts = [client.samples for client in ours.clients]
    rivals = [_plain(dataset, parts, variant) for variant in _fastest_variants(dataset, parts)]
    for side in (ours, *rivals):
        side.run_round(0)
    difference = _difference(rivals[0].state(), ours.server.state)
    times: list[list[tuple[float, float]]] = []
    for index in range(options.rounds):
        sides = [ours.run_round, *(rival.run_round for rival in rivals)]
        order = range(len(sides)) if index % 2 else reversed(range(len(sides)))
        row = {side: timed(sides[side], index + 1) for side in order}
        times.append([row[side] for side in range(len(sides))])
    print(f"{options.clients} clients × {options.samples} samples, {CORES} cores, {ours.workers} workers")
    print(f"{'':44}{'wall s':>9}{'fastest':>9}{'CPU s':>9}{'fedkl ÷':>9}{'fastest ÷':>11}")
    names = ["fedkl", *(f"plain: {rival.variant}" for rival in rivals)]
    ratios = []
    for side, name in enumerate(names):
        wall = [row[side][0] for row in times]
        ratio = statistics.median(row[0][0] / row[side][0] for row in times)
        quiet = min(row[0][0] for row in times) / min(wall)
        ratios.append((ratio, quiet))
        cpu = statistics.median(row[side][1] for row in times)
        print(
            f"{name:44}{statistics.median(wall):9.3f}{min(wall):9.3f}{cpu:9.3f}{ratio:9.2f}{quiet:11.2f}",
            flush=True,
        )
    print(f"Largest difference of a weight after one round: {difference:.1e}")
    emit(
        "round",
        clients=options.clients,
        samples=options.samples,
        workers=ours.workers,
        rounds=options.rounds,
        wall_s={name: [round(row[side][0], 4) for row in times] for side, name in enumerate(names)},
        cpu_s={name: [round(row[side][1], 4) for row in times] for side, name in enumerate(names)},
        ratio_median=round(max(ratio for ratio, _ in ratios[1:]), 3),
        ratio_of_fastest=round(max(quiet for _, quiet in ratios[1:]), 3),
        weight_difference=difference,
    )


def _fastest_variants(dataset: Dataset, parts: Sequence[Tensor], *, keep: int = 2) -> list[Variant]:
    """The fastest variant of every layout, and of these the `keep` fastest.

    Tried on a small part of the work: the fastest of three rounds after a first one.
    """
    small = [part[:640] for part in parts[: 2 * CORES]]
    best: dict[str, tuple[float, Variant]] = {}
    for variant in VARIANTS:
        rival = _plain(dataset, small, variant)
        rival.run_round(0)
        seconds = min(timed(rival.run_round, index)[0] for index in (1, 2, 3))
        print(f"tried {variant!s:44}{seconds:8.3f} s", file=sys.stderr, flush=True)
        if variant.layout not in best or seconds < best[variant.layout][0]:
            best[variant.layout] = (seconds, variant)
    return [variant for _, variant in sorted(best.values(), key=lambda pair: pair[0])[:keep]]


def _plain(dataset: Dataset, parts: Sequence[Tensor], variant: Variant) -> PlainTraining:
    return PlainTraining(
        lenet(),
        images=dataset.train_images,
        labels=dataset.train_labels,
        parts=parts,
        seed=SEED,
        variant=variant,
        cores=CORES,
    )


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other), "the plain loop trains other tensors than fedkl"
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# ------------------------------------------------------------------------------------------------ b: Flower


def flower_part(options: argparse.Namespace) -> None:
    """Whole runs in fresh processes, in turn: fedkl, and Flower by either of its ways to start a simulation.

    Timed: from before the first process is started until the command returned; imports, reading MNIST and
    Flower's start are inside. A steady round is the median of all but the first, which contains the start.
    """
    python = options.flower_python
    if python is None:
        print("Skipped: no interpreter with Flower. README.md says how to make one for --flower-python PATH.")
        return
    for name in options.scenarios:
        clients, samples, rounds, evaluated = SCENARIOS[name]
        config = {"clients": clients, "samples": samples, "rounds": rounds, "evaluate": evaluated}
        config["dataset"] = "mnist"
        runs: dict[str, list[dict[str, Any]]] = {"fedkl": [], "run_simulation": [], "flwr-run": []}
        for _ in range(options.repeats):
            runs["fedkl"].append(_fedkl_run(name))
            for engine in ("run_simulation", "flwr-run"):
                try:
                    result = run_flower(python, config, engine=engine, actors=CORES, timeout=options.timeout)
                except FlowerRunError as error:
                    raise SystemExit(str(error)) from error
                runs[engine].append(result)
        _report_runs(name, runs)


def _fedkl_run(scenario: str) -> dict[str, Any]:
    """One whole run of fedkl in a fresh process, timed as `run_flower` times Flower's."""
    start = time.perf_counter()
    result = _child("_train", scenario)
    return {"wall_s": time.perf_counter() - start, **result}


def _report_runs(scenario: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    wall = {name: statistics.median(run["wall_s"] for run in rows) for name, rows in runs.items()}
    steady = {
        name: statistics.median(second for run in rows for second in run["round_seconds"][1:])
        for name, rows in runs.items()
    }
    print(f"{scenario}: {'':24}{'wall s':>9}{'round s':>9}{'wall ÷':>9}{'round ÷':>9}{'accuracy':>10}")
    for name, rows in runs.items():
        accuracies = rows[-1]["accuracies"]
        accuracy = f"{accuracies[-1]:10.3f}" if accuracies else f"{'':>10}"
        ratios = f"{wall[name] / wall['fedkl']:9.2f}{steady[name] / steady['fedkl']:9.2f}"
        print(f"{name:33}{wall[name]:9.1f}{steady[name]:9.3f}{ratios}{accuracy}", flush=True)
    rivals = [name for name in runs if name != "fedkl"]
    emit(
        "flower",
        scenario=scenario,
        ratio_wall=round(min(wall[name] for name in rivals) / wall["fedkl"], 2),
        ratio_round=round(min(steady[name] for name in rivals) / steady["fedkl"], 2),
        runs=runs,
    )


def train_child(options: argparse.Namespace) -> None:
    """In a fresh process: one whole run of fedkl, for `flower_part`."""
    clients, samples, rounds, evaluated = SCENARIOS[options.scenario]
    torch.set_num_threads(CORES)
    begin = time.perf_counter()
    dataset = first(load("mnist"), clients * samples)
    loaded = time.perf_counter()
    ours = federation(dataset, clients=clients, rounds=rounds, evaluated=evaluated)
    built = time.perf_counter()
    seconds, accuracies = [], []
    for index in range(rounds):
        start = time.perf_counter()
        result = ours.run_round(index)
        seconds.append(time.perf_counter() - start)
        accuracies += [result.accuracy] if evaluated else []
    answer = {"load_s": loaded - begin, "build_s": built - loaded, "round_seconds": seconds}
    print(json.dumps({**answer, "accuracies": accuracies}))


def _child(*arguments: str) -> dict[str, Any]:
    """The JSON line that this script prints when it is run anew with these arguments."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # noqa: S603 (itself)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---------------------------------------------------------------------------------------------- c: the lock


def lock_part(options: argparse.Namespace) -> None:
    """Rounds and steps with the lock, against the norm-matched model that `lock.bake()` gives, in turn.

    Timed: `Federation.run_round` as a whole without evaluation (wall and CPU time, ratio of every pair); and
    a single training step (see `lock_overhead.py`), on one thread, in CPU time.
    """
    torch.set_num_threads(CORES)
    dataset = first(load("mnist"), options.clients * options.samples)
    print(f"{'':44}{'plain':>9}{'locked':>9}{'extra %':>9}{'CPU %':>9}")
    for layers in ("first", "all"):
        matched = fedkl.lock(lenet(), layers=layers).bake()
        sides = [
            federation(dataset, clients=options.clients, rounds=options.rounds + 1, model=model, defense=how)
            for model, how in ((matched, NoDefense()), (lenet(), KeyLock(layers=layers)))
        ]
        pairs = []
        for index in range(options.rounds + 1):
            order = (0, 1) if index % 2 else (1, 0)
            row = {side: timed(sides[side].run_round, index) for side in order}
            pairs.append((row[0], row[1]))
        pairs = pairs[1:]  # warm-up
        wall = statistics.median(locked[0] / plain[0] for plain, locked in pairs)
        cpu = statistics.median(locked[1] / plain[1] for plain, locked in pairs)
        plain_s, locked_s = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
        label = f"LeNet, {layers}: round of {options.clients}×{options.samples}, s"
        print(f"{label:44}{plain_s:9.3f}{locked_s:9.3f}{100 * (wall - 1):9.2f}{100 * (cpu - 1):9.2f}")
        emit("lock", unit="round", model="lenet", layers=layers, ratio_wall=wall, ratio_cpu=cpu)
    torch.set_num_threads(1)
    for name, model in (("lenet", lenet()), ("resnet18", resnet18())):
        for layers in ("first", "all"):
            lock, device = fedkl.lock(model, layers=layers), torch.device("cpu")
            steps = options.steps * (10 if name == "lenet" else 1)
            plain, locked, ratio = overhead(lock, steps=steps, batch=64, device=device)
            label = f"{name}, {layers}: step, ms of CPU time"
            print(f"{label:44}{1e3 * plain:9.2f}{1e3 * locked:9.2f}{'':9}{100 * (ratio - 1):9.2f}")
            emit("lock", unit="step", model=name, layers=layers, ratio_cpu=ratio)


# ------------------------------------------------------------------------------------------------ d: memory


def memory_part(options: argparse.Namespace) -> None:
    """Memory of a process by number of clients, a fresh process each; three of them train in a round.

    Measured: resident memory after a small warm-up federation (which brings in what PyTorch loads late),
    after the federation was built, and after two rounds; the peak is the process's maximum. Beside them what
    a client has to keep: its private state, key and sample indexes, and its momentum once it has trained.
    """
    columns = "".join(f"{name:>8}" for name in ("base", "data", "built", "trained", "peak"))
    print(f"{'MiB':18}{columns}{'bytes/client':>14}{'to keep':>9}")
    for defense in ("none", "keylock"):
        for clients in options.clients:
            row = _child("_memory", defense, str(clients))
            names = ("base", "data", "built", "trained", "peak")
            figures = "".join(f"{row[name] / 2**20:8.1f}" for name in names)
            print(f"{defense:9}{clients:9}{figures}{row['bytes_per_client']:14.0f}{row['kept']:9}")
            emit("memory", defense=defense, clients=clients, **row)


def memory_child(options: argparse.Namespace) -> None:
    """In a fresh process: one federation with two samples for each client, for `memory_part`."""
    torch.set_num_threads(CORES)
    defense = KeyLock() if options.defense == "keylock" else NoDefense()
    warm = federation(_synthetic(8), clients=4, cohort=3, rounds=1, defense=defense)
    warm.run_round(0)
    del warm
    dataset = _synthetic(2 * options.clients)
    gc.collect()
    base = _resident()
    start = time.perf_counter()
    ours = federation(dataset, clients=options.clients, cohort=3, rounds=2, defense=defense)
    seconds = time.perf_counter() - start
    built = _resident()
    for index in range(2):
        ours.run_round(index)
    trained = _resident()
    client = next((client for client in ours.clients if client.trained), ours.clients[0])
    private = sum(tensor.nbytes for tensor in client.private_state.values())
    key = 0 if client.key is None else client.key.reveal().nbytes
    answer = {
        "base": base,
        "data": 2 * options.clients * 32 * 32 * 4,
        "built": built,
        "trained": trained,
        "peak": max(_most_resident(), trained),  # the kernel updates the maximum late
        "bytes_per_client": (built - base) / options.clients,
        "kept": private + key + client.samples.nbytes,
        "kept_momentum": sum(t.nbytes for slots in client.optimizer_state.values() for t in slots.values()),
        "build_s": seconds,
    }
    print(json.dumps(answer))


def _synthetic(samples: int) -> Dataset:
    """Random images of one channel, repeated without memory, and ten test images."""
    spec = DataSpec(name="random", shape=(3, 32, 32), classes=10, mean=(0.5,) * 3, std=(0.3,) * 3)
    images = torch.rand(samples, 1, 32, 32).expand(-1, 3, -1, -1)
    labels = torch.arange(samples) % 10
    test = torch.rand(10, 3, 32, 32)
    return Dataset(
        spec, train_images=images, train_labels=labels, test_images=test, test_labels=torch.arange(10)
    )


def _resident() -> int:
    """Resident bytes of this process now; where there is no /proc, the most so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return _most_resident()


def _most_resident() -> int:
    """The most resident bytes of this process so far; the unit differs by system."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(required=True, metavar="PART")

    part = parts.add_parser("round", help="a round against plain PyTorch")
    part.add_argument("--clients", type=int, default=20)
    part.add_argument("--samples", type=int, default=2000, help="of each client")
    part.add_argument("--rounds", type=int, default=7, help="timed rounds")
    part.add_argument("--workers", type=int, default=0, help="0: fedkl's own choice")
    part.set_defaults(run=round_part)

    part = parts.add_parser("flower", help="a whole run against Flower's simulation")
    part.add_argument("--flower-python", type=Path, help="interpreter with Flower; without it: skipped")
    part.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    part.add_argument("--repeats", type=int, default=1)
    part.add_argument("--timeout", type=float, default=600.0, help="seconds of one Flower run")
    part.set_defaults(run=flower_part)

    part = parts.add_parser("lock", help="with and without the lock")
    part.add_argument("--clients", type=int, default=4)
    part.add_argument("--samples", type=int, default=2000, help="of each client")
    part.add_argument("--rounds", type=int, default=9, help="timed pairs of rounds")
    part.add_argument("--steps", type=int, default=10, help="timed pairs of steps")
    part.set_defaults(run=lock_part)

    part = parts.add_parser("memory", help="peak memory by number of clients")
    part.add_argument("--clients", type=int, nargs="+", default=[3, 100, 1000, 10_000])
    part.set_defaults(run=memory_part)

    part = parts.add_parser("_train")  # the fresh processes of `flower` and `memory`
    part.add_argument("scenario", choices=SCENARIOS)
    part.set_defaults(run=train_child)
    part = parts.add_parser("_memory")
    part.add_argument("defense", choices=("none", "keylock"))
    part.add_argument("clients", type=int)
    part.set_defaults(run=memory_child)

    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
