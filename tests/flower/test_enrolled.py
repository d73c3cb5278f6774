"""A client that was enrolled into its node's store takes part: its key is the enrolled one."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from fedkl.enrollment import Fitting, enroll
from fedkl.flower import Guard, current_client, public_arrays, run_in_process
from fedkl.flower.node import node_store
from tests.flower.setting import DEFENSE, app_of, found_in, net, reply, server_of, step, store
from tests.locking.leaks import secrets_of


def rounds(clients, arrays, folder, *, observe=None, node_config=None):
    """One round of a federation; returns the keys that its clients had, and its public tensors."""
    keys = {}

    def handler(message, context):
        client = current_client()
        keys[client.name] = client.lock.key.reveal()
        step(client.model, seed=int(context.node_config["partition-id"]))
        return reply(message, ArrayRecord(client.model.state_dict()))

    result = {}

    def main(grid):
        strategy = FedAvg(min_available_nodes=clients, min_train_nodes=clients, fraction_evaluate=0.0)
        done = Guard(strategy, checkpoints=folder).start(grid, arrays, num_rounds=1)
        result.update({name: torch.from_numpy(a.numpy()) for name, a in done.arrays.items()})

    app = app_of(handler)
    run_in_process(server_of(main), app, clients=clients, observe=observe, node_config=node_config)
    return keys, result


def test_an_enrolled_client_takes_part_with_its_own_key(tmp_path, caplog):
    before, public = rounds(2, public_arrays(net(), defense=DEFENSE), tmp_path / "one")
    assert sorted(before) == ["client-0", "client-1"]
    drawn = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 4, generator=drawn), torch.randint(3, (60,), generator=drawn)
    done = enroll(net(), public=public, images=x, labels=y, defense=DEFENSE, fitting=Fitting(epochs=2))
    store().add("client-2", done.lock)
    caplog.clear()
    messages, secrets = [], secrets_of(done.lock)
    again, after = rounds(
        3,
        ArrayRecord(public),
        tmp_path / "two",
        observe=messages.append,
        node_config={"fedkl-new-keys": False},  # no key may be born now
    )
    assert all(message.has_content() for message in messages)
    assert "has a new key" not in caplog.text
    assert torch.equal(again["client-2"], done.lock.key.reveal())
    assert all(torch.equal(again[name], key) for name, key in before.items())
    assert len({tuple(key.tolist()) for key in again.values()}) == 3
    assert after.keys() == public.keys()
    with store().client("client-2", model=net(), defense=DEFENSE) as client:
        secrets |= {f"after/{name}": tensor for name, tensor in secrets_of(client.lock).items()}
        assert client.ledger.saved == 2  # enrolled, and one round
    assert found_in(messages, secrets) == []
    assert found_in(messages, public) == sorted(public)  # the search finds what is there


def test_without_an_enrollment_the_third_client_has_no_key(tmp_path):
    config = {"fedkl-new-keys": False}
    messages = []
    arrays = public_arrays(net(), defense=DEFENSE)
    keys, after = rounds(1, arrays, tmp_path, observe=messages.append, node_config=config)
    assert keys == {}
    assert all(torch.equal(t, torch.from_numpy(arrays[name].numpy())) for name, t in after.items())
    assert messages[-1].has_error()
    assert not node_store(config).path("client-0").exists()
