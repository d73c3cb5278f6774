"""A backup holds a client and opens with its own passphrase; a restored member uses no mask twice."""

from __future__ import annotations

import os
import shutil
import stat
from datetime import datetime, timedelta

import pytest
import torch

from fedkl import lockfile
from fedkl.custody import backup as backups
from fedkl.custody import journal
from fedkl.custody.backup import read_backup, restore, write_backup
from fedkl.custody.journal import Journal
from fedkl.custody.ledger import Ledger
from fedkl.custody.member import new_member_of
from fedkl.errors import ConfigError, KeyFileError, MaskingError
from fedkl.masking import Call, Contribution, Layout, Member
from tests.custody.setting import (
    BACKUP,
    PASSPHRASE,
    Study,
    client_of,
    member_file,
    member_in,
    opened,
    seen_together,
)
from tests.locking.leaks import encodings
from tests.masking.cohorts import RUN, SPECS, TODAY, drawn

LATER = TODAY + timedelta(days=2)  # a maker's clock may be a day ahead

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture
def member(store, folder):
    path = member_in(folder, today=TODAY)
    seen_together(folder, path)
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "elsewhere" / "a.backup"


def back_up(folder, file):
    write_backup(folder.parent, "a", out=file, passphrase=PASSPHRASE, backup_passphrase=BACKUP)


def put_back(file, store, *, client="a", passphrase=PASSPHRASE, today=TODAY):
    found = read_backup(file, passphrase=BACKUP)
    return restore(found, store, client=client, passphrase=passphrase, today=today)


