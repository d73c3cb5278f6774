"""FedKL on Flower, deployed on loopback: SuperLink and SuperNodes as processes, TLS, node keys, kills.

    python benchmarks/flower_deployment.py rounds    # TLS and node keys; the same training in one process
    python benchmarks/flower_deployment.py wire      # no TLS: every byte is searched for private numbers
    python benchmarks/flower_deployment.py simulation    # Flower's simulation, where ray is installed
    python benchmarks/flower_deployment.py faults    # kill -9 of a client process, a node, the SuperLink
    python benchmarks/flower_deployment.py cost      # milliseconds per message, beside the plain Flower app

Prints one JSON line. docs/results/2026-11-flower.md has the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from flower_harness import PASSPHRASE, ROOT, Deployment, deployment
from torch import Tensor

import fedkl
from fedkl import lockfile
from fedkl.defenses import KeyLock
from fedkl.federated import ConstantSchedule, FederatedTraining, Federation, LocalTraining
from fedkl.flower import ClientStore, run_in_process
from fedkl.flower.round_files import RoundFiles

sys.path.insert(0, str(ROOT))

from fedkl_flower_example import client_app, server_app, task
from tests.locking.leaks import patterns, secrets_of

NODES = 3
_SCENARIOS = ("rounds", "simulation", "wire", "faults")


def main() -> None:
    """Runs one scenario in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scenario", choices=(*_SCENARIOS, "cost"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--images", type=int, default=6000, help="training images of all clients together")
    parser.add_argument("--seconds", type=float, default=1800, help="until a run is given up")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that processes are ended
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    config = {"dataset": arguments.dataset, "images": arguments.images, "timeout": 300.0}
    if arguments.scenario == "cost":
        from flower_cost import cost

        print(json.dumps(cost()))
        return
    scenario = globals()[arguments.scenario]
    with tempfile.TemporaryDirectory(prefix="fk") as folder:
        result = scenario(Path(folder), config, arguments.rounds, arguments.seconds)
    print(json.dumps({"scenario": arguments.scenario, **config, **result}))


def rounds(folder: Path, config: dict[str, Any], count: int, seconds: float) -> dict[str, Any]:
    """The same training three times, with the same keys: fedkl's trainer, one process, deployment."""
    new_locks(folder / "one")
    ours = trainer(folder / "one", config, count)
    with deployment(folder / "dep", nodes=NODES, tls=True) as deployed:
        share_locks(folder / "one", deployed)
        one = in_process(folder / "one", config, count)
        wall = deployed.finish(config, rounds=count, seconds=seconds)
        arrays = newest(deployed.checkpoints)
        history = deployed.history()
        moved = [
            distance(private(deployed.lock_file(node)), private(folder / "one" / f"client-{node}/lock.fedkl"))
            for node in range(NODES)
        ]
    return {
        "nodes": NODES,
        "rounds": count,
        "deployed_s": round(wall, 1),
        "accuracy_trainer": ours["accuracies"],
        "accuracy_in_process": accuracies(one["history"]),
        "accuracy_deployed": accuracies(history),
        "largest_difference": {
            "in process, trainer": distance(one["arrays"], ours["arrays"]),
            "deployed, in process": distance(arrays, one["arrays"]),
            "deployed locks, in process": max(moved),
        },
    }


def simulation(folder: Path, config: dict[str, Any], count: int, seconds: float) -> dict[str, Any]:
    """The same training in Flower's simulation and in one process, with the same keys."""
    new_locks(folder / "one")
    simulated = Deployment(folder / "sim", nodes=NODES, tls=False)
    shutil.copytree(folder / "one", simulated.store(0))
    try:
        one = in_process(folder / "one", config, count)
        wall = simulated.simulate(config, rounds=count, seconds=seconds)
        assert simulated.rounds() == count, simulated.log("run")[-3000:]
        return {
            "nodes": NODES,
            "rounds": count,
            "simulated_s": round(wall, 1),
            "accuracy_in_process": accuracies(one["history"]),
            "accuracy_simulated": accuracies(simulated.history()),
            "largest_difference": distance(newest(simulated.checkpoints), one["arrays"]),
        }
    finally:
        simulated.stop()


