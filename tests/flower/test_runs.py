"""Whole trainings in one process: every message searched, and the same numbers as fedkl's own trainer."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tomllib
import torch
from fedkl_flower_example import client_app, server_app, task
from flower_harness import EXAMPLE
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg

import fedkl
from fedkl.federated import ConstantSchedule
from fedkl.flower import ClientStore, Guard, InProcessGrid, public_arrays, run_in_process
from fedkl.flower import mod as mods
from fedkl.flower.round_files import RoundFiles
from fedkl.locking import Split, withholding
from tests.federated.setting import federation
from tests.flower.setting import DEFENSE, app_of, found_in, honest, metrics, net, server_of, store
from tests.locking.leaks import secrets_of

CONFIG = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"][
    "config"
]
CLIENTS, ROUNDS, IMAGES = 3, 2, 192


def recorded(handler=honest, *, rounds=2):
    """All messages of a training, and every version of every private tensor."""
    messages, secrets = [], {}

    def observe(message):
        messages.append(message)
        for node in range(CLIENTS):
            path = store().path(f"client-{node}")
            if path.exists():
                lock = fedkl.load_lock(path, net(), passphrase="correct horse")
                found = secrets_of(lock)
                secrets.update({f"{node}/{name}/{len(messages)}": t for name, t in found.items()})

    def main(grid):
        strategy = FedAvg(min_available_nodes=CLIENTS, min_train_nodes=CLIENTS, min_evaluate_nodes=CLIENTS)
        Guard(strategy).start(grid, public_arrays(net(), defense=DEFENSE), num_rounds=rounds)

    run_in_process(server_of(main), app_of(handler), clients=CLIENTS, observe=observe)
    return messages, secrets


def test_no_message_carries_private_numbers_in_any_precision():
    messages, secrets = recorded()
    assert len(messages) == 2 * 2 * 2 * CLIENTS  # requests and replies of training and evaluation
    assert all(message.has_content() for message in messages)
    assert len(secrets) > 50
    assert found_in(messages, secrets) == []
    public = {name: torch.from_numpy(a.numpy()) for name, a in messages[-2].content["arrays"].items()}
    assert found_in(messages, public) == sorted(public)  # the search finds what is there


def break_split(patch):
    """From now on no tensor is private, as far as the lock knows."""
    patch.setattr(withholding._Withheld, "save", lambda self, *args: None)
    patch.setattr(Split, "_public_tensors", lambda self: self.model.state_dict(keep_vars=True))
    patch.setattr(Split, "private_names", frozenset())


def test_the_search_finds_a_split_that_is_broken(monkeypatch):
    break_split(monkeypatch)
    monkeypatch.setattr(mods, "_checked", lambda content, lock, numbers: content)
    messages, secrets = recorded(rounds=1)
    found = found_in(messages, secrets)
    assert all(any(name in place for place in found) for name in ("running_mean", "original0", "original1"))


def test_with_a_broken_split_the_mod_still_knows_private_numbers(monkeypatch):
    break_split(monkeypatch)
    messages, secrets = recorded(rounds=1)
    assert {m.error.reason for m in messages if m.has_error()} == {mods.REFUSED_REPLY}
    replies = [message for message in messages if message.metadata.reply_to_message_id]
    assert found_in(replies, secrets) == []


def test_the_example_gives_the_same_numbers_as_the_trainer(tmp_path, monkeypatch):
    """Weights are averaged in float32 by Flower, in float64 by fedkl: they agree to 1e-6."""
    locks = ClientStore(tmp_path / "store", passphrase="correct horse")
    dataset = task.load("mnist-sample", images=IMAGES)
    ours = federation(dataset, fedkl.defenses.KeyLock(), model=task.net(), rounds=ROUNDS, clients=CLIENTS)
    for client in ours.clients:
        with locks.client(client.name, model=task.net(), defense=fedkl.defenses.KeyLock()) as stored:
            stored.lock.use_key(client.key)
            stored.lock.load_private_state(client.private_state)
            locks.save(stored)
    assert isinstance(ours.training.schedule, ConstantSchedule)
    accuracy = [result.accuracy for result in ours.run()]
    config = {**CONFIG, "images": IMAGES, "rounds": ROUNDS, "checkpoints": str(tmp_path / "rounds")}
    run_in_process(server_app.app, client_app.app, clients=CLIENTS, run_config=config)
    files = RoundFiles(tmp_path / "rounds")
    for name, tensor in files.newest().arrays.items():
        torch.testing.assert_close(tensor, ours.server.state[name], rtol=0, atol=1e-6)
    flower = files.history(until=ROUNDS)["evaluate_metrics_clientapp"]
    assert [flower[number]["accuracy"] for number in (1, 2)] == pytest.approx(accuracy, abs=1 / 500)
    for client in ours.clients:
        with locks.client(client.name, model=task.net(), defense=fedkl.defenses.KeyLock()) as stored:
            for name, tensor in stored.lock.private_state().items():
                torch.testing.assert_close(tensor, client.private_state[name], rtol=0, atol=1e-6)


def with_bias(data, **numbers):
    arrays = public_arrays(net(), defense=DEFENSE)
    arrays["0.bias"] = Array("float32", (6,), "numpy.ndarray", data)
    return {"arrays": arrays, "metrics": metrics(**numbers)}


FINE = Array(np.ones(6, np.float32)).data
HOSTILE = [
    with_bias(b"PK\3\4"),
    with_bias(FINE[:10] + (b"[" * 118) + FINE[128:]),
    with_bias(FINE + b"more"),
    with_bias(Array(np.full(6, np.nan, np.float32)).data),
    with_bias(FINE, loss=10**400),
    {"arrays": ArrayRecord({"x\n[ROUND 9/9]": Array(np.ones(1))}), "metrics": metrics()},
    {**with_bias(FINE), "metrics": MetricRecord({"num-examples": 1.7e308})},
]


def arrays_after(hostile):
    """A training of three nodes, the last of which sends these replies, one a round; None: an error."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        node, number = context.node_config["partition-id"], message.content["config"]["server-round"]
        if node == 2:
            if hostile is None:
                raise ValueError
            return Message(RecordDict(dict(hostile[number - 1])), reply_to=message)
        arrays = {
            name: Array(a.numpy() + np.float32(node + 1)) for name, a in message.content["arrays"].items()
        }
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics()}), reply_to=message)

    strategy = Guard(FedAdam(fraction_evaluate=0.0, min_available_nodes=CLIENTS, min_train_nodes=CLIENTS))
    grid = InProcessGrid(app, clients=CLIENTS)
    arrays = strategy.start(grid, public_arrays(net(), defense=DEFENSE), num_rounds=len(HOSTILE)).arrays
    return {name: array.numpy() for name, array in arrays.items()}


def test_whatever_a_node_replies_a_guarded_run_goes_on_as_without_it():
    expected = arrays_after(None)
    for name, array in arrays_after(HOSTILE).items():
        np.testing.assert_array_equal(array, expected[name])


def test_without_flower_the_error_names_the_extra():
    program = (
        "import sys; sys.modules['flwr'] = None\n"
        "import fedkl\n"
        "try:\n    import fedkl.flower\nexcept fedkl.FedKLError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'fedkl[flower]'" in result.stdout