def listed(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_lost_disk_and_everything_comes_back(store, folder, member, file, tmp_path):
    with opened(store) as client:
        client.memory["momentum"] = torch.arange(3.0)
        store.save(client)
        key, kept = client.lock.key.reveal(), client.lock.private_state()
    with member_file(member) as open_member:
        seeds = {kind: seed.reveal() for kind, seed in open_member.keys.seeds.items()}
    back_up(folder, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    shutil.rmtree(folder.parent)
    new = put_back(file, tmp_path / "new store", passphrase="another machine's")
    assert sorted(path.name for path in new.iterdir()) == [
        "a.secret",
        "journal.jsonl",
        "ledger.json",
        "lock.fedkl",
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in new.iterdir()} == {0o600}
    assert stat.S_IMODE(new.stat().st_mode) == stat.S_IMODE(new.parent.stat().st_mode) == 0o700
    store = type(store)(new.parent, passphrase="another machine's")
    with opened(store) as client:
        assert torch.equal(client.lock.key.reveal(), key)
        assert torch.equal(client.memory["momentum"], torch.arange(3.0))
        now = client.lock.private_state()
        assert client.ledger.saved == 3
        assert client.ledger.member is not None
        store.save(client)
    assert all(torch.equal(tensor, now[name]) for name, tensor in kept.items())
    with type(open_member).open(new / "a.secret", passphrase="another machine's") as again:
        assert {kind: seed.reveal() for kind, seed in again.keys.seeds.items()} == seeds
    events = [entry.what for entry in Journal(new).read()[0]]
    assert events == ["born", "member joined", "restored"]


def test_a_backup_shows_nothing_and_opens_with_its_own_passphrase_only(store, folder, member, file):
    back_up(folder, file)
    with opened(store) as client:
        numbers = [client.lock.key.reveal(), *client.lock.private_state().values()]
    with member_file(member) as found:
        seeds = [seed.reveal() for seed in found.keys.seeds.values()]
    data = file.read_bytes()
    assert not any(form in data for tensor in numbers if tensor.numel() > 4 for form in encodings(tensor))
    assert not any(seed in data for seed in seeds)
    assert PASSPHRASE.encode() not in data
    for wrong in (PASSPHRASE, ""):
        with pytest.raises(KeyFileError):
            read_backup(file, passphrase=wrong)
    assert BACKUP not in repr(read_backup(file, passphrase=BACKUP))
    assert not any(seed.hex() in repr(read_backup(file, passphrase=BACKUP)) for seed in seeds)


def test_a_backup_is_never_replaced(store, folder, file):
    back_up(folder, file)
    before = file.read_bytes()
    with pytest.raises(KeyFileError, match="exists already"):
        back_up(folder, file)
    assert file.read_bytes() == before
    assert [entry.what for entry in Journal(folder).read()[0]] == ["born", "backed up"]


def test_a_backup_that_is_not_what_was_written_is_none(store, folder, file, monkeypatch):
    write = lockfile.write

    def lossy(path, *, tensors, **options):
        if options["kind"] == "backup":
            tensors = {name: tensor for name, tensor in tensors.items() if name != "lock/key"} | {
                "lock/key": tensors["lock/key"] + 1
            }
        write(path, tensors=tensors, **options)

    monkeypatch.setattr(lockfile, "write", lossy)
    with pytest.raises(KeyFileError, match="does not hold what was written"):
        back_up(folder, file)
    assert not file.exists()
    assert [entry.what for entry in Journal(folder).read()[0]] == ["born"]


@pytest.mark.parametrize("what", ["wrong passphrase", "older lock", "damaged secret", "nobody"])
def test_what_is_not_sound_is_not_backed_up(store, folder, member, file, what):
    passphrase, client = PASSPHRASE, "a"
    if what == "wrong passphrase":
        passphrase = "mule"
    elif what == "older lock":
        old = (folder / "lock.fedkl").read_bytes()
        with opened(store) as found:
            store.save(found)
        (folder / "lock.fedkl").write_bytes(old)
    elif what == "damaged secret":
        member.write_bytes(member.read_bytes()[:-1])
    else:
        client = "b"
    with pytest.raises((KeyFileError, ConfigError)):
        write_backup(folder.parent, client, out=file, passphrase=passphrase, backup_passphrase=BACKUP)
    assert not file.exists()


def test_every_flipped_byte_of_a_backup_is_refused_before_anything_is_written(store, folder, file, tmp_path):
    back_up(folder, file)
    data = file.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 40)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(KeyFileError):
            put_back(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 0}, "a backup of version 0, expected 1"),
        ({"ledger": {}}, "holds no backup that can be used"),
        ({"journal": 1}, "holds no backup"),
        ({"more": 1}, "holds no backup"),
        ({"member": []}, "holds no backup"),
        ({"member": {}}, "holds no member's keys that can be used"),
        ({"lock": {"distribution": "normal"}}, "holds no backup"),
        ({"lock": {"distribution": "other"}}, "holds no"),
    ],
)
def test_what_it_holds_is_verified(store, folder, member, file, tmp_path, change, says):
    back_up(folder, file)
    meta, tensors = lockfile.read(file, kind="backup", passphrase=BACKUP)
    lockfile.write(file, kind="backup", meta={**meta, **change}, tensors=tensors, passphrase=BACKUP)
    with pytest.raises(KeyFileError, match=says):
        put_back(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("there", ["lock", "ledger only", "something"])
def test_nothing_is_replaced(store, folder, member, file, there):
    back_up(folder, file)
    if there == "ledger only":
        (folder / "lock.fedkl").unlink()
    elif there == "something":
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    before = listed(folder)
    with pytest.raises(ConfigError, match=r"nothing was restored.*fedkl store check .* mv ") as error:
        put_back(file, folder.parent)
    assert ("this client has a lock here" in str(error.value)) == (there == "lock")
    assert listed(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["a"]
    folder.rename(folder.parent.with_name("store.before-restore"))
    put_back(file, folder.parent)
    with opened(store):
        pass


@pytest.mark.parametrize("step", ["member", "lock", "ledger", "rename"])
def test_a_restore_that_fails_leaves_nothing(store, folder, member, file, tmp_path, monkeypatch, step):
    back_up(folder, file)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    targets = {
        "member": (backups.Content, "write"),
        "lock": (lockfile, "put"),
        "ledger": (Ledger, "write"),
        "rename": (backups, "rename_new"),
    }
    found = read_backup(file, passphrase=BACKUP)
    with monkeypatch.context() as patch:
        patch.setattr(*targets[step], full)
        with pytest.raises(KeyFileError, match="No space left"):
            restore(found, tmp_path / "new", client="a", passphrase=PASSPHRASE, today=TODAY)
    assert list((tmp_path / "new").iterdir()) == []
    restore(found, tmp_path / "new", client="a", passphrase=PASSPHRASE, today=TODAY)


def test_a_client_can_get_another_name_and_its_lock_follows(store, folder, member, file, tmp_path):
    back_up(folder, file)
    put_back(file, tmp_path / "new", client="ward-3")
    with opened(type(store)(tmp_path / "new", passphrase=PASSPHRASE), "ward-3") as client:
        assert client.ledger.client == "ward-3"
    assert Journal(tmp_path / "new" / "ward-3").read()[0][-1].about.endswith("of client a")


def test_a_clock_that_is_behind_the_backup_restores_nothing(
    store, folder, file, tmp_path, monkeypatch, clock
):
    back_up(folder, file)
    monkeypatch.setattr(journal, "_now", lambda: clock - timedelta(days=3))
    with pytest.raises(ConfigError, match="nothing was restored: this machine's clock says"):
        put_back(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_member_without_a_lock_is_backed_up_too(tmp_path, file):
    folder = tmp_path / "store" / "a"
    member_in(folder, today=TODAY)
    back_up(folder, file)
    new = put_back(file, tmp_path / "new")
    assert not os.path.lexists(new / "ledger.json")
    seen_together(new, new / "a.secret")


# Masks


class Node:
    """What a node does with its member: a process that may end at any time."""

    def __init__(self, path, study):
        self.path, self.study = path, study

    def upload(self, *, round=0):
        roster = self.study.sealed.roster
        layout = Layout(specs=SPECS, words=roster.words, metrics=("loss",))
        with member_file(self.path) as file:
            member = Member(
                file.membership("study"),
                layout=layout,
                memory=file.memory("study"),
                booleans={"flag": torch.tensor([True, False])},
                today=TODAY + timedelta(days=1),
            )
            member.accept_model(RUN, drawn(1000))
            update = Contribution(tensors=drawn(round), samples=100, metrics={"loss": 0.5})
            return member.upload(Call(run=RUN, round=round, attempt=0, cohort=roster.members), update)


def pair_masks_only(monkeypatch):
    """The nonces stay, so that only pair masks tell two uploads of one update from one another."""
    monkeypatch.setattr("fedkl.masking.member.secrets.token_bytes", lambda size: bytes(size))


@pytest.mark.parametrize("mode", ["pairwise", "both"])
@pytest.mark.parametrize("used", ["used", "not used"])
def test_a_restored_member_uses_no_mask_twice(folder, file, tmp_path, monkeypatch, mode, used):
    path = member_in(folder, today=TODAY)
    study = Study(path, today=TODAY, mode=mode)
    study.join(path, today=TODAY)
    if used == "used":
        Node(path, study).upload()
    back_up(folder, file)
    pair_masks_only(monkeypatch)
    first = Node(path, study).upload(round=1)
    memory = (folder / "a.memory").read_bytes()
    restored = put_back(file, tmp_path / "new") / "a.secret"
    for there in (None, memory):
        if there is not None:
            (restored.parent / "a.memory").write_bytes(there)
        with pytest.raises(MaskingError, match=r"memory of cohort study is lost.*restored on 2026-11-29"):
            Node(restored, study).upload(round=1)
    # the control: without the count, the very same masks
    with monkeypatch.context() as patch:
        patch.setattr("fedkl.masking.memory_file.MemoryFile.last", lambda self, name, **known: None)
        again = Node(restored, study).upload(round=1)
    assert bytes(again.words) == bytes(first.words)


def test_a_restored_member_takes_part_in_an_epoch_of_a_later_day(folder, file, tmp_path):
    path = member_in(folder, today=TODAY)
    study = Study(path, today=TODAY, mode="both")
    study.join(path, today=TODAY)
    back_up(folder, file)
    restored = put_back(file, tmp_path / "new") / "a.secret"
    study.change(today=LATER)
    study.join(restored, today=LATER)
    assert Node(restored, study).upload().member == "a"


def test_an_epoch_of_the_next_day_may_have_been_joined_before(folder, file, tmp_path):
    """Around midnight, say, by a maker whose clock was ahead."""
    path = member_in(folder, today=TODAY)
    back_up(folder, file)
    study = Study(path, today=TODAY + timedelta(days=1), mode="both")
    restored = put_back(file, tmp_path / "new") / "a.secret"
    study.join(restored, today=TODAY)
    with pytest.raises(MaskingError, match=r"memory of cohort study is lost.*from 2026-12-01 \(UTC\) on"):
        Node(restored, study).upload()


@pytest.mark.parametrize("what", ["a new epoch", "a new cohort"])
def test_what_was_joined_after_the_backup_is_forgotten_and_takes_no_part(
    folder, file, tmp_path, monkeypatch, what
):
    path = member_in(folder, today=TODAY - timedelta(days=5))
    if what == "a new epoch":
        study = Study(path, today=TODAY - timedelta(days=5), mode="both")
        study.join(path, today=TODAY - timedelta(days=5))
        back_up(folder, file)
        study.change(today=TODAY)
    else:
        back_up(folder, file)
        study = Study(path, today=TODAY, mode="both")
    study.join(path, today=TODAY)
    pair_masks_only(monkeypatch)
    Node(path, study).upload()
    restored = put_back(file, tmp_path / "new") / "a.secret"
    study.join(restored, today=TODAY)
    with pytest.raises(MaskingError, match="memory of cohort study is lost"):
        Node(restored, study).upload()
    study.change(today=LATER)
    study.join(restored, today=LATER)
    Node(restored, study).upload()


def test_a_second_restore_of_a_restored_member_forgets_again(folder, file, tmp_path):
    path = member_in(folder, today=TODAY)
    back_up(folder, file)
    restored = put_back(file, tmp_path / "new") / "a.secret"
    study = Study(restored, today=LATER, mode="both")
    study.join(restored, today=LATER)
    Node(restored, study).upload()
    again = tmp_path / "second.backup"
    write_backup(tmp_path / "new", "a", out=again, passphrase=PASSPHRASE, backup_passphrase=BACKUP)
    second = put_back(again, tmp_path / "newer", today=LATER) / "a.secret"
    with pytest.raises(MaskingError, match="is lost"):
        Node(second, study).upload(round=1)
    assert path.exists()


# What a review found


@pytest.mark.parametrize(
    ("gone", "says"), [("lock.fedkl", r"lock\.fedkl: gone"), ("hospital-a.secret", "is gone")]
)
def test_a_backup_without_what_the_ledger_knows_is_none(store, folder, file, gone, says):
    seen_together(folder, member_in(folder, today=TODAY, name="hospital-a"))
    (folder / gone).unlink()
    with pytest.raises(KeyFileError, match=says):
        back_up(folder, file)
    assert not file.exists()


def test_a_clock_behind_the_day_of_the_backup_restores_nothing(store, folder, member, file, tmp_path):
    (folder / "journal.jsonl").unlink()
    back_up(folder, file)
    made = datetime.fromisoformat(read_backup(file, passphrase=BACKUP).made).date()
    with pytest.raises(ConfigError, match="the backup was made on"):
        put_back(file, tmp_path / "new", today=made - timedelta(days=1))
    assert not (tmp_path / "new").exists()


def test_one_member_is_not_restored_beside_itself(store, folder, member, file):
    back_up(folder, file)
    with pytest.raises(ConfigError, match="two clients of one member"):
        put_back(file, folder.parent, client="b")
    assert not (folder.parent / "b").exists()


@pytest.mark.parametrize("lock", [False, True], ids=["no lock", "a lock that never saw its member"])
def test_nor_beside_itself_where_no_ledger_knows_it(tmp_path, file, lock):
    folder = tmp_path / "store" / "a"
    if lock:
        client_of(folder.parent)
    elsewhere = member_in(tmp_path / "elsewhere store" / "a", today=TODAY)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(elsewhere, folder / elsewhere.name)
    back_up(elsewhere.parent, file)
    with pytest.raises(ConfigError, match="two clients of one member"):
        put_back(file, folder.parent, client="b")
    assert not (folder.parent / "b").exists()


def test_another_member_of_that_name_is_not_taken_for_it(store, folder, member, file, tmp_path):
    """The ledger knows it."""
    other = member_in(tmp_path / "elsewhere store" / "a", today=TODAY)
    back_up(other.parent, file)
    put_back(file, folder.parent, client="b")
    assert (folder.parent / "b" / other.name).exists()


def test_a_restored_member_that_never_had_a_lock_gets_its_first(tmp_path, file, monkeypatch):
    noted = []
    monkeypatch.setattr(backups, "remember_birth", lambda *place: noted.append(place))
    folder = tmp_path / "store" / "a"
    member_in(folder, today=TODAY)
    back_up(folder, file)
    put_back(file, tmp_path / "new")
    assert not noted


def test_a_file_in_the_clients_place_is_said_so(store, folder, file, tmp_path):
    back_up(folder, file)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").write_text("")
    with pytest.raises(ConfigError, match="cannot be looked into"):
        put_back(file, tmp_path / "new")


def test_no_store_no_member(tmp_path):
    with pytest.raises(ConfigError, match="no such store"):
        new_member_of(tmp_path / "nomount" / "a", "a", passphrase=PASSPHRASE, today=TODAY)
    assert not (tmp_path / "nomount").exists()
