"""Files and folders: whole or not there, of the right mode, and nothing of anybody else's touched."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from fedkl import files
from fedkl.errors import ConfigError


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_private_files_and_their_folders_under_any_umask(tmp_path, umask):
    path = tmp_path / "a" / "b" / "file"
    files.write_atomically(path, b"x", mode=files.PRIVATE_FILE)
    assert (mode(path), mode(path.parent), mode(path.parent.parent)) == (0o600, 0o700, 0o700)
    assert files.create_once(tmp_path / "c" / "file", b"x", mode=files.PRIVATE_FILE)
    assert mode(tmp_path / "c") == 0o700


def test_other_folders_are_never_writable_for_others(tmp_path, umask):
    files.write_atomically(tmp_path / "a" / "file", b"x")
    with files.exclusive(tmp_path / "b" / "c"):
        pass
    assert {mode(tmp_path / name) for name in ("a", "b", "b/c")} == {0o755 & ~umask}


def test_new_names_are_on_disk_in_every_folder_above(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", lambda folder: synced.append(folder))
    files.write_atomically(tmp_path / "a" / "b" / "file", b"x")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]


@pytest.mark.parametrize("write", [files.write_atomically, files.create_once])
def test_a_part_that_is_there_already_is_not_written_into(tmp_path, monkeypatch, write):
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 8)
    part = tmp_path / ".file.00000000.part"
    part.write_bytes(b"somebody else's")
    with pytest.raises(FileExistsError):
        write(tmp_path / "file", b"secret", mode=files.PRIVATE_FILE)
    assert part.read_bytes() == b"somebody else's"
    part.unlink()
    part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"."):
        write(tmp_path / "file", b"secret", mode=files.PRIVATE_FILE)
    assert not (tmp_path / "elsewhere").exists()


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "file").symlink_to(tmp_path / "target")
    files.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "target").read_bytes() == b"old"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()


def test_of_several_who_create_a_file_one_wins(tmp_path):
    path, start, won = tmp_path / "file", threading.Barrier(8), []

    def create(number):
        start.wait(10)
        if files.create_once(path, str(number).encode(), mode=files.PRIVATE_FILE):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert path.read_bytes() == str(won[0]).encode()
    assert names(tmp_path) == ["file"]


KILLED = """
import os, signal, sys
from pathlib import Path
from fedkl import files
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(Path(sys.argv[1]), b"secret", mode=0o600)
"""


def test_what_a_killed_write_leaves_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=120)
    assert ended.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".file.")
    others = [".file.part", ".film.part", ".file.0123456.part", "file.01234567.part", ".other.01234567.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".folder.01234567.part").mkdir()
    (tmp_path / ".link.01234567.part").symlink_to(tmp_path / "file")
    files.remove_parts(tmp_path, of="file")
    kept = sorted([*others, ".folder.01234567.part", ".link.01234567.part"])
    assert names(tmp_path) == kept
    files.remove_parts(tmp_path)
    assert names(tmp_path) == [name for name in kept if name != ".other.01234567.part"]


def test_the_part_of_a_living_write_stays(tmp_path, monkeypatch):
    seen = []
    fsync = os.fsync

    def look(handle):
        files.remove_parts(tmp_path)
        seen.append(names(tmp_path))
        fsync(handle)

    monkeypatch.setattr("os.fsync", look)
    files.write_atomically(tmp_path / "file", b"x")
    assert seen[0][0].endswith(".part")
    assert names(tmp_path) == ["file"]


def test_a_part_that_was_removed_before_its_lock_is_made_anew(tmp_path, monkeypatch):
    flock, removed = files.fcntl.flock, []

    def late(handle, operation):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        flock(handle, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    files.write_atomically(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_only_ordinary_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name, match in (("pipe", "not an ordinary file"), ("", "Is a directory")):
        with pytest.raises(OSError, match=match):
            files.read_file(tmp_path / name)
    assert files.read_file(tmp_path / "link") == b"12345"
    with pytest.raises(OSError, match="symbolic link"):
        files.read_file(tmp_path / "link", follow=False)
    with pytest.raises(OSError, match="5 bytes, expected at most 4"):
        files.read_file(tmp_path / "file", limit=4)
    with pytest.raises(FileNotFoundError):
        files.read_file(tmp_path / "absent")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/below", "dangling", "dangling/below"):
        with pytest.raises(OSError, match=r"."):
            files.make_folder(tmp_path / name)
    assert not (tmp_path / "nowhere").exists()


def test_a_link_in_place_of_an_exclusive_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with files.exclusive(tmp_path / "link"):
        pass
    with pytest.raises(ConfigError, match="symbolic link"), files.exclusive(tmp_path / "link", follow=False):
        pass


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_disk_without_hard_links_takes_a_new_file_once(tmp_path, monkeypatch, number):
    def link(*_):
        raise OSError(number, "not permitted")

    monkeypatch.setattr(os, "link", link)
    assert files.create_once(tmp_path / "new", b"first", mode=0o600)
    assert not files.create_once(tmp_path / "new", b"second", mode=0o600)
    assert (tmp_path / "new").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
