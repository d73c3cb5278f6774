"""Masked sums deployed on loopback: SuperLink and SuperNodes as processes, TLS, node keys, kills.

    python benchmarks/flower_masked.py rounds --modes plain blind pairwise both
    python benchmarks/flower_masked.py faults --modes both    # kill -9 of a client between upload and reveal,
                                                              # of a SuperNode, of the SuperLink

Prints one JSON line a mode. docs/results/2026-11-masks.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from flower_deployment import accuracies, distance, new_locks, newest, share_locks
from flower_harness import PASSPHRASE, Deployment, deployment
from safetensors.torch import load_file

from fedkl.masking import MemberFile

NODES, WITH_KILLS = 3, 4  # with kills one node more: a sum needs three


def main() -> None:
    """Runs one scenario for every mode, in temporary folders, with the same keys and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scenario", choices=("rounds", "faults"))
    parser.add_argument("--modes", nargs="+", default=["plain", "blind", "pairwise", "both"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dataset", default="mnist-sample")
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1200, help="until a run is given up")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that processes are ended
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fk") as folder:
        locks = Path(folder) / "locks"
        new_locks(locks)
        models: dict[str, dict[str, torch.Tensor]] = {}
        for mode in options.modes:
            if options.scenario == "rounds":
                result = rounds(Path(folder), locks, mode, options, models)
            else:
                result = faults(Path(folder), mode, options)
            print(json.dumps(result), flush=True)


def rounds(
    folder: Path,
    locks: Path,
    mode: str,
    options: argparse.Namespace,
    models: dict[str, dict[str, torch.Tensor]],
) -> dict[str, Any]:
    """All rounds, undisturbed; the final model beside that of the plain sums."""
    config = {"dataset": options.dataset, "images": options.images, "timeout": 300.0}
    with started(folder, mode) as deployed:
        share_locks(locks, deployed)
        seconds = deployed.finish(config, rounds=options.rounds, seconds=options.seconds)
        finished(deployed, mode)
        models[mode] = model_of(deployed, mode)
        result: dict[str, Any] = {
            "mode": mode,
            "rounds": options.rounds,
            "seconds": round(seconds, 1),
            "accuracy_by_round": accuracies(deployed.history()),
        }
        if "plain" in models:
            result["largest_difference_to_plain"] = distance(models[mode], models["plain"])
        if mode != "plain":
            result |= masks_of(deployed)
        return result


def faults(folder: Path, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Kills (-9) in three rounds, then goes on to the end."""
    config = {
        "dataset": options.dataset,
        "images": options.images,
        "timeout": 90.0,
        "fraction-evaluate": 0.0,
        "min-replies": 3,
    }
    with started(folder, mode, nodes=WITH_KILLS) as deployed:
        run = deployed.run({**config, "rounds": options.rounds})
        told = [f"client of node 0 killed {kill_between(deployed, 0, options.seconds)}"]
        deployed.wait(lambda: deployed.rounds() >= 1, "round 1", seconds=options.seconds)
        deployed.wait(lambda: bool(deployed.client_processes(1)), "node 1 to work", seconds=options.seconds)
        deployed.kill("node-1")
        deployed.start_node(1)
        told.append("SuperNode 1 killed in round 2")
        deployed.wait(lambda: deployed.rounds() >= 2, "round 2", seconds=options.seconds)
        deployed.wait(lambda: bool(deployed.client_processes(2)), "node 2 to work", seconds=options.seconds)
        deployed.kill("superlink")
        before = deployed.rounds()
        run.kill()
        told.append(f"SuperLink killed after round {before}")
        deployed.start_link()
        for node in range(deployed.nodes):
            deployed.kill(f"node-{node}")
            deployed.start_node(node)
        run = deployed.run({**config, "rounds": options.rounds})  # the history of blind modes is empty
        deployed.wait(lambda: run.poll() is not None, "the run to end", seconds=options.seconds)
        finished(deployed, mode)
        log = deployed.log("run")
        return {
            "mode": mode,
            "kills": told,
            "rounds_in_the_end": deployed.rounds(),
            "lost_rounds": len(re.findall("[Nn]othing changes", log)),
            "tried_again": len(re.findall("tried again with", log)),
            **masks_of(deployed),
        }


def kill_between(deployed: Deployment, node: int, seconds: float) -> str:
    """Kills a node's client as soon as it is asked again after its upload has left."""

    def answered(stage: str) -> bool:
        return any(u["client"] == node and u["stage"] == stage for u in deployed.uploads())

    deployed.wait(lambda: answered("train"), f"the upload of node {node}", seconds=seconds)
    deployed.wait(lambda: not deployed.client_processes(node), "its process to end", seconds=seconds)
    deployed.kill_client(node)
    return "while it revealed" if not answered("reveal") else "after it revealed"


def started(folder: Path, mode: str, *, nodes: int = NODES) -> Any:
    """A deployment of a mode."""
    masking = None if mode == "plain" else mode
    return deployment(folder / mode, nodes=nodes, tls=True, masking=masking)


def finished(deployed: Deployment, mode: str) -> None:
    """Waits until every node has its model."""
    if mode != "plain":
        there = [deployed.model_file(node).exists for node in range(deployed.nodes)]
        deployed.wait(lambda: all(exists() for exists in there), "the models to be delivered", seconds=120)


def model_of(deployed: Deployment, mode: str) -> dict[str, torch.Tensor]:
    """The public tensors of the trained model."""
    return newest(deployed.checkpoints) if mode == "plain" else load_file(deployed.model_file(0))


def masks_of(deployed: Deployment) -> dict[str, Any]:
    """What the recorded uploads say, and whether members' files and models are whole."""
    models = [load_file(deployed.model_file(node)) for node in range(deployed.nodes)]
    whole = 0
    for node in range(deployed.nodes):
        with MemberFile.open(deployed.members / f"client-{node}.secret", passphrase=PASSPHRASE) as file:
            file.memory()
            whole += 1
    return {
        "uploads": sum("nonce" in upload for upload in deployed.uploads()),
        "masks_used_twice": deployed.masks_used_twice(),
        "members_files_intact": whole,
        "nodes_with_the_same_model": sum(distance(model, models[0]) == 0 for model in models),
        "secrets_in_logs": secrets_in_logs(deployed),
    }


def secrets_in_logs(deployed: Deployment) -> int:
    """How many of the members' secrets stand in any process's log, as hexadecimal text."""
    text = "".join(path.read_text(errors="replace") for path in deployed.folder.glob("*.log"))
    found = 0
    for node in range(deployed.nodes):
        with MemberFile.open(deployed.members / f"client-{node}.secret", passphrase=PASSPHRASE) as file:
            secrets = [*file.keys.seeds.values(), file.membership().secret]
        found += sum(secret.reveal().hex() in text for secret in secrets)
    return found


if __name__ == "__main__":
    os.environ.pop("FEDKL_PASSPHRASE", None)
    main()
