"""The node's store: stable names, encryption, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import stat
from datetime import datetime, timedelta, timezone

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file

import fedkl
from fedkl.custody import ClientStore, Ledger, journal
from fedkl.custody.backup import read_backup, restore, write_backup
from fedkl.custody.check import check_store
from fedkl.custody.journal import Journal
from fedkl.custody.member import identity_of, new_member_of
from fedkl.dates import today
from fedkl.errors import ConfigError, KeyFileError, MaskingError
from fedkl.export import export
from fedkl.flower import Guard, LockMod, Masked, MaskMod, public_arrays, run_in_process
from fedkl.flower.node import client_name, node_store
from fedkl.flower.node_member import NodeMember
from fedkl.masking import MemberFile
from tests.flower.cohorts import PASSPHRASE, app_of, found, trained
from tests.flower.setting import DEFENSE, honest, net, server_of, step


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


@pytest.mark.parametrize("ledger", [True, False])
@pytest.mark.parametrize(
    "damage", ["wrong passphrase", "truncated", "short", "empty", "foreign", "altered", "another model"]
)
def test_a_file_that_does_not_open_is_never_replaced(store, folder, damage, ledger):
    with opened(store):
        pass
    path = store.path("a")
    if not ledger:  # as in stores of earlier versions
        (path.parent / "ledger.json").unlink()
    data = path.read_bytes()
    path.write_bytes({"short": data[:7], "empty": b"", "foreign": b"PK" + data}.get(damage, data))
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


def refused(store, match, *, name="a", error=KeyFileError):
    with pytest.raises(error, match=match), opened(store, name):
        pass


def test_the_birth_of_a_key_is_announced(store, caplog):
    with opened(store):
        assert "Client a has a new key" in caplog.text
    caplog.clear()
    with opened(store):
        assert caplog.text == ""


@pytest.mark.parametrize("loss", ["removed", "dangling link", "link"])
def test_a_lock_that_was_lost_is_not_replaced_by_a_new_key(store, tmp_path, loss):
    with opened(store):
        pass
    path = store.path("a")
    path.rename(tmp_path / "elsewhere")
    if loss != "removed":
        path.symlink_to(tmp_path / ("elsewhere" if loss == "link" else "nowhere"))
    refused(store, "lock.fedkl is gone" if loss == "removed" else "symbolic link")
    assert os.path.lexists(path) == (loss != "removed")


@pytest.mark.parametrize("left", ["nothing", "empty folder"])
def test_a_store_that_is_not_there_gets_no_new_keys(folder, tmp_path, monkeypatch, left):
    monkeypatch.setattr(
        "tempfile.gettempdir", lambda: str(tmp_path / "tmp")
    )  # stores there are not remembered
    store = ClientStore(folder, passphrase="horse")
    with opened(store):
        pass
    folder.rename(tmp_path / "unmounted")
    if left == "empty folder":
        folder.mkdir()
    refused(store, r"had a key in this store \(since 20.*Is the disk mounted\?.*remove ")
    assert folder.exists() == (left == "empty folder")
    assert not (folder / "a").exists()
    with opened(store, "b"):  # a client that was never there
        pass
    (tmp_path / "unmounted" / "a").rename(folder / "a")
    with opened(store):
        pass


def test_stores_in_temporary_folders_are_not_remembered(store, folder):
    with opened(store):
        pass
    shutil.rmtree(folder)
    with opened(store):
        pass


def test_new_keys_can_be_forbidden(folder):
    config = {"fedkl-store": str(folder), "fedkl-new-keys": False}
    refused(node_store(config), "fedkl-new-keys is false")
    assert not folder.exists()
    with pytest.raises(ConfigError, match="expected true or false"):
        node_store({"fedkl-store": str(folder), "fedkl-new-keys": "no"})


@pytest.mark.parametrize("what", ["lock", "folder", "lock without ledger"])
def test_another_clients_lock_does_not_open(store, what):
    for name in "ab":
        with opened(store, name):
            pass
    mine, other = store.path("a").parent, store.path("b").parent
    shutil.copy(other / "lock.fedkl", mine / "lock.fedkl")
    if what == "folder":
        shutil.copy(other / "ledger.json", mine / "ledger.json")
    elif what == "lock without ledger":
        (mine / "ledger.json").unlink()
    refused(store, "the lock of client 'b', not of 'a'")


def test_a_rollback_is_noticed_and_can_be_meant(store):
    with opened(store) as client:
        path = store.path("a")
        old = path.read_bytes()
        step(client.model)
        store.save(client)
    path.write_bytes(old)
    refused(store, r"saved 1 times, but this client has saved it 2 times")
    (path.parent / "ledger.json").unlink()
    with opened(store) as client:
        assert client.ledger.saved == 1


def test_a_lock_that_is_ahead_of_its_ledger_opens(store):
    with opened(store) as client:
        old = (store.path("a").parent / "ledger.json").read_bytes()
        store.save(client)
    (store.path("a").parent / "ledger.json").write_bytes(old)  # killed between the two writes
    with opened(store) as client:
        assert client.ledger.saved == 2


def test_a_save_that_failed_leaves_a_client_that_opens(store, monkeypatch):
    with opened(store) as client:
        with monkeypatch.context() as patch:
            patch.setattr("fedkl.lockfile._write_container", fail)
            with pytest.raises(KeyFileError, match="no space"):
                store.save(client)
        assert client.ledger.saved == 1
    with opened(store) as client:
        assert client.ledger.saved == 1


def fail(path, data, *, replace):
    raise KeyFileError("no space")


def test_locks_of_earlier_versions_open_and_are_bound_then(store, folder):
    store.path("a").parent.mkdir(parents=True)
    DEFENSE.prepare(net()).save(store.path("a"), passphrase="horse")
    with opened(store) as client:
        store.save(client)
    shutil.copytree(folder / "a", folder / "b")
    refused(store, "the lock of client 'a', not of 'b'", name="b")


def test_a_lock_that_somebody_put_there_is_refused(store):
    with opened(store):
        pass
    DEFENSE.prepare(net()).save(store.path("a"), passphrase="horse")
    refused(store, "not the one that this client saved last")


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"{}", b'{"client": 1, "born": "", "saved": 1}', b"[" * 4000, b"\xff"]
)
def test_a_damaged_ledger_is_named(store, damage):
    with opened(store):
        pass
    (store.path("a").parent / "ledger.json").write_bytes(damage)
    refused(store, r"ledger\.json: damaged")


def test_names_that_differ_in_capitals_only(store):
    with opened(store, "Ward"):
        pass
    refused(store, "'Ward' is there, and", name="ward", error=ConfigError)
    with opened(store, "Ward"):
        pass


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_folders_are_private_under_any_umask(folder, umask):
    store = ClientStore(folder / "below", passphrase="horse")
    before = os.umask(umask)
    try:
        with opened(store):
            pass
    finally:
        os.umask(before)
    assert [mode(path) for path in (folder, folder / "below", folder / "below" / "a")] == [0o700] * 3
    assert {mode(path) for path in (folder / "below" / "a").iterdir()} == {0o600}


def test_a_clients_folder_of_an_earlier_version_is_closed(store):
    with opened(store):
        pass
    store.path("a").parent.chmod(0o755)
    with opened(store):
        assert mode(store.path("a").parent) == 0o700


def test_a_store_that_everybody_may_write_to_is_refused(store, folder):
    folder.mkdir()
    folder.chmod(0o777)
    refused(store, "everybody may write", error=ConfigError)
    folder.chmod(0o755)
    with opened(store):
        pass


def test_a_clients_folder_that_is_a_link_is_refused(store, folder, tmp_path):
    with opened(store):
        pass
    (folder / "a").rename(tmp_path / "elsewhere")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    refused(store, "symbolic link", error=ConfigError)


@pytest.mark.parametrize(("permissions", "outcome"), [(0o600, "fine"), (0o644, "warned"), (0o622, "refused")])
def test_the_mode_of_a_passphrase_file_is_looked_at(folder, tmp_path, permissions, outcome):
    file = tmp_path / "passphrase"
    file.write_text("horse")
    file.chmod(permissions)
    config = {"fedkl-store": str(folder), "fedkl-passphrase-file": str(file)}
    if outcome == "fine":
        node_store(config)
    elif outcome == "warned":
        with pytest.warns(UserWarning, match="others may read the passphrase's file"):
            node_store(config)
    else:
        with pytest.raises(KeyFileError, match="others may write to the passphrase's file"):
            node_store(config)


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
    (store.path("a").parent / ".lock.fedkl.0123abcd.part").write_bytes(b"half")
    with opened(store):
        assert sorted(path.name for path in store.path("a").parent.iterdir()) == [
            "journal.jsonl",
            "ledger.json",
            "lock.fedkl",
        ]


def test_the_passphrase_may_lie_in_a_file(folder, tmp_path):
    file = tmp_path / "passphrase"
    config = {"fedkl-store": str(folder), "fedkl-passphrase-file": str(file)}
    with pytest.raises(KeyFileError, match="cannot be read"):
        node_store(config)
    file.touch(mode=0o600)
    file.write_text("\n")
    with pytest.raises(KeyFileError, match="empty"):
        node_store(config)
    file.write_text("horse\n")
    with opened(node_store(config)) as client:
        key = client.lock.key.reveal()
    with opened(ClientStore(folder, passphrase="horse")) as client:
        assert torch.equal(client.lock.key.reveal(), key)


def test_names():
    assert client_name({"fedkl-client": "ward-3", "partition-id": 1}) == "ward-3"
    assert client_name({"partition-id": 1}) == "client-1"
    with pytest.raises(ConfigError, match="stable name"):
        client_name({})


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../a", "a" * 65, "ä", "a.", "CON", "nul.txt", "Com1", "a\n", "a\0"],
)
def test_bad_names(store, name):
    with pytest.raises(ConfigError, match="Client name"):
        store.path(name)


def test_repr_shows_names_only(store):
    with opened(store) as client:
        client.memory["momentum"] = torch.tensor([0.123])
        assert "0.123" not in repr(client)
        assert "<secret>" in repr(client)


# The member in the same folder


@pytest.fixture
def members(tmp_path):
    """Three clients of the node's store, each with its member in its folder, in one cohort."""
    files = {}
    (tmp_path / "store").mkdir()
    for number in range(3):
        name = f"client-{number}"
        new_member_of(tmp_path / "store" / name, name, passphrase=PASSPHRASE, today=today())
        files[name] = MemberFile.open(tmp_path / "store" / name / f"{name}.secret", passphrase=PASSPHRASE)
    found(files)
    return tmp_path / "store"


