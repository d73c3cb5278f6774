"""The node's store: stable names, encryption, and files that are whole or not there."""

from __future__ import annotations

import os
import stat

import pytest
import torch

import fedkl
from fedkl.errors import ConfigError, KeyFileError
from fedkl.flower import ClientStore
from fedkl.flower.store import client_name
from tests.flower.setting import DEFENSE, net, step


def opened(store, name="a"):
    return store.client(name, model=net(), defense=DEFENSE)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(folder):
    return ClientStore(folder, passphrase="horse")


def test_a_lock_is_made_once_and_found_again(store, folder):
    with opened(store) as client:
        key = client.lock.key.reveal()
        step(client.model)
        client.memory["momentum"] = torch.arange(3.0)
        store.save(client)
        kept = client.lock.private_state()
    with opened(ClientStore(folder, passphrase="horse")) as client:
        assert torch.equal(client.lock.key.reveal(), key)
        assert torch.equal(client.memory["momentum"], torch.arange(3.0))
        now = client.lock.private_state()
    assert all(torch.equal(tensor, now[name]) for name, tensor in kept.items())


def test_the_file_is_private_encrypted_and_an_ordinary_lock(store):
    with opened(store) as client:
        key = client.lock.key.reveal()
    path = store.path("a")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.numpy().tobytes() not in path.read_bytes()
    assert torch.equal(fedkl.load_lock(path, net(), passphrase="horse").key.reveal(), key)


@pytest.mark.parametrize("damage", ["wrong passphrase", "truncated", "altered", "another model"])
def test_a_file_that_does_not_open_is_never_replaced(store, folder, damage):
    with opened(store):
        pass
    path = store.path("a")
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-9])
    elif damage == "altered":
        path.write_bytes(data[:-9] + b"123456789")
    broken = path.read_bytes()
    model = net()[1:] if damage == "another model" else net()
    second = ClientStore(folder, passphrase="mule" if damage == "wrong passphrase" else "horse")
    with pytest.raises(KeyFileError), second.client("a", model=model, defense=DEFENSE):
        pass
    assert path.read_bytes() == broken


def test_a_client_is_open_in_one_place_only(store):
    with opened(store), pytest.raises(ConfigError, match="another process"), opened(store):
        pass


def test_a_write_that_was_killed_leaves_the_lock_before(store, monkeypatch):
    with opened(store) as client:
        before = store.path("a").read_bytes()

        def die(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            patch.setattr(os, "rename", die)
            step(client.model)
            with pytest.raises(KeyboardInterrupt):
                store.save(client)
    assert store.path("a").read_bytes() == before
    (store.path("a").parent / ".lock.fedkl.0.part").write_bytes(b"half")
    with opened(store):
        assert [path.name for path in store.path("a").parent.iterdir()] == ["lock.fedkl"]


def test_the_passphrase_may_lie_in_a_file(folder, tmp_path):
    file = tmp_path / "passphrase"
    config = {"fedkl-store": str(folder), "fedkl-passphrase-file": str(file)}
    with pytest.raises(ConfigError, match="cannot be read"):
        ClientStore.of_node(config)
    file.write_text("\n")
    with pytest.raises(KeyFileError, match="empty"):
        ClientStore.of_node(config)
    file.write_text("horse\n")
    with opened(ClientStore.of_node(config)) as client:
        key = client.lock.key.reveal()
    with opened(ClientStore(folder, passphrase="horse")) as client:
        assert torch.equal(client.lock.key.reveal(), key)


def test_names():
    assert client_name({"fedkl-client": "ward-3", "partition-id": 1}) == "ward-3"
    assert client_name({"partition-id": 1}) == "client-1"
    with pytest.raises(ConfigError, match="stable name"):
        client_name({})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a" * 65, "ä"])
def test_bad_names(store, name):
    with pytest.raises(ConfigError, match="Client name"):
        store.path(name)


def test_repr_shows_names_only(store):
    with opened(store) as client:
        client.memory["momentum"] = torch.tensor([0.123])
        assert "0.123" not in repr(client)
        assert "<secret>" in repr(client)
