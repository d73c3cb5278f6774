"""Ten thousand clients in one process: time, memory and checkpoints are those of their private states."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from fedkl.defenses import KeyLock
from tests.federated.setting import TwoNorms

TRAINING = """
import json, resource, sys
from pathlib import Path
from time import process_time

import torch
from torch import nn

from fedkl import data
from fedkl.defenses import KeyLock
from fedkl.federated import Checkpoints, FederatedTraining, Federation, LocalTraining
from fedkl.keys import Key

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def size(clients):
    states = [c.private_state.values() for c in clients]
    return sum(t.numel() * t.element_size() for tensors in states for t in tensors) + 128 * len(clients)

def build(clients):
    sample = data.load("mnist-sample")
    index = torch.arange(clients) % 2000
    dataset = data.Dataset(
        sample.spec,
        train_images=data.Subset(sample.train_images, index),
        train_labels=sample.train_labels[index],
        test_images=sample.test_images[:100],
        test_labels=sample.test_labels[:100],
    )
    model = nn.Sequential(
        nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 10)
    )
    training = FederatedTraining(clients=clients, cohort=5, rounds=2)
    return Federation(model, defense=KeyLock(key_length=16), dataset=dataset, training=training, seed=0)

def timed(task):
    before, start = memory(), process_time()
    result = task()
    return result, {"seconds": process_time() - start, "bytes": memory() - before}

clients, folder = int(sys.argv[1]), Path(sys.argv[2])
build(10)
run, construction = timed(lambda: build(clients))
results, rounds = timed(lambda: list(run.run()))
keys = {tuple(client.key.reveal().tolist()) for client in run.clients}
_, save = timed(lambda: Checkpoints(folder, passphrase="horse").save(run, round=2))
before = [(c.rounds, c.key.reveal(), dict(c.private_state)) for c in run.clients]
for client in run.clients:
    blank = {name: torch.zeros_like(tensor) for name, tensor in client.private_state.items()}
    other = Key.generate(length=16)
    client.restore(key=other, private_state=blank, optimizer_state={}, rounds=-1)
first, restore = timed(lambda: Checkpoints(folder, passphrase="horse").restore(run))
equal = all(
    c.rounds == rounds
    and torch.equal(c.key.reveal(), key)
    and all(torch.equal(c.private_state[name], t) for name, t in state.items())
    for c, (rounds, key, state) in zip(run.clients, before)
)
print(json.dumps({
    "construction": construction, "rounds": rounds, "save": save, "restore": restore,
    "private_bytes": size(run.clients), "first": first, "equal": equal, "keys": len(keys),
    "trained": sum(c.trained for c in run.clients), "updates": [r.updates for r in results],
}))
"""

CLIENTS = 10_000


def test_ten_thousand_clients(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAINING, str(CLIENTS), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["keys"] == CLIENTS
    assert told["updates"] == [5, 5]
    assert 5 <= told["trained"] <= 10
    assert (told["first"], told["equal"]) == (2, True)
    # What Python's objects around small tensors take, about a kilobyte each, is the larger part.
    allowed = 2 * told["private_bytes"] + CLIENTS * 10_000
    assert told["construction"]["bytes"] < allowed, told
    assert told["rounds"]["bytes"] < allowed / 10, told
    assert told["rounds"]["seconds"] < 10, told
    assert told["construction"]["seconds"] < 60, told
    assert told["save"]["seconds"] < 60, told
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert written < told["private_bytes"] + CLIENTS * 2_000


def test_a_client_is_made_in_milliseconds():
    """A bound that a copy too many of a large model would break; of `KeyLock` itself, checks included.

    Of CPU time, which other processes do not lengthen.
    """
    model, count = TwoNorms(), 20
    start = time.process_time()
    for _ in range(count):
        KeyLock(key_length=16).prepare(model)
    assert (time.process_time() - start) / count < 0.5
