"""`fedkl store`: what is checked, in words and without secrets, and the whole way from a store to another."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta

import pytest

from fedkl import cli as _cli  # noqa: F401 (its modules are patched by name)
from fedkl import lockfile
from fedkl.custody.check import check_store
from fedkl.custody.journal import Journal, JournalEntry
from tests.custody.setting import PASSPHRASE, Study, client_of, member_file, member_in, opened, seen_together
from tests.masking.cohorts import TODAY
from tests.test_cli import fedkl as fedkl


@pytest.fixture(autouse=True)
def _today(monkeypatch):
    for command in ("member", "cohort", "store"):
        monkeypatch.setattr(f"fedkl.cli.{command}.today", lambda: TODAY)
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def member(folder):
    client_of(folder.parent)
    path = member_in(folder, today=TODAY)
    seen_together(folder, path)
    Study(path, today=TODAY).join(path, today=TODAY)
    return path


def found(folder, *, today=TODAY, passphrase=PASSPHRASE):
    return check_store(folder.parent, passphrase=passphrase, today=today)


def problems(folder, **options):
    return [fact.text for fact in found(folder, **options) if fact.level == "problem"]


def test_a_sound_store_says_what_it_holds_and_no_secret(folder, member, fedkl):
    code, text = fedkl("store", "check", folder.parent)
    assert code == 0, text
    for said in (
        "a: lock.fedkl: opens; key of 16 numbers, normal.",
        "saved 2 times, file version 1.",
        "a: ledger.json: fits the lock; born ",
        "a: a.secret: opens; member a, file version 1.",
        "a: card of a: good until 2027-11-29, 365 days left.",
        "a: cohort study, epoch 0, 3 members: good until 2027-02-27, 90 days left.",
        "a: Note: never backed up.",
        "UTC member joined (a), machine ",
    ):
        assert said in text
    assert text.startswith("a: Note: "), "the worst first"
    with opened(client_of(folder.parent)) as client:
        numbers = client.lock.key.reveal().tolist()
    with member_file(member) as file:
        secrets = [seed.reveal().hex() for seed in file.keys.seeds.values()]
        secrets.append(file.membership().secret.reveal().hex())
    assert not any(f"{number:.4f}" in text for number in numbers)
    assert not any(secret in text for secret in (PASSPHRASE, *secrets))


def test_nothing_is_changed_and_a_running_node_is_not_in_the_way(folder, member):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with opened(client_of(folder.parent)), member_file(member):
        during = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert problems(folder) == []
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == during
    assert before.keys() == during.keys()


def damage(folder, member, name):
    lock = folder / "lock.fedkl"
    if name in ("lock damaged", "secret damaged"):
        path = lock if name == "lock damaged" else member
        path.write_bytes(path.read_bytes()[:-1])
    elif name == "lock gone":
        lock.unlink()
    elif name == "secret gone":
        member.unlink()
    elif name == "lock older":
        old = lock.read_bytes()
        client_of(folder.parent)
        lock.write_bytes(old)
    elif name == "ledger damaged":
        (folder / "ledger.json").write_text("{}")
    elif name == "open to others":
        lock.chmod(0o644)
    elif name == "another member":
        member.unlink()
        (folder / "a.member").unlink()
        other = member_in(folder.parent.parent / "x", today=TODAY, name="other")
        shutil.copy(other, folder / "other.secret")
    elif name == "two members":
        shutil.copy(member, folder / "b.secret")
    elif name == "memory gone":
        with member_file(member) as file:
            memory = file.memory()
            memory.sets["a"] = "b"
            memory.keep(memory)
        (folder / "a.memory").unlink()
    elif name == "clock":
        entry = JournalEntry(
            when=Journal(folder).read()[0][-1].when + timedelta(days=3), what="opened", machine=""
        )
        with (folder / "journal.jsonl").open("ab") as file:
            file.write(entry.line())
    else:
        folder.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "lock damaged": "truncated or extended",
        "secret damaged": "a.secret: truncated or extended",
        "lock gone": "lock.fedkl: gone. This client had a lock here",
        "secret gone": "its member's file is gone",
        "lock older": "an older file was put in its place",
        "ledger damaged": "ledger.json: damaged",
        "open to others": "lock.fedkl: open to others. Run chmod go=",
        "another member": "not the member that this client has had",
        "two members": "expected one member's secret file, got a.secret, b.secret",
        "memory gone": "the memory of cohort study is lost",
        "clock": "this machine's clock says",
        "store open": "everybody may write to this store",
    }.items(),
)
def test_a_problem_is_said_in_words(folder, member, fedkl, name, says):
    damage(folder, member, name)
    code, text = fedkl("store", "check", folder.parent)
    assert code == 2
    assert says in text
    first = text.splitlines()[0]
    assert "PROBLEM: " in first or name == "store open"
    assert len(problems(folder)) == 1, problems(folder)


def test_another_passphrase_opens_nothing(folder, member):
    texts = problems(folder, passphrase="mule")
    assert len(texts) == 2
    assert all("wrong passphrase" in text for text in texts)


def test_what_has_expired_is_a_problem(folder, member):
    texts = problems(folder, today=TODAY + timedelta(days=91))
    assert texts == ["cohort study, epoch 0, 3 members: expired on 2027-02-27."]
    assert "card of a: expired on 2027-11-29." in problems(folder, today=TODAY + timedelta(days=366))


def test_what_lies_around_is_named(folder, member):
    lockfile.keep_copy(folder / "lock.fedkl")
    (folder / "notes\n.txt").write_text("mine")
    (folder / "notes\n.txt").chmod(0o600)
    notes = [fact.text for fact in found(folder) if fact.level == "note"]
    assert any("lock.fedkl.old-1: an old copy" in text for text in notes)
    assert any("notes\\n.txt: none of fedkl's files" in text for text in notes)


@pytest.mark.parametrize("there", ["nothing", "empty", "no such client"])
def test_a_store_that_is_not_there(fedkl, tmp_path, there):
    if there != "nothing":
        (tmp_path / "store").mkdir()
    words = ("--client", "a") if there == "no such client" else ()
    code, text = fedkl("store", "check", tmp_path / "store", *words)
    assert code == 2
    assert ("no client of this name" if words else "Is the disk mounted?") in text


def test_a_member_is_made_in_the_store_and_joins_there(folder, fedkl, tmp_path, monkeypatch):
    client_of(folder.parent)
    code, text = fedkl("member", "new", "hospital-a", "--store", folder.parent, "--client", "a")
    assert code == 0, text
    assert (folder / "hospital-a.secret").is_file()
    assert [fact.text for fact in found(folder) if "hospital-a.secret" in fact.text]
    code, text = fedkl("member", "new", "other", "--store", folder.parent, "--client", "a")
    assert code == 2
    assert "this client has a member already" in text
    assert not (folder / "other.secret").exists()
    code, text = fedkl("member", "new", "b", "--store", folder.parent)
    assert code == 0
    assert (folder.parent / "b" / "b.secret").is_file()
    assert fedkl("member", "new", "c", "--client", "c")[0] == 2


@pytest.mark.usefixtures("clock")
def test_backup_and_restore_on_another_machine(folder, member, fedkl, tmp_path, monkeypatch):
    file, new = tmp_path / "disk" / "a.backup", tmp_path / "new store"
    monkeypatch.setenv("FEDKL_BACKUP_PASSPHRASE", "battery staple")
    code, text = fedkl("store", "backup", folder.parent, "--client", "a", "--out", file)
    assert code == 0, text
    assert "written, read back and compared" in text
    assert fedkl("store", "backup", folder.parent, "--client", "a", "--out", file)[0] == 2
    code, text = fedkl("store", "check", folder.parent)
    assert code == 0
    assert "a: last backup: " in text
    passphrase = tmp_path / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text("of the new machine")
    words = ("store", "restore", file, "--out", new, "--passphrase-file", passphrase)
    monkeypatch.setenv("FEDKL_BACKUP_PASSPHRASE", "mule")
    assert "wrong passphrase" in fedkl(*words)[1]
    monkeypatch.setenv("FEDKL_BACKUP_PASSPHRASE", "battery staple")
    code, text = fedkl(*words)
    assert code == 0, text
    assert "Member a opens sums of study, and takes no part" in text
    assert "fedkl store check" in fedkl(*words)[1]
    code, text = fedkl("store", "check", new, "--passphrase-file", passphrase)
    assert code == 2
    assert "a: PROBLEM: " in text
    assert "the memory of cohort study is lost" in text
    assert text.count("PROBLEM") == 1
    assert not any(word in text for word in ("battery staple", "of the new machine", PASSPHRASE))


def test_a_changed_passphrase_stands_in_the_journal(folder, member, fedkl, monkeypatch):
    monkeypatch.setenv("FEDKL_NEW_PASSPHRASE", "mule")
    for path in (folder / "lock.fedkl", member):
        assert fedkl("key", "passphrase", path)[0] == 0
    entries = Journal(folder).read()[0][-2:]
    assert [(entry.what, entry.about) for entry in entries] == [
        ("passphrase changed", "lock.fedkl"),
        ("passphrase changed", "a.secret"),
    ]
    assert problems(folder, passphrase="mule") == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_in_a_clients_folder_does_not_hang(folder, member):
    (folder / "journal.jsonl").unlink()
    os.mkfifo(folder / "journal.jsonl", 0o600)
    assert any("not an ordinary file" in text for text in problems(folder))


def test_other_folders_are_named_and_keep_no_client_from_being_checked(folder, member):
    (folder.parent / "lost+found").mkdir()
    (folder.parent / ".a.x.restoring").mkdir()
    facts = check_store(folder.parent, passphrase=PASSPHRASE, today=TODAY)
    said = {fact.text for fact in facts if not fact.client}
    assert any(text.endswith("lost+found: no client's folder.") for text in said)
    assert any("left by a restore that was killed" in text for text in said)
    assert any(fact.client == "a" and "opens" in fact.text for fact in facts)
