"""The example as it is deployed: SuperLink and SuperNodes as processes, TLS, registered node keys, masks.

It is benchmarks/flower_deployment.py and flower_masked.py made small; recording the wire and killing
processes is done there.
"""

from __future__ import annotations

import shutil
import sys

import pytest
import tomllib
import torch
from fedkl_flower_example import client_app, server_app, task
from flower_harness import EXAMPLE, PASSPHRASE, deployment
from processes import marked
from safetensors.torch import load_file

import fedkl
from fedkl.defenses import KeyLock
from fedkl.flower import ClientStore, run_in_process
from fedkl.flower.round_files import RoundFiles
from fedkl.masking.sums import sum_of

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc"),
    pytest.mark.timeout(600),
]

NODES, ROUNDS = 3, 2
DEFAULTS = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"][
    "config"
]
CONFIG = {"images": 128, "timeout": 240.0, "fraction-evaluate": 0.0}


@pytest.fixture(scope="module")
def locks(tmp_path_factory):
    """New locks of all clients, which nobody trains."""
    folder = tmp_path_factory.mktemp("locks")
    store = ClientStore(folder, passphrase=PASSPHRASE)
    for node in range(NODES):
        with store.client(f"client-{node}", model=task.net(), defense=KeyLock()):
            pass
    return folder


@pytest.fixture(scope="module")
def deployed(locks, tmp_path_factory):
    """A deployment that has done its rounds, and is gone."""
    with deployment(tmp_path_factory.mktemp("deployed"), nodes=NODES, tls=True, masking="blind") as processes:
        for node in range(NODES):
            target = processes.lock_file(node)
            target.parent.mkdir(parents=True)
            shutil.copy(locks / f"client-{node}" / "lock.fedkl", target)
        run = processes.run({"rounds": ROUNDS, **CONFIG})
        processes.wait(lambda: run.poll() is not None, "the run to end", seconds=500)
    return processes


def private(path):
    lock = fedkl.load_lock(path, task.net(), passphrase=PASSPHRASE)
    return {"key": lock.key.reveal(), **lock.private_state()}


def test_the_numbers_are_those_of_one_process(deployed, locks, tmp_path, monkeypatch):
    shutil.copytree(locks, tmp_path / "locks")
    monkeypatch.setenv("FEDKL_PASSPHRASE", PASSPHRASE)
    config = {**DEFAULTS, **CONFIG, "rounds": ROUNDS, "checkpoints": str(tmp_path / "rounds")}
    node_config = {"fedkl-store": str(tmp_path / "locks")}
    run_in_process(server_app.app, client_app.app, clients=NODES, run_config=config, node_config=node_config)
    expected = RoundFiles(tmp_path / "rounds").newest().arrays
    for node in range(NODES):
        found = load_file(deployed.model_file(node))
        assert set(found) == set(expected)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        mine = private(tmp_path / "locks" / f"client-{node}" / "lock.fedkl")
        for name, tensor in private(deployed.lock_file(node)).items():
            torch.testing.assert_close(tensor, mine[name], rtol=0, atol=1e-6)


def test_every_node_has_kept_its_key_and_trained_its_own_lock(deployed, locks):
    after = [private(deployed.lock_file(node)) for node in range(NODES)]
    for node in range(NODES):
        before = private(locks / f"client-{node}" / "lock.fedkl")
        assert torch.equal(before["key"], after[node]["key"])
        assert any(not torch.equal(before[name], tensor) for name, tensor in after[node].items())
    assert not torch.equal(after[0]["key"], after[1]["key"])


def test_the_server_has_a_sum_that_it_cannot_read_and_no_mask_was_used_twice(deployed):
    saved = RoundFiles(deployed.checkpoints).newest()
    assert saved.round == ROUNDS
    first = task.net().state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in saved.arrays.items())
    assert list(sum_of(saved.kept).listed) == [f"client-{node}" for node in range(NODES)]
    assert sum("nonce" in upload for upload in deployed.uploads()) == NODES * ROUNDS
    assert deployed.masks_used_twice() == 0


def test_nothing_is_left_behind(deployed):
    assert marked(deployed.mark) == []
    assert all(PASSPHRASE not in path.read_text() for path in deployed.folder.glob("*.log"))