def trained_with_masks(mods):
    strategy = Guard(FedAvg(), aggregation=Masked())
    app = app_of(*mods, train=honest if len(mods) > 1 else trained)
    run_in_process(
        server_of(lambda grid: strategy.start(grid, public_arrays(net(), defense=DEFENSE), num_rounds=2)),
        app,
        clients=3,
    )


def test_one_folder_and_one_passphrase_hold_lock_and_member(members, caplog):
    trained_with_masks([MaskMod(), LockMod(net, defense=DEFENSE)])
    for name in ("client-0", "client-1", "client-2"):
        folder = members / name
        assert (folder / f"{name}.study.safetensors").is_file()
        ledger = Ledger.read(folder)
        with MemberFile.open(folder / f"{name}.secret", passphrase=PASSPHRASE) as file:
            assert ledger.member == identity_of(file.keys)
        assert [entry.what for entry in Journal(folder).read()[0]].count("member joined") == 2
    assert {fact.level for fact in check_store(members, passphrase=PASSPHRASE, today=today())} == {
        "note",
        "fact",
    }


def test_another_member_in_its_place_takes_no_part(members, caplog):
    trained_with_masks([MaskMod(), LockMod(net, defense=DEFENSE)])
    mine, other = members / "client-0", members / "client-1"
    for path in other.glob("client-1.*"):
        shutil.copy(path, mine)
    for path in mine.glob("client-0.*"):
        path.unlink()
    with pytest.raises(MaskingError, match="client-1 is not the member that client client-0 has had"):
        with NodeMember.of_node({"fedkl-client": "client-0"}):
            pass
    with NodeMember.of_node({"fedkl-client": "client-1"}) as node:
        assert node.who.member == "client-1"
    # on purpose: a new one
    for path in mine.glob("client-1.*"):
        path.unlink()
    new_member_of(mine, "hospital-a", passphrase=PASSPHRASE, today=today())
    with pytest.raises(MaskingError, match="has joined none yet"):
        with NodeMember.of_node({"fedkl-client": "client-0"}):
            pass


