"""Checkpoints: continued to the last bit, private to the last byte, sound whatever happens to the files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings

import pytest
import torch

from fedkl import lockfile
from fedkl.defenses import KeyLock, NoDefense, PrivateLayers, PrivateNorm
from fedkl.errors import ConfigError, FedKLError, KeyFileError
from fedkl.federated import Checkpoints, Client, Execution, ServerAdam, ServerSGD
from fedkl.federated.checkpoint import _sealed, _unsealed
from tests.federated.setting import TwoNorms, WithDropout, differences, everything, federation, seeded
from tests.locking.leaks import patterns

DEFENSES = [NoDefense(), KeyLock(), KeyLock(layers="all"), PrivateNorm(), PrivateLayers()]
HARD = {  # everything that a checkpoint could forget
    "clients": 6,
    "cohort": 4,
    "dropout": 0.25,
    "rounds": 4,
    "eval_every": 4,
    "server": ServerAdam(),
    "local": {"optimizer": "adam", "batch_size": 16},
}
EASY = {"clients": 4, "cohort": 2, "rounds": 8, "eval_every": 8, "server": ServerSGD()}


def build(dataset, defense=None, *, model=TwoNorms, **options):
    return federation(dataset, defense or KeyLock(), model=seeded(model), **options)


def checkpoints(folder, *, passphrase="horse", keep=2):
    return Checkpoints(folder, passphrase=passphrase, keep=keep)


def advanced(run, store, *, first, last):
    """Trains rounds `first` to `last`, with a checkpoint after each."""
    for round in range(first, last + 1):
        run.run_round(round)
        store.save(run, round=round + 1)
    return everything(run)


@pytest.fixture(scope="module")
def original(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    run, store = build(dataset, **EASY), checkpoints(folder)
    store.save(run, round=0)
    return folder, {round + 1: advanced(run, store, first=round, last=round) for round in range(3)}


@pytest.fixture
def saved(original, tmp_path):
    """A folder with the checkpoints of rounds 2 and 3, and what the federation was at each."""
    folder, states = original
    shutil.copytree(folder, tmp_path / "checkpoints")
    return tmp_path / "checkpoints", states


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def comparable(results):
    fields = ("round", "lr", "loss", "updates", "dropped", "failed", "aggregated", "accuracies")
    return [tuple(getattr(result, field) for field in fields) for result in results]


@pytest.mark.parametrize("keep_optimizer", [True, False])
@pytest.mark.parametrize("defense", DEFENSES, ids=lambda d: d.type)
def test_a_restored_training_goes_on_to_the_last_bit(dataset, tmp_path, defense, keep_optimizer):
    local = HARD["local"] | {"keep_optimizer": keep_optimizer}
    options = HARD | {"local": local}
    run, other = (build(dataset, defense, **options) for _ in range(2))
    store = checkpoints(tmp_path)
    store.save(run, round=0)
    advanced(run, store, first=0, last=1)
    assert 0 < sum(client.trained for client in run.clients)
    if run.clients[0].key is not None:
        assert differences(everything(run), everything(other))
    assert checkpoints(tmp_path).restore(other) == 2
    assert not differences(everything(run), everything(other))
    rest, again = list(run.run(start=2)), list(other.run(start=2))
    assert comparable(rest) == comparable(again)
    assert not differences(everything(run), everything(other))
    assert any("/optimizer/" in name for name in everything(run)) == keep_optimizer


@pytest.mark.parametrize(
    ("model", "execution"),
    [(WithDropout, Execution()), (TwoNorms, Execution(channels_last=True))],
    ids=["dropout", "channels-last"],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_so_does_every_kind_of_execution(dataset, tmp_path, model, execution, optimizer):
    options = EASY | {"execution": execution, "local": {"optimizer": optimizer, "batch_size": 16}}
    run, other = (build(dataset, NoDefense(), model=model, **options) for _ in range(2))
    store = checkpoints(tmp_path)
    store.save(run, round=0)
    advanced(run, store, first=0, last=1)
    checkpoints(tmp_path).restore(other)
    for federated in (run, other):
        list(federated.run(start=2))
    assert not differences(everything(run), everything(other))


@pytest.mark.parametrize("forgotten", ["key", "private_state", "optimizer_state", "rounds"])
def test_this_check_can_fail(dataset, tmp_path, monkeypatch, forgotten):
    """A client that forgot any part would not be equal."""
    run, other = (build(dataset, **HARD) for _ in range(2))
    advanced(run, checkpoints(tmp_path), first=0, last=1)
    restore = Client.restore

    def forgetful(self, **state):
        own = {
            "key": self.key,
            "private_state": self.private_state,
            "optimizer_state": self.optimizer_state,
            "rounds": self.rounds,
        }
        restore(self, **state | {forgotten: own[forgotten]})

    monkeypatch.setattr(Client, "restore", forgetful)
    checkpoints(tmp_path).restore(other)
    assert differences(everything(run), everything(other))


def test_without_checkpoints_there_is_nothing_to_restore(dataset, tmp_path):
    run = build(dataset, **EASY)
    before = everything(run)
    assert checkpoints(tmp_path / "none").restore(run) is None
    assert not differences(before, everything(run))


def clients_in(path):
    meta, _ = lockfile.read(path, kind="checkpoint", passphrase="horse")
    return set(meta)


def test_only_clients_that_changed_are_written(dataset, tmp_path):
    run, store = build(dataset, **EASY), checkpoints(tmp_path, keep=9)
    store.save(run, round=0)
    assert clients_in(tmp_path / "private-000000-0.fedkl") == {client.name for client in run.clients}
    for round in range(4):
        before = {client.name: client.rounds for client in run.clients}
        run.run_round(round)
        store.save(run, round=round + 1)
        changed = {client.name for client in run.clients if client.rounds != before[client.name]}
        assert len(changed) == 2
        assert clients_in(tmp_path / f"private-{round + 1:06d}-0.fedkl") == changed


def test_a_resumed_training_writes_only_what_changed_too(dataset, saved):
    folder, _ = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    store.restore(run)
    advanced(run, store, first=3, last=3)
    assert len(clients_in(folder / "private-000004-0.fedkl")) == 2


def test_nothing_changed_nothing_private_is_written(dataset, saved):
    folder, _ = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    store.restore(run)
    store.save(run, round=4)
    assert not list(folder.glob("private-000004*"))
    assert checkpoints(folder).restore(build(dataset, **EASY)) == 4


def test_large_states_are_spread_over_files(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("fedkl.federated.checkpoint._GROUP_BYTES", 1)
    run, other = (build(dataset, **EASY) for _ in range(2))
    advanced(run, checkpoints(tmp_path), first=0, last=0)
    assert sorted(path.name for path in tmp_path.glob("private*")) == [
        f"private-000001-{number}.fedkl" for number in range(4)
    ]
    checkpoints(tmp_path).restore(other)
    assert not differences(everything(run), everything(other))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_exactly_so_many_are_kept_and_no_orphan(dataset, tmp_path, keep):
    run, store = build(dataset, **EASY), checkpoints(tmp_path, keep=keep)
    store.save(run, round=0)
    states = {}
    for round in range(5):
        states[round + 1] = advanced(run, store, first=round, last=round)
        kept = sorted(tmp_path.glob("round-*.json"))
        assert [path.name for path in kept] == [
            f"round-{number:06d}.json" for number in range(max(0, round + 2 - keep), round + 2)
        ]
        needed = {path.name for path in kept}
        for path in kept:
            manifest = json.loads(path.read_text())
            needed |= {manifest["public"], *manifest["clients"].values()}
        assert {path.name for path in tmp_path.iterdir()} == needed
    for round in range(5, 5 - keep, -1):  # each of them can be gone back to
        other = build(dataset, **EASY)
        assert checkpoints(tmp_path, keep=keep).restore(other) == round
        assert not differences(everything(other), states[round])
        (tmp_path / f"round-{round:06d}.json").unlink()


def litter(folder):
    names = (".round-000009.json.k3j2", ".private-000003-0.fedkl.x", "private-000009-0.fedkl", ".public.y")
    for name in names:
        (folder / name).write_bytes(b"half")
    return names


@pytest.mark.parametrize("by", ["restore", "save"])
def test_what_killed_writes_have_left_goes(dataset, saved, by):
    folder, _ = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    if by == "save":
        store.restore(run)
    names = litter(folder)
    if by == "save":
        store.save(run, round=4)
    else:
        store.restore(run)
    assert not {path.name for path in folder.iterdir()}.intersection(names)
    assert checkpoints(folder).restore(build(dataset, **EASY)) == (4 if by == "save" else 3)


def flipped(path, *, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(bytes(data))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path):
    path.write_bytes(b"")


def of_another_round(path):
    path.write_bytes((path.parent / "round-000002.json").read_bytes())


def of_other_files(path):
    path.write_text(path.read_text().replace("private-000003-0", "private-000002-0"))


def of_another_version(path):
    values = _unsealed(path.read_bytes())
    path.write_bytes(_sealed(values | {"version": 9}))


def a_list(path):
    path.write_text("[1, 2]")


def unlinked(path):
    path.unlink()


NEWEST = {
    "manifest": "round-000003.json",
    "public": "public-000003.safetensors",
    "private": "private-000003-0.fedkl",
}
DAMAGE = [
    *(
        ("manifest", how)
        for how in (truncated, emptied, of_another_round, of_other_files, of_another_version, a_list)
    ),
    *((file, how) for file in ("public", "private") for how in (truncated, emptied, flipped, unlinked)),
]


@pytest.mark.parametrize(("file", "how"), DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(dataset, saved, file, how):
    folder, states = saved
    before = content(folder)
    how(folder / NEWEST[file])
    assert content(folder) != before
    run, store = build(dataset, **EASY), checkpoints(folder)
    with pytest.warns(UserWarning, match=rf"{NEWEST[file]}.*The checkpoint before it, of round 2, is used"):
        assert store.restore(run) == 2
    assert not differences(everything(run), states[2])
    assert not list(folder.glob("*-000003*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not differences(advanced(run, store, first=2, last=2), states[3])
        assert checkpoints(folder).restore(run) == 3


@pytest.mark.parametrize("byte", range(0, 100, 7))
def test_no_flipped_bit_is_taken_for_sound(dataset, saved, byte):
    """Anywhere in the files of the newest checkpoint: what is restored is the newest or the one before."""
    folder, states = saved
    run = build(dataset, **EASY)
    for file in NEWEST.values():
        copy = folder.with_name(f"{folder.name}-{file}")
        shutil.copytree(folder, copy)
        flipped(copy / file, at=byte / 100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            round = checkpoints(copy).restore(run)
        assert round in (2, 3)
        assert not differences(everything(run), states[round])


@pytest.mark.parametrize("how", [truncated, emptied, flipped])
def test_if_all_are_damaged_the_error_names_the_file(dataset, saved, how):
    folder, _ = saved
    for path in folder.glob("public-*"):
        how(path)
    run = build(dataset, **EASY)
    untouched, before = everything(run), content(folder)
    with pytest.raises(FedKLError, match=r"public-000003\.safetensors"):
        checkpoints(folder).restore(run)
    assert not differences(untouched, everything(run))
    assert content(folder) == before


def test_a_wrong_passphrase_deletes_nothing(dataset, saved):
    folder, states = saved
    before = content(folder)
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        checkpoints(folder, passphrase="donkey").restore(build(dataset, **EASY))
    assert content(folder) == before
    run = build(dataset, **EASY)
    assert checkpoints(folder).restore(run) == 3
    assert not differences(everything(run), states[3])


def test_an_empty_passphrase_is_refused(dataset, tmp_path):
    with pytest.raises(FedKLError, match="passphrase is empty"):
        checkpoints(tmp_path, passphrase="").save(build(dataset, **EASY), round=0)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_clients_is_refused(dataset, saved):
    folder, _ = saved
    before = content(folder)
    with pytest.raises(ConfigError, match="a checkpoint of 4 clients, expected 3"):
        checkpoints(folder).restore(build(dataset, **EASY | {"clients": 3}))
    assert content(folder) == before


def forms_of(run):
    """Bytes of all that is private: keys, lock layers, statistics and the optimizer's moments."""
    private = {name: t for name, t in everything(run).items() if name.startswith("client-")}
    found = {name: patterns(tensor) for name, tensor in private.items()}
    kinds = ["/key", "original0", "running_mean", "/optimizer/"]
    assert all(any(kind in name and forms for name, forms in found.items()) for kind in kinds)
    return found