def wire(folder: Path, config: dict[str, Any], count: int, seconds: float) -> dict[str, Any]:
    """All that nodes and SuperLink say to each other, searched for every private tensor there ever was."""
    with deployment(folder, nodes=NODES, tls=False, record=True) as deployed, watched(deployed) as versions:
        deployed.finish(config, rounds=count, seconds=seconds)
        streams = [bytes(s) for r in deployed.recorders for s in [*r.sent, *r.received]]
        secrets = secrets_on_disk(versions)
        public = RoundFiles(deployed.checkpoints).newest()
    found = [name for name, tensor in secrets for form in patterns(tensor) if any(form in s for s in streams)]
    sent = [bytes(s) for r in deployed.recorders for s in r.sent]
    up = sum(map(len, sent))
    start = task.net().state_dict()
    seen = [name for name, tensor in start.items() if any(p in s for p in patterns(tensor) for s in streams)]
    assert public is not None
    return {
        "rounds": count,
        "bytes_sent_by_nodes": up,
        "bytes_received_by_nodes": sum(map(len, streams)) - up,
        "private_tensors": len(secrets),
        "lock_versions": len(versions),
        "private_found": found,
        "public_tensors": len(public.arrays),
        "initial_public_tensors_found": len(seen),
        "arrays_found_in_replies": sum(s.count(b"\x93NUMPY") for s in sent),
    }


def faults(folder: Path, config: dict[str, Any], count: int, seconds: float) -> dict[str, Any]:
    """Kills (-9) a client process in round 1, a node in round 2, the SuperLink in round 3; then goes on."""
    config = {**config, "timeout": 60.0, "fraction-evaluate": 0.0}
    with deployment(folder, nodes=NODES, tls=True) as deployed:
        run = deployed.run({**config, "rounds": count})
        deployed.wait(deployed.lock_file(0).exists, "node 0 to have its lock", seconds=seconds)
        deployed.kill_client(0)  # it has its model and trains
        deployed.wait(lambda: deployed.rounds() >= 1, "round 1", seconds=seconds)
        keys = {node: key_of(deployed, node) for node in range(NODES) if deployed.lock_file(node).exists()}
        deployed.wait(lambda: bool(deployed.client_processes(1)), "node 1 to train", seconds=seconds)
        deployed.kill("node-1")
        deployed.start_node(1)
        deployed.wait(lambda: deployed.rounds() >= 2, "round 2", seconds=seconds)
        deployed.wait(lambda: bool(deployed.client_processes(2)), "node 2 to train", seconds=seconds)
        deployed.kill("superlink")
        before = deployed.rounds()
        run.kill()
        deployed.start_link()
        for node in range(NODES):  # node keys are registered anew: the SuperLink keeps them in memory
            deployed.kill(f"node-{node}")
            deployed.start_node(node)
        deployed.finish(config, rounds=count, seconds=seconds)
        same = [torch.equal(key, key_of(deployed, node)) for node, key in keys.items()]
        losses = [v["loss"] for v in deployed.history()["train_metrics_clientapp"].values()]
        log = deployed.log("run")
        return {
            "rounds": count,
            "rounds_before_the_superlink_died": before,
            "rounds_in_the_end": deployed.rounds(),
            "resumed": f"Number of rounds: {count - before}" in log,
            "train_replies_and_failures": re.findall(
                r"aggregate_train: Received (\d+) results and (\d+)", log
            ),
            "keys_known_before": len(keys),
            "keys_unchanged": sum(same),
            "losses": [round(loss, 4) for loss in losses],
        }


def new_locks(store: Path) -> None:
    """Makes the clients' locks."""
    clients = ClientStore(store, passphrase=PASSPHRASE)
    for node in range(NODES):
        with clients.client(f"client-{node}", model=task.net(), defense=KeyLock()):
            pass


def share_locks(store: Path, deployed: Deployment) -> None:
    """Gives every node a copy of its client's lock."""
    for node in range(deployed.nodes):
        target = deployed.lock_file(node)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(store / f"client-{node}" / "lock.fedkl", target)


