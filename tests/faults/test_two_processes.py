"""Two processes on one store or run directory, a moved machine, and a clock that is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import timedelta

import pytest
from torch import nn

from fedkl import lockfile
from fedkl.config import TrainConfig
from fedkl.custody import ClientStore
from fedkl.defenses import KeyLock
from fedkl.errors import ConfigError, KeyFileError, MaskingError
from fedkl.masking import MemberFile, MemberKeys, Rules, new_roster
from fedkl.study import begun
from tests.masking.cohorts import TODAY

PASSPHRASE = "correct horse"

HOLDS = """
import sys
from pathlib import Path
from fedkl import lockfile
from fedkl.config import TrainConfig
from fedkl.masking import MemberFile
from fedkl.study import begun
from tests.faults.test_two_processes import opened, PASSPHRASE
lockfile._SCRYPT = {"n": 2, "r": 1, "p": 1}
folder = Path(sys.argv[1])
with opened(folder), MemberFile.open(folder / "a.secret", passphrase=PASSPHRASE), begun(
    TrainConfig(), out=folder / "run"
):
    print("ready", flush=True)
    sys.stdin.read()
"""


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def opened(folder, passphrase=PASSPHRASE):
    store = ClientStore(folder / "store", passphrase=passphrase)
    return store.client("a", model=net(), defense=KeyLock())


def numbers(folder, passphrase=PASSPHRASE):
    with opened(folder, passphrase) as client:
        return client.lock.key.reveal().tolist()


def state(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def member(folder, passphrase=PASSPHRASE):
    keys = MemberKeys.new("a", today=TODAY)
    MemberFile.create(folder / "a.secret", keys, passphrase=passphrase).close()


def test_two_processes(tmp_path):
    key = numbers(tmp_path)
    member(tmp_path)
    with begun(TrainConfig(), out=tmp_path / "run"):
        pass
    before = state(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(ConfigError, match="another process is running"), opened(tmp_path):
            pass
        with pytest.raises(ConfigError, match="in use, by another process"):
            MemberFile.open(tmp_path / "a.secret", passphrase=PASSPHRASE)
        with pytest.raises(ConfigError, match="another process is running"):
            with begun(TrainConfig(), out=tmp_path / "run"):
                pass
    finally:
        other.communicate("", timeout=60)
    assert state(tmp_path) == before
    assert numbers(tmp_path) == key


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """Moves to a machine: another home, with nothing in it at first."""
    monkeypatch.setattr(lockfile, "_SCRYPT", {"n": 2, "r": 1, "p": 1})

    def move(name):
        monkeypatch.setenv("HOME", str(tmp_path / name))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / name / "config"))
        return tmp_path / name / "data"

    return move


def test_a_moved_machine_without_its_passphrase_makes_no_new_key(machines, monkeypatch):
    old = machines("old")
    given = lockfile.default_passphrase()
    key = numbers(old, given)
    member(old, given)
    new = machines("new")
    shutil.copytree(old, new)
    before = state(new)
    other = lockfile.default_passphrase()
    assert other != given
    with pytest.raises(KeyFileError, match="wrong passphrase") as caught, opened(new, other):
        pass
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        MemberFile.open(new / "a.secret", passphrase=other)
    assert state(new) == before
    monkeypatch.setenv("FEDKL_PASSPHRASE", given)
    assert numbers(new, lockfile.default_passphrase()) == key
    MemberFile.open(new / "a.secret", passphrase=lockfile.default_passphrase()).close()


@pytest.mark.parametrize(
    ("days", "says"),
    [(400, "expired on"), (-30, "the clock of this machine is behind")],
    ids=["ahead", "back"],
)
def test_a_clock_that_jumps_costs_a_sentence(tmp_path, monkeypatch, days, says):
    monkeypatch.setattr(lockfile, "_SCRYPT", {"n": 2, "r": 1, "p": 1})
    keys = [MemberKeys.new(name, today=TODAY) for name in "abc"]
    cards = [each.card() for each in keys]
    sealed = new_roster(name="study", cards=cards, rules=Rules(), signer=keys[0], today=TODAY)
    with MemberFile.create(tmp_path / "a.secret", keys[0], passphrase=PASSPHRASE) as file:
        file.join(sealed, today=TODAY, fingerprint=sealed.roster.fingerprint)
        before = state(tmp_path)
        with pytest.raises(MaskingError, match=says) as caught:
            file.check(sealed, today=TODAY + timedelta(days=days))
        assert "set this machine's clock" in str(caught.value)
        assert state(tmp_path) == before
        file.check(sealed, today=TODAY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder; test_disks.py has a mount")
def test_a_folder_that_is_not_mine(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"), opened(tmp_path):
        pass
    tmp_path.chmod(0o700)