def found_in(folder, forms):
    files = content(folder)
    return {
        name for name, patterns in forms.items() for data in files.values() for p in patterns if p in data
    }


def private_training(dataset, folder):
    """Byte patterns of three rounds' secrets, and the folder that must not hold them."""
    run, store = build(dataset, KeyLock(layers="all", key_length=64), **EASY), checkpoints(folder, keep=9)
    store.save(run, round=0)
    forms = {}
    for round in range(3):
        advanced(run, store, first=round, last=round)
        forms |= {f"{round}/{name}": patterns for name, patterns in forms_of(run).items()}
    return forms


def test_no_private_byte_is_in_any_file(dataset, tmp_path):
    forms = private_training(dataset, tmp_path)
    assert not found_in(tmp_path, forms)
    for data in content(tmp_path).values():
        assert b"parametrizations" not in data
        assert b"momentum_buffer/body" not in data.replace(b"optimizer/momentum_buffer/body", b"")


def test_the_search_for_private_bytes_can_fail(dataset, tmp_path, monkeypatch):
    """Without encryption it finds keys, lock layers, statistics and moments."""
    write = lockfile.write
    monkeypatch.setattr(lockfile, "write", lambda *a, **k: write(*a, **k | {"passphrase": None}))
    found = found_in(tmp_path, private_training(dataset, tmp_path))
    for kind in ("/key", "original0", "running_mean", "/optimizer/"):
        assert any(kind in name for name in found)


