"""A whole run, from the start of Python to its end: fedkl's Federation against Flower, doing the same work.

20 clients × 100 images of the MNIST sample, 8 rounds of one local epoch each: LeNet, batches of 64, SGD with
Nesterov momentum, no evaluation. Either side is a fresh process, imports included, on one thread; the two
take turns, and the medians' ratio is reported, in wall and in CPU time. With --lock, fedkl's clients are
locked too, which Flower's are not.

    python benchmarks/whole_run.py --repeats 5

Flower's own simulation needs ray. Where ray is not installed, Flower's apps run in one process, by
fedkl.flower.in_process: neither ray nor a SuperLink is started, so that Flower's side takes less than its
simulation would.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CLIENTS, SAMPLES, ROUNDS, SEED = 20, 100, 8, 0
DATASET = "mnist-sample"


def train_with_fedkl(layers: str | None) -> dict[str, float]:
    """One whole run of fedkl in this process; when parts of it were done, in seconds of CPU time."""
    import torch

    torch.set_num_threads(1)
    parts = {"torch_s": time.process_time()}
    from fedkl.data import load
    from fedkl.defenses import KeyLock, NoDefense
    from fedkl.federated import ConstantSchedule, Execution, FederatedTraining, Federation
    from fedkl.models import build_model

    parts["imports_s"] = time.process_time()
    federation = Federation(
        build_model("lenet", channels=3, classes=10, seed=SEED, initialization="uniform"),
        defense=NoDefense() if layers is None else KeyLock(layers=layers),  # type: ignore[arg-type]
        dataset=load(DATASET),
        training=FederatedTraining(
            clients=CLIENTS,
            schedule=ConstantSchedule(),
            # The last round is always evaluated: one more, which is never run.
            rounds=ROUNDS + 1,
            eval_every=ROUNDS + 1,
        ),
        seed=SEED,
        execution=Execution(workers=1),
    )
    for index in range(ROUNDS):
        federation.run_round(index)
    return parts | {"end_s": time.process_time()}


def train_with_flower() -> dict[str, float]:
    """One whole run of the app in flower_app/ in this process."""
    import torch

    parts = {"torch_s": time.process_time()}
    sys.path.insert(0, str(Path(__file__).resolve().parent / "flower_app"))
    from fedkl_baseline.client_app import app as client_app  # type: ignore[import-not-found]
    from fedkl_baseline.server_app import federate  # type: ignore[import-not-found]
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

    torch.set_num_threads(1)
    parts["imports_s"] = time.process_time()
    server_app = ServerApp()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        config = {"clients": CLIENTS, "samples": SAMPLES, "rounds": ROUNDS, "evaluate": False}
        config |= {"dataset": DATASET, "result-file": str(result)}  # type: ignore[dict-item]

        @server_app.main()
        def serve(grid: Grid, context: Context) -> None:
            federate(grid, config)

        if has_ray():
            from flwr.simulation import run_simulation

            actors = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}}
            run_simulation(server_app, client_app, CLIENTS, backend_config=actors)
        else:
            from fedkl.flower.in_process import run_in_process

            run_in_process(server_app, client_app, clients=CLIENTS)
        rounds = len(json.loads(result.read_text())["round_seconds"])
    if rounds != ROUNDS:
        raise SystemExit(f"Flower ran {rounds} rounds, expected {ROUNDS}.")
    return parts | {"end_s": time.process_time()}


def has_ray() -> bool:
    """Whether Flower's own simulation can run."""
    return importlib.util.find_spec("ray") is not None


def run(side: str) -> dict[str, Any]:
    """A side in a fresh process: wall seconds, and CPU seconds of it and of what it waited for."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--side", side]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(  # noqa: S603 (itself)
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, **json.loads(done.stdout.splitlines()[-1])}


def compare(ours: str, repeats: int) -> None:
    """Prints the table and one JSON line."""
    sides = (ours, "flower")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for index in range(repeats + 1):  # the first fills the disk's cache, and does not count
        for side in sides if index % 2 else sides[::-1]:
            runs[side].append(run(side))
    runs = {side: rows[1:] for side, rows in runs.items()}
    how = "its simulation, on ray" if has_ray() else "in one process: ray is not installed"
    print(f"{CLIENTS} × {SAMPLES} images, {ROUNDS} rounds, {repeats} runs of each. Flower: {how}.")
    middle = {
        side: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for side, rows in runs.items()
    }
    print(f"{'':14}{'wall s':>9}{'CPU s':>9}{'torch':>9}{'imports':>9}{'the rest':>9}   CPU s of each run")
    for side, row in middle.items():
        parts = (row["torch_s"], row["imports_s"] - row["torch_s"], row["end_s"] - row["imports_s"])
        figures = "".join(f"{value:9.2f}" for value in (row["wall_s"], row["cpu_s"], *parts))
        each = " ".join(f"{one['cpu_s']:.2f}" for one in runs[side])
        print(f"{side:14}{figures}   {each}")
    ratio = {name: middle["flower"][name] / middle[ours][name] for name in ("wall_s", "cpu_s")}
    print(f"Flower ÷ fedkl: wall {ratio['wall_s']:.2f}, CPU {ratio['cpu_s']:.2f}")
    load = round(os.getloadavg()[0], 2)
    print(
        json.dumps({"part": "whole-run", "ray": has_ray(), "load_1min": load, "ratio": ratio, "runs": runs})
    )


def main() -> None:
    """Runs both sides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each side, after one that does not count"
    )
    parser.add_argument("--lock", choices=("first", "all"), help="lock these layers of fedkl's clients")
    sides = ("fedkl", "fedkl-first", "fedkl-all", "flower")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is None:
        compare(f"fedkl-{options.lock}" if options.lock else "fedkl", options.repeats)
    elif options.side == "flower":
        print(json.dumps(train_with_flower()))
    else:
        print(json.dumps(train_with_fedkl(options.side.partition("-")[2] or None)))


if __name__ == "__main__":
    main()
