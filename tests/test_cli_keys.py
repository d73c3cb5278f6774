"""`fedkl key`: files that are made, looked at, replaced, and given another passphrase."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

import fedkl as library
from tests.test_cli import fedkl as fedkl

PASSPHRASE = "correct horse"


@pytest.fixture
def path(fedkl, tmp_path):
    path = tmp_path / "alice.key"
    assert fedkl("key", "new", path, "--length", 64)[0] == 0
    return path


def load(path, passphrase=PASSPHRASE):
    return library.load_key(path, passphrase=passphrase).reveal()


def test_rotation_makes_another_key_and_keeps_the_old_one(fedkl, path):
    old = load(path)
    code, text = fedkl("key", "rotate", path)
    assert code == 0
    assert "alice.key.old-1: the old one" in text
    assert not torch.equal(load(path), old)
    assert len(load(path)) == 64
    assert torch.equal(load(path.with_name("alice.key.old-1")), old)
    assert fedkl("key", "rotate", path)[0] == 0
    assert torch.equal(load(path.with_name("alice.key.old-1")), old)


def test_a_new_key_never_replaces_one_that_came_meanwhile(fedkl, tmp_path, monkeypatch):
    path = tmp_path / "k"
    first = library.Key.generate(length=8)

    def meanwhile(**options):
        library.save_key(first, path, passphrase=None)
        return PASSPHRASE

    monkeypatch.setattr("fedkl.cli.key._passphrase", meanwhile)
    code, text = fedkl("key", "new", path)
    assert code == 2
    assert "exists already" in text
    assert torch.equal(load(path, None), first.reveal())


def test_the_passphrase_is_changed(fedkl, path, monkeypatch):
    before = load(path)
    monkeypatch.setenv("FEDKL_NEW_PASSPHRASE", "mule")
    code, text = fedkl("key", "passphrase", path)
    assert code == 0
    assert "opens with the new passphrase only" in text
    assert torch.equal(load(path, "mule"), before)
    code, text = fedkl("key", "passphrase", path)
    assert code == 2
    assert "wrong passphrase" in text
    for bad in ("", "\udcff"):
        monkeypatch.setenv("FEDKL_PASSPHRASE", "mule")
        monkeypatch.setenv("FEDKL_NEW_PASSPHRASE", bad)
        assert fedkl("key", "passphrase", path)[0] == 2
        assert torch.equal(load(path, "mule"), before)


def test_an_unencrypted_key_gets_a_passphrase(fedkl, tmp_path, monkeypatch):
    path = tmp_path / "k"
    assert fedkl("key", "new", path, "--unencrypted", "--length", 8)[0] == 0
    before = load(path, None)
    monkeypatch.setenv("FEDKL_NEW_PASSPHRASE", "mule")
    assert fedkl("key", "passphrase", path)[0] == 2
    assert fedkl("key", "passphrase", path, "--unencrypted")[0] == 0
    assert torch.equal(load(path, "mule"), before)


def test_passphrases_come_from_files(fedkl, tmp_path, monkeypatch):
    monkeypatch.delenv("FEDKL_PASSPHRASE")
    path, first, second = tmp_path / "k", tmp_path / "first", tmp_path / "second"
    for file in (first, second):
        file.write_text(f"{file.name}\n")
        file.chmod(0o600)
    assert fedkl("key", "new", path, "--length", 8, "--passphrase-file", first)[0] == 0
    before = load(path, "first")
    assert fedkl("key", "info", path, "--passphrase-file", first)[0] == 0
    assert "wrong passphrase" in fedkl("key", "info", path, "--passphrase-file", second)[1]
    changed = fedkl("key", "passphrase", path, "--passphrase-file", first, "--new-passphrase-file", second)
    assert changed[0] == 0
    assert torch.equal(load(path, "second"), before)
    assert fedkl("key", "rotate", path, "--passphrase-file", second)[0] == 0
    assert not torch.equal(load(path, "second"), before)
    code, text = fedkl("key", "new", tmp_path / "other", "--unencrypted", "--passphrase-file", first)
    assert code == 2
    assert "exclude each other" in text
    assert not (tmp_path / "other").exists()


def test_a_pipe_in_place_of_a_key_does_not_hang(fedkl, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    done = threading.Event()
    result = []

    def ask():
        result.append(fedkl("key", "info", tmp_path / "pipe"))
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    assert done.wait(60)
    assert result[0][0] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="bytes in the environment")
def test_a_passphrase_that_is_no_text(fedkl, path, monkeypatch):
    monkeypatch.setenv("FEDKL_PASSPHRASE", "horse\udcff")
    code, text = fedkl("key", "info", path)
    assert code == 2
    assert "not text in UTF-8" in text
    assert "horse" not in text


@pytest.mark.parametrize("option", [("--keep-function",), ("--client", "a"), ("--epochs", "3")])
def test_options_of_locks_are_not_taken_for_key_files(fedkl, path, option):
    before = load(path)
    code, text = fedkl("key", "rotate", path, *option)
    assert code == 2
    assert f"{option[0]}: of a lock" in text
    assert torch.equal(load(path), before)


@pytest.mark.parametrize(
    ("content", "said"), [(b"one\ntwo\n", "in one line, got several"), (b"\xef\xbb\xbfmule\r\n", None)]
)
def test_a_passphrase_is_one_line(fedkl, tmp_path, content, said):
    file, path = tmp_path / "passphrase", tmp_path / "k"
    file.write_bytes(content)
    file.chmod(0o600)
    code, text = fedkl("key", "new", path, "--length", 8, "--passphrase-file", file)
    if said is None:
        assert code == 0
        load(path, "mule")  # without the mark that editors on Windows put in front
    else:
        assert (code, said in text, path.exists()) == (2, True, False)