def test_private_files_are_for_their_owner_only(dataset, saved):
    folder, _ = saved
    before = os.umask(0)
    try:
        run, store = build(dataset, **EASY), checkpoints(folder)
        store.restore(run)
        advanced(run, store, first=3, last=4)
    finally:
        os.umask(before)
    private = list(folder.glob("private-*"))
    assert private
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}


def test_other_threads_are_warned_about(dataset, saved, two_threads):
    folder, _ = saved
    with pytest.warns(UserWarning, match="1 workers on 1 threads, resumed with 2 on 2.*OMP_NUM_THREADS=1"):
        checkpoints(folder).restore(build(dataset, execution=Execution(workers=2), **EASY))


def failing(monkeypatch, *, at):
    """The disk is full from the `at`-th write on."""
    count, fsync = [0], os.fsync

    def full(handle):
        count[0] += 1
        if count[0] >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    return count


@pytest.mark.parametrize("at", range(1, 7))  # each file is synced, and its folder after it
def test_a_full_disk_loses_nothing(dataset, saved, monkeypatch, at):
    folder, states = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    store.restore(run)
    run.run_round(3)
    with monkeypatch.context() as patch:
        count = failing(patch, at=at)
        with pytest.raises(ConfigError, match=rf"{folder}.*cannot be written \(No space left on device\)"):
            store.save(run, round=4)
        assert count[0] == at
    assert not list(folder.glob(".*"))
    other = build(dataset, **EASY)
    complete = at == 6  # only the folder's own sync was missing
    shutil.copytree(folder, copy := folder.with_name(f"{folder.name}-copy"))
    assert checkpoints(copy).restore(other) == (4 if complete else 3)
    if not complete:
        assert not differences(everything(other), states[3])
    store.save(run, round=4)  # there is room again
    assert checkpoints(folder).restore(other) == 4
    assert not differences(everything(other), everything(run))


def test_a_folder_that_cannot_be_made_is_named(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file"):
        checkpoints(tmp_path / "file").save(build(dataset, **EASY), round=0)