def in_process(store: Path, config: dict[str, Any], count: int) -> dict[str, Any]:
    """The example's apps in this process."""
    checkpoints = store.with_name("one-checkpoints")
    os.environ["FEDKL_PASSPHRASE"] = PASSPHRASE
    defaults = app_defaults()
    run_config = {**defaults, **config, "rounds": count, "checkpoints": str(checkpoints)}
    node_config = {"fedkl-store": str(store)}
    with contextlib.redirect_stdout(sys.stderr):
        run_in_process(
            server_app.app, client_app.app, clients=NODES, run_config=run_config, node_config=node_config
        )
    history = json.loads((checkpoints / "history.json").read_text())
    return {"history": history, "arrays": newest(checkpoints)}


def app_defaults() -> dict[str, Any]:
    """What the example's pyproject.toml says."""
    import tomllib

    text = (ROOT / "examples" / "flower" / "pyproject.toml").read_text(encoding="utf-8")
    return dict(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])


def trainer(store: Path, config: dict[str, Any], count: int) -> dict[str, Any]:
    """The federation of `fedkl train`, with the keys and private states of a store."""
    defaults = app_defaults()
    training = FederatedTraining(
        clients=NODES,
        rounds=count,
        schedule=ConstantSchedule(),
        local=LocalTraining(lr=defaults["lr"], batch_size=defaults["batch-size"]),
    )
    dataset = task.load(config["dataset"], images=config["images"])
    federation = Federation(
        task.net(), defense=KeyLock(), dataset=dataset, training=training, seed=defaults["seed"]
    )
    for node, client in enumerate(federation.clients):
        lock = fedkl.load_lock(store / f"client-{node}" / "lock.fedkl", task.net(), passphrase=PASSPHRASE)
        client.restore(key=lock.key, private_state=lock.private_state(), optimizer_state={}, rounds=0)
    accuracy = [round(result.accuracy or 0.0, 4) for result in federation.run()]
    return {"accuracies": accuracy, "arrays": federation.server.state}


def accuracies(history: dict[str, dict[str, dict[str, float]]]) -> list[float]:
    """By round."""
    return [round(v["accuracy"], 4) for v in history["evaluate_metrics_clientapp"].values()]


def newest(checkpoints: Path) -> dict[str, Tensor]:
    """The global arrays after the last round."""
    saved = RoundFiles(checkpoints).newest()
    assert saved is not None
    return dict(saved.arrays)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any two numbers."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def private(path: Path) -> dict[str, Tensor]:
    """All that a lock file holds."""
    return lockfile.read(path, kind="lock", passphrase=PASSPHRASE)[1]


def key_of(deployed: Deployment, node: int) -> Tensor:
    """A node's key."""
    return private(deployed.lock_file(node))["key"]


@contextlib.contextmanager
def watched(deployed: Deployment) -> Iterator[list[Path]]:
    """Copies of every version of every lock file that appears meanwhile."""
    copies: list[Path] = []
    seen: set[tuple[int, int]] = set()
    stop = Event()

    def look() -> None:
        for node in range(deployed.nodes):
            path = deployed.lock_file(node)
            if path.exists() and (node, path.stat().st_mtime_ns) not in seen:
                seen.add((node, path.stat().st_mtime_ns))
                copies.append(path.with_name(f"copy-{len(copies)}"))
                shutil.copy(path, copies[-1])

    def watch() -> None:
        while not stop.is_set():
            look()
            time.sleep(0.05)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield copies
    finally:
        stop.set()
        thread.join()
        look()


def secrets_on_disk(files: list[Path]) -> list[tuple[str, Tensor]]:
    """Every private tensor in these lock files: key, lock layers, norm statistics, γ and β, momentum."""
    found: list[tuple[str, Tensor]] = []
    for path in files:
        lock = fedkl.load_lock(path, task.net(), passphrase=PASSPHRASE)
        found += list(secrets_of(lock).items()) + [("memory", t) for t in private(path).values()]
    return [(name, tensor) for name, tensor in found if patterns(tensor)]


if __name__ == "__main__":
    main()
