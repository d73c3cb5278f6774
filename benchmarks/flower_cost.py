"""What fedkl adds to a Flower message, in milliseconds of processor time, beside the plain app."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from fedkl.flower import Guard, LockMod, current_client, public_arrays
from fedkl.models import build_model

CLIENTS = 3


def cost(repeats: int = 7) -> dict[str, Any]:
    """For LeNet and ResNet-18: a client that loads and replies, a server that checks and averages three."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 0
    os.environ["FEDKL_PASSPHRASE"] = "horse"  # noqa: S105 (of locks that nobody needs)
    return {name: _model_cost(name, repeats) for name in ("lenet", "resnet18")}


def _model_cost(name: str, repeats: int) -> dict[str, Any]:
    def build() -> nn.Module:
        with torch.random.fork_rng():
            return build_model(name, channels=3, classes=10, seed=0)

    locked, plain = public_arrays(build()), ArrayRecord(build().state_dict())
    megabytes = sum(len(array.data) for array in locked.values()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "client_plain_ms": _client(plain_app(build), plain, folder, repeats),
            "client_fedkl_ms": _client(locked_app(build), locked, folder, repeats),
            "server_plain_ms": _server(FedAvg, plain, repeats),
            "server_guard_ms": _server(lambda: Guard(FedAvg()), locked, repeats),
            "server_guard_checkpoints_ms": _server(
                lambda: Guard(FedAvg(), checkpoints=folder + "/rounds"), locked, repeats
            ),
        }
    added = {
        "client_added_ms_per_mb": results["client_fedkl_ms"] - results["client_plain_ms"],
        "server_added_ms_per_mb": (results["server_guard_ms"] - results["server_plain_ms"]) / CLIENTS,
    }
    rounded = {key: round(value, 1) for key, value in results.items()}
    return {
        "megabytes": round(megabytes, 3),
        "repeats": repeats,
        **rounded,
        **{key: round(value / megabytes, 2) for key, value in added.items()},
    }


def plain_app(build: Callable[[], nn.Module]) -> ClientApp:
    """The app of a Flower user."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = build()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        return _reply(model, message)

    return app


def locked_app(build: Callable[[], nn.Module]) -> ClientApp:
    """The same with fedkl."""
    app = ClientApp(mods=[LockMod(build)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _reply(current_client().model, message)

    return app


def _reply(model: nn.Module, message: Message) -> Message:
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": _metrics()})
    return Message(content=content, reply_to=message)


def _metrics() -> MetricRecord:
    return MetricRecord({"num-examples": 1})


def _request(arrays: ArrayRecord) -> Message:
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    message = Message(content, dst_node_id=2, message_type="train")
    message.metadata.__dict__["_message_id"] = "1"
    return message


def _client(app: ClientApp, arrays: ArrayRecord, folder: str, repeats: int) -> float:
    context = Context(1, 2, {"partition-id": 0, "fedkl-store": folder}, RecordDict(), {})

    def once() -> None:
        assert app(message=_request(arrays), context=context).has_content()

    return _milliseconds(once, repeats)


def _server(build: Callable[[], Strategy], arrays: ArrayRecord, repeats: int) -> float:
    strategy = build()
    if isinstance(strategy, Guard):
        strategy.expect(arrays)
    replies = [
        Message(RecordDict({"arrays": arrays, "metrics": _metrics()}), reply_to=_request(arrays))
        for _ in range(CLIENTS)
    ]
    return _milliseconds(lambda: strategy.aggregate_train(1, replies), repeats)


def _milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median processor time; the first call, which fills caches, does not count."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - begin))
    return statistics.median(times)
