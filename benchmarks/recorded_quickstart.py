"""Flower's PyTorch quickstart, recorded by one line more, and what its clients' updates give away.

    python benchmarks/recorded_quickstart.py [--nodes 3] [--seed 0] [--minutes 3] [--out DIR]
    python benchmarks/recorded_quickstart.py --processes    # SuperLink and SuperNodes, TLS, node keys

The app is Flower's ``quickstart-pytorch``: its network and training loop (examples/audit/quickstart.py), a
node's own CIFAR-10 images, FedAvg. All nodes run in this process, as NumPyClients, or each in its own
(recorded_app/). The only change is ``mods=[RecordingMod(…)]``. One round starts from the example's weights,
never trained on any of these images. Needs Flower (the extra ``flower``) and CIFAR-10. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from flower_harness import DeploymentError, deployment
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp
from torch import nn

from fedkl.auditing import Audit, RecordedClient, RecordedUpdate, Subject, audit_recorded
from fedkl.flower import RecordingMod, run_in_process
from fedkl.recordingfile import recorded_rounds

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "audit"


def weights_of(network: nn.Module) -> NDArrays:
    """As the quickstart sends them."""
    return [tensor.cpu().numpy() for tensor in network.state_dict().values()]


class Node(NumPyClient):
    """The quickstart's client.

    Args:
        subject: The network and its training loop, and the images.
        members: Which of them are this node's.
    """

    def __init__(self, subject: Subject, members: list[int]) -> None:
        self._subject, self._members = subject, members

    def fit(self, parameters: NDArrays, config: dict[str, Any]) -> tuple[NDArrays, int, dict[str, Any]]:
        """Trains from the server's weights."""
        network = self._subject.build()
        tensors = [torch.from_numpy(array.copy()) for array in parameters]
        network.load_state_dict(dict(zip(network.state_dict(), tensors, strict=True)))
        images, labels = self._subject.images[self._members], self._subject.labels[self._members]
        self._subject.procedure(network, self._subject.inputs(images), labels)  # type: ignore[operator]
        return weights_of(network), len(self._members), {}


def record(subject: Subject, members: list[list[int]], folder: Path) -> None:
    """One round of the app, recorded on each node."""

    def client_fn(context: Context) -> Client:
        return Node(subject, members[int(context.node_config["partition-id"])]).to_client()

    def server_fn(context: Context) -> ServerAppComponents:
        start = ndarrays_to_parameters(weights_of(subject.build()))
        strategy = FedAvg(fraction_evaluate=0.0, initial_parameters=start, min_available_clients=len(members))
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))

    app = ClientApp(client_fn=client_fn, mods=[RecordingMod(folder)])  # was: ClientApp(client_fn=client_fn)
    run_in_process(ServerApp(server_fn=server_fn), app, clients=len(members))


def deploy(folder: Path, *, nodes: int, seed: int) -> None:
    """One round of recorded_app/, each node a process of its own."""
    os.environ["QUICKSTART_RECORDINGS"] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    app = Path(__file__).with_name("recorded_app")
    with deployment(folder.parent / "deployment", nodes=nodes, app=app) as running:
        run = running.run({"seed": seed, "nodes": nodes})
        running.wait(lambda: run.poll() is not None, "the round", seconds=600)
        if run.returncode:
            raise DeploymentError(running.log("run")[-2000:])


def partition_of(node: Path) -> int:
    """A node's number: what its process wrote down, or the node's id, where all are in this process."""
    told = node.parent.parent / f"partition-{node.name.removeprefix('node-')}"
    return int(told.read_text(encoding="utf-8") if told.exists() else node.name.removeprefix("node-"))


def recorded(folder: Path, members: list[list[int]]) -> list[RecordedClient]:
    """What the nodes recorded."""
    nodes = sorted(folder.iterdir(), key=partition_of)
    return [
        RecordedClient(
            update=RecordedUpdate.from_recording(list(recorded_rounds(node).values())[-1]), members=own
        )
        for node, own in zip(nodes, members, strict=True)
    ]


def figures(audit: Audit) -> dict[str, Any]:
    """Presence in what was recorded, and what else was found or not run there."""
    found = [each for each in audit.findings if each.exposure == "recorded"]
    return {
        each.question if each.attacker == "presence" else f"{each.attacker}, {each.question}": {
            "found": each.found.percent,
            "floor": each.floor.percent if each.floor else None,
            "outcome": each.outcome,
            "reason": each.reason,
            **{name: round(value, 3) for name, value in each.figures.items()},
        }
        for each in found
    } | {each.attacker: each.reason for each in audit.not_run if each.exposure == "recorded"}


def main() -> None:
    """Records, audits and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--processes", action="store_true", help="SuperLink and SuperNodes of their own.")
    parser.add_argument("--out", help="Folder for recordings and audit; a temporary one if not given.")
    given = parser.parse_args()
    sys.path.insert(0, str(EXAMPLES))
    subject: Subject = __import__("quickstart").subject()
    folder = Path(given.out or tempfile.mkdtemp())
    order = torch.randperm(len(subject.images), generator=torch.Generator().manual_seed(given.seed))
    members = [part.tolist() for part in order.split(subject.images_per_client)[: given.nodes]]
    start = perf_counter()
    torch.manual_seed(given.seed)
    if given.processes:
        folder.mkdir(parents=True, exist_ok=True)
        deploy(folder.resolve() / "updates", nodes=given.nodes, seed=given.seed)
    else:
        record(subject, members, folder / "updates")
    clients = recorded(folder / "updates", members)
    done = audit_recorded(subject, clients, out=folder / "audit", seed=given.seed, minutes=given.minutes)
    seconds = round(perf_counter() - start, 1)
    line = {"nodes": given.nodes, "images": subject.images_per_client, "seed": given.seed, "seconds": seconds}
    print(json.dumps({**line, **figures(done)}, ensure_ascii=False))


if __name__ == "__main__":
    main()