def test_two_members_in_a_folder_and_none(members):
    shutil.copy(members / "client-1" / "client-1.secret", members / "client-0")
    for client, says in (("client-0", "got client-0.secret, client-1.secret"), ("x", "and none is in .*x")):
        with pytest.raises(ConfigError, match=says), NodeMember.of_node({"fedkl-client": client}):
            pass


def test_a_node_whose_clock_was_turned_back_takes_no_part(members, monkeypatch):
    with NodeMember.of_node({"fedkl-client": "client-0"}):
        pass
    monkeypatch.setattr(journal, "_now", lambda: datetime.now(timezone.utc) - timedelta(days=3))
    with pytest.raises(MaskingError, match="clock"), NodeMember.of_node({"fedkl-client": "client-0"}):
        pass


def test_a_ledger_of_earlier_versions_has_no_member(store):
    with opened(store):
        pass
    path = store.path("a").parent / "ledger.json"
    assert set(json.loads(path.read_text())) == {"version", "client", "born", "saved"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "member": 1}))
    refused(store, r"ledger\.json: damaged")


def test_a_restored_member_opens_sums_and_takes_no_part(members, tmp_path):
    rounds, backup = tmp_path / "rounds", tmp_path / "backup"
    strategy = Guard(FedAvg(), aggregation=Masked(), checkpoints=rounds)
    initial = ArrayRecord(net().state_dict())
    app = app_of(MaskMod(), train=trained)
    run_in_process(server_of(lambda grid: strategy.start(grid, initial, num_rounds=1)), app, clients=3)
    write_backup(members, "client-0", out=backup, passphrase=PASSPHRASE, backup_passphrase="mule")
    kept = read_backup(backup, passphrase="mule")
    folder = restore(kept, tmp_path / "new", client="client-0", passphrase=PASSPHRASE, today=today())
    with MemberFile.open(folder / "client-0.secret", passphrase=PASSPHRASE) as file:
        export(rounds, out=tmp_path / "model.safetensors", member=file)
        with pytest.raises(MaskingError, match="the memory of cohort study is lost"):
            file.memory()
    opened_again = load_file(tmp_path / "model.safetensors")
    delivered = load_file(members / "client-0" / "client-0.study.safetensors")
    assert set(opened_again) == set(delivered)
    assert all(torch.equal(tensor, delivered[name]) for name, tensor in opened_again.items())
