"""The journal: what happened, on which machine, and a clock or a machine that is another one."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from datetime import datetime, timedelta, timezone

import pytest
import torch

from fedkl.custody import ClientStore, journal
from fedkl.custody.journal import Journal, machine_id
from fedkl.errors import ConfigError, KeyFileError, MaskingError
from fedkl.lockfile import change_passphrase
from tests.custody.setting import PASSPHRASE, client_of, member_file, member_in, opened, seen_together
from tests.masking.cohorts import TODAY

NOON = datetime(2026, 11, 29, 12, tzinfo=timezone.utc)


class Clock:
    """Stands still; tests turn it."""

    def __init__(self):
        self.time = NOON

    def __call__(self):
        return self.time


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(journal, "_now", clock)
    return clock


def events(folder):
    return [entry.what for entry in Journal(folder).read()[0]]


def test_a_clients_life_stands_in_its_journal(store, folder, clock):
    for days in (0, 0, 1, 1, 3):
        clock.time = NOON + timedelta(days=days)
        with opened(store):
            pass
    entries, damaged = Journal(folder).read()
    assert [(entry.what, entry.when.day, entry.saved) for entry in entries] == [
        ("born", 29, 1),
        ("opened", 30, 2),
        ("opened", 2, 2),
    ]
    assert damaged == 0
    assert {entry.machine for entry in entries} == {machine_id()}
    assert len(machine_id()) == 16
    assert stat.S_IMODE((folder / "journal.jsonl").stat().st_mode) == 0o600


def test_it_holds_no_secrets_and_no_name_of_the_machine(store, folder):
    import platform

    with opened(store) as client:
        secret = client.lock.key.reveal()
    path = member_in(folder, today=TODAY)
    with member_file(path) as file:
        seeds = [seed.reveal().hex() for seed in file.keys.seeds.values()]
    seen_together(folder, path)
    text = (folder / "journal.jsonl").read_text()
    assert "member joined" in text
    assert not any(word in text for word in (PASSPHRASE, platform.node(), *seeds))
    assert not any(f"{number:.4f}" in text for number in secret.tolist())


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_cut_off_hides_no_other(store, folder, cut):
    path = folder / "journal.jsonl"
    Journal(folder).note("rotated")
    path.write_bytes(path.read_bytes()[:-cut])
    Journal(folder).note("backed up")
    entries, damaged = Journal(folder).read()
    # without its line break alone a line is whole
    assert [entry.what for entry in entries] == ["born", *["rotated"] * (cut == 1), "backed up"]
    assert damaged == (cut > 1)


@pytest.mark.parametrize(
    "line",
    [b"[]", b"{}", b"\xff", b"[" * 5000, b'{"version": 0, "when": "2026-11-29T12:00:00+00:00"}', b"NaN"],
)
def test_lines_that_are_none_are_counted_and_left_out(folder, line):
    journal = Journal(folder)
    journal.note("rotated")
    journal.path.write_bytes(line + b"\n" + journal.path.read_bytes())
    entries, damaged = journal.read()
    assert [entry.what for entry in entries] == ["rotated"]
    assert damaged == 1
    values = json.loads(journal.path.read_bytes().splitlines()[-1])
    for change in ({"saved": "1"}, {"when": "2026-11-29T12:00:00"}, {"more": 1}, {"about": None}):
        journal.path.write_text(json.dumps({**values, **change}))
        assert journal.read() == ([], 1)


def test_a_link_in_its_place_is_neither_read_nor_written(folder, tmp_path):
    folder.mkdir(parents=True)
    (tmp_path / "other").write_text("mine")
    (folder / "journal.jsonl").symlink_to(tmp_path / "other")
    with pytest.raises(KeyFileError, match="symbolic link"):
        Journal(folder).note("rotated")
    with pytest.raises(KeyFileError, match="symbolic link"):
        Journal(folder).read()
    assert (tmp_path / "other").read_text() == "mine"


def test_another_machine_is_noticed_once_and_nothing_is_made_anew(
    store, folder, tmp_path, monkeypatch, caplog
):
    with opened(store) as client:
        key = client.lock.key.reveal()
    first = machine_id()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    assert machine_id() != first
    for _ in range(2):
        with opened(store) as client:
            assert torch.equal(client.lock.key.reveal(), key)
    assert caplog.text.count(f"the client was on {first}. If that one still runs it, stop one") == 1
    assert events(folder) == ["born", "moved"]
    assert Journal(folder).read()[0][-1].about == f"from {first}"


def test_a_clock_that_was_turned_back_is_named(store, folder, clock, caplog):
    clock.time = NOON + timedelta(days=9)
    with opened(store):
        pass
    clock.time = NOON + timedelta(days=8)
    with caplog.at_level(logging.WARNING), opened(store):
        assert caplog.text == ""
    for _ in range(2):  # a line of today does not make it forget the newest one
        clock.time = NOON + timedelta(days=7)
        with opened(store):
            assert "this machine's clock says 2026-12-06, but" in caplog.text
        caplog.clear()


def test_a_member_takes_no_part_while_the_clock_is_behind(store, folder, clock):
    path = member_in(folder, today=TODAY)
    clock.time = NOON + timedelta(days=2)
    seen_together(folder, path)
    clock.time = NOON
    with pytest.raises(MaskingError, match=r"no part is taken in any cohort: this machine's clock says 2026"):
        seen_together(folder, path)
    clock.time = NOON + timedelta(days=1)
    seen_together(folder, path)


def test_a_rollback_stands_in_the_journal_refused_and_accepted(store, folder):
    old = (folder / "lock.fedkl").read_bytes()
    with opened(store) as client:
        store.save(client)
    (folder / "lock.fedkl").write_bytes(old)
    for _ in range(3):
        with pytest.raises(KeyFileError, match="an older file was put in its place"), opened(store):
            pass
    (folder / "ledger.json").unlink()
    for _ in range(2):
        with opened(store) as client:
            assert client.ledger.saved == 2
    entries, _ = Journal(folder).read()
    assert [(entry.what, entry.saved, entry.about) for entry in entries[1:]] == [
        ("rolled back", 2, "refused: it was saved 3 times"),
        ("rolled back", 2, "accepted: its ledger had been removed"),
    ]


def test_a_rollback_whose_ledger_was_removed_at_once_stands_there_too(store, folder, clock):
    old = (folder / "lock.fedkl").read_bytes()
    with opened(store) as client:
        store.save(client)
    clock.time = NOON + timedelta(days=1)
    with opened(store):
        pass
    (folder / "lock.fedkl").write_bytes(old)
    (folder / "ledger.json").unlink()
    with opened(store):
        pass
    assert events(folder) == ["born", "opened", "rolled back"]
    (folder / "ledger.json").unlink()
    with opened(store):
        pass
    assert events(folder)[-1] == "ledger made anew"


def test_a_store_of_earlier_versions_gets_a_journal(store, folder):
    shutil.rmtree(folder)
    client_of(folder.parent)
    (folder / "journal.jsonl").unlink()
    with opened(ClientStore(folder.parent, passphrase=PASSPHRASE)):
        pass
    assert events(folder) == ["opened"]


def test_a_journal_that_cannot_be_written_is_named(store, folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedkl.custody.journal.os.fsync", full)
    with pytest.raises(KeyFileError, match=r"journal\.jsonl: cannot be written \(No space left"):
        Journal(folder).note("rotated")


def test_a_journal_that_cannot_be_written_keeps_nobody_from_the_lock(store, folder, caplog):
    (folder / "journal.jsonl").unlink()
    (folder / "journal.jsonl").mkdir()  # root may write to any file, but not to a folder
    with opened(store) as client:
        store.save(client)
    assert "cannot be read" in caplog.text


def test_no_new_key_where_the_journal_knows_an_older_one(store, folder, tmp_path):
    moved = tmp_path / "elsewhere" / "a"
    shutil.copytree(folder, moved)
    for name in ("lock.fedkl", "ledger.json"):
        (moved / name).unlink()
    with pytest.raises(KeyFileError, match="had a lock here, as its journal says"):
        with opened(ClientStore(moved.parent, passphrase=PASSPHRASE)):
            pass
    assert not (moved / "lock.fedkl").exists()


def test_nobody_changes_a_passphrase_under_a_node(store, folder):
    with opened(store) as client, pytest.raises(ConfigError, match="another process"):
        change_passphrase(folder / "lock.fedkl", old=PASSPHRASE, new="mule")
    with opened(store) as client:
        store.save(client)
    path = member_in(folder, today=TODAY)
    with member_file(path), pytest.raises(ConfigError, match="in use"):
        change_passphrase(path, old=PASSPHRASE, new="mule")
    change_passphrase(path, old=PASSPHRASE, new="mule")
