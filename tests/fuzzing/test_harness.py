"""The harness itself: what is broken on purpose is found, and what it changes stays readable."""

from __future__ import annotations

import importlib
import os
import random
import re
import signal
import time
import warnings
from unittest import mock

import pytest

from fedkl.errors import ConfigError
from tests.fuzzing import engine, mutation, surfaces
from tests.fuzzing.archive import packed, unpacked
from tests.fuzzing.binaries import opened, sealed
from tests.fuzzing.contract import Finding
from tests.fuzzing.engine import Engine, HarnessError, Plan
from tests.fuzzing.state import Store
from tests.fuzzing.surface import Surface
from tests.fuzzing.tensors import read_safetensors, written_safetensors
from tests.fuzzing.worker import Limits, smaller

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")


@pytest.mark.parametrize("name", surfaces.names())
def test_a_broken_target_is_found(unchecked, tmp_path, name):
    surface = surfaces.surface(name)
    place, _, attribute = surface.target.rpartition(".")
    seed = surface.prepared()[0]
    broken = mock.patch.object(_imported(place), attribute, side_effect=RuntimeError("on purpose"))
    with broken, pytest.raises(Finding, match=r"RuntimeError at .*: on purpose"):
        surface.run(seed, tmp_path)


def _imported(place: str) -> object:
    """A module, or a class in one."""
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, name = place.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", surfaces.names())
def test_seeds_are_sound(unchecked, tmp_path, name):
    surface = surfaces.surface(name)
    outcomes = [surface.run(data, tmp_path) for data in surface.prepared()]
    assert any(outcome.startswith("accepted") for outcome in outcomes)


@pytest.mark.parametrize("name", surfaces.names())
def test_anything_can_be_changed(name):
    surface, rng = surfaces.surface(name), random.Random(0)
    pool = [b"", b"=== a ===\n", *surface.prepared()]
    for number in range(150):
        data = surface.mutate(rng.choice(pool), rng, rng.choice(pool))
        assert isinstance(data, bytes)
        if number % 5 == 0:
            pool.append(data)


@pytest.mark.parametrize("form", ["json", "toml"])
def test_numbers_that_no_float_holds_are_changed_too(form):
    data = b'{"n": 1' + b"0" * 400 + b"}" if form != "toml" else b"n = 1" + b"0" * 400
    rng = random.Random(0)
    assert all(isinstance(mutation.mutated(data, form, rng), bytes) for _ in range(300))


@pytest.mark.parametrize("form", mutation.FORMS)
def test_any_bytes_are_changed_in_any_form(form):
    rng = random.Random(1)
    for size in [0, 1, 3, 8, 12, 100, 600] * 20:
        assert isinstance(mutation.mutated(rng.randbytes(size), form, rng, rng.randbytes(9)), bytes)


class Toy(Surface):
    """Whatever a test wants of it."""

    name = "keys"

    def __init__(self, act):
        self._act = act

    def seeds(self):
        return [b"seed", b"other"]

    def call(self, data, sandbox):
        self._act(data, sandbox)


def found(act, tmp_path, *, inputs=3, patience=0.5, surface=Toy):
    """First lines of the findings of a worker that runs a toy."""
    limits = Limits(patience=patience, inputs=inputs, memory=1 << 28)
    made = surface(act)
    Engine(Plan(surfaces=["keys"], state=tmp_path, limits=limits, made=lambda name: made)).run()
    return [(path / "report.txt").read_text().splitlines()[0] for path in Store(tmp_path, "keys").findings()]


def _hang(data, sandbox):
    time.sleep(60)


def _hang_for_good(data, sandbox):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)


def _die(data, sandbox):
    os.kill(os.getpid(), signal.SIGSEGV)


def _leave(data, sandbox):
    os._exit(7)


def _take_memory(data, sandbox):
    bytearray(1 << 30)


def _delete(data, sandbox):
    (sandbox.base / "outside" / "canary.txt").unlink()


def _write_through_link(data, sandbox):
    sandbox.write({"link": b"@link target"})
    (sandbox.place / "link").unlink()
    (sandbox.place / "link").symlink_to(sandbox.base / "outside" / "target.txt")
    (sandbox.place / "link").write_text("changed")


def _write_beside(data, sandbox):
    (sandbox.base / "new.txt").write_text("new")


def _long_text(data, sandbox):
    raise ConfigError("a" * 30_000)


def _control_code(data, sandbox):
    raise ConfigError("\x1b[31mred")


def _unprintable(data, sandbox):
    raise ConfigError("\udc80")


def _warn_with_a_control_code(data, sandbox):
    warnings.warn("\x1b[31mred", stacklevel=1)  # of fedkl, as far as can be seen from here


ACTS = {
    _hang: "Hang at .* in _hang",
    _hang_for_good: "a hang that no signal could end",
    _die: r"the process died \(SIGSEGV\)",
    _leave: r"the process died \(exit code 7\)",
    _take_memory: "MemoryError",
    _delete: "changed or deleted: outside/canary.txt",
    _write_through_link: "changed or deleted: outside/target.txt",
    _write_beside: "changed or deleted: new.txt",
    _long_text: "more than 20000 characters",
    _control_code: "a control code",
    _unprintable: "a lone surrogate",
    _warn_with_a_control_code: "warning of .* a control code",
}


@needs_fork
@pytest.mark.parametrize(("act", "expected"), ACTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_worker_finds(tmp_path, monkeypatch, act, expected):
    if act is _hang_for_good:
        monkeypatch.setattr(engine, "_GRACE", 1.0)  # it answers no alarm, however long it is given
    lines = found(act, tmp_path, inputs=1)
    assert len(lines) == 1
    assert re.search(expected, lines[0])


@needs_fork
def test_the_run_goes_on_after_a_death(tmp_path):
    def act(data, sandbox):
        if data == b"seed":
            os.kill(os.getpid(), signal.SIGKILL)

    assert found(act, tmp_path, inputs=20) == ["the process died (SIGKILL)"]
    assert Store(tmp_path, "keys").counts()["inputs"] == 20


@needs_fork
def test_a_second_run_adds_to_the_first(tmp_path):
    seen = tmp_path / "seen"

    def act(data, sandbox):
        with seen.open("ab") as file:
            file.write(data.hex().encode() + b"\n")

    assert found(act, tmp_path / "state", inputs=30) == []
    assert found(act, tmp_path / "state", inputs=30) == []
    lines = seen.read_text().splitlines()
    assert Store(tmp_path / "state", "keys").counts()["inputs"] == len(lines) == 60
    assert lines[:2] == [b"seed".hex(), b"other".hex()]
    assert lines[:30] != lines[30:]


@needs_fork
def test_the_same_seed_gives_the_same_inputs(tmp_path):
    runs = []
    for attempt in range(2):
        seen = tmp_path / f"seen-{attempt}"

        def act(data, sandbox, seen=seen):
            with seen.open("ab") as file:
                file.write(data.hex().encode() + b"\n")

        found(act, tmp_path / str(attempt), inputs=40)
        runs.append(seen.read_text())
    assert runs[0] == runs[1]


@needs_fork
def test_a_harness_that_fails_itself_is_no_finding(tmp_path):
    class Broken(Toy):
        def mutate(self, data, rng, other=b""):
            raise KeyError("a bug of ours")

    with pytest.raises(HarnessError, match="a bug of ours"):
        found(lambda data, sandbox: None, tmp_path, surface=Broken)


@needs_fork
def test_findings_of_one_cause_are_one_with_a_small_input(tmp_path):
    def act(data, sandbox):
        if b"s" in data:
            raise ValueError(f"{len(data)}")

    assert len(found(act, tmp_path, inputs=50)) == 1
    folder = Store(tmp_path, "keys").findings()[0]
    assert (folder / "input").read_bytes() == b"s"
    assert "--replay" in (folder / "report.txt").read_text()


def test_files_outside_are_not_even_opened(tmp_path):
    class Confined(Toy):
        confined = True

    def act(data, sandbox):
        (sandbox.place / "../outside/target.txt").read_bytes()

    with pytest.raises(Finding, match=r"was opened: \.\./outside/target\.txt"):
        Confined(act).run(b"", tmp_path)


def test_files_of_somebody_else_stay(tmp_path):
    class Guarded(Toy):
        precious = ("notes.txt",)

    with pytest.raises(Finding, match=r"changed or deleted: place/notes\.txt"):
        Guarded(lambda data, sandbox: (sandbox.place / "notes.txt").unlink()).run(b"", tmp_path)


def test_names_cannot_lead_out_of_the_folder(tmp_path):
    def act(data, sandbox):
        sandbox.write({"../a": b"", str(tmp_path / "b"): b"", "c/../../d": b"", "e": b"@link ../f", "g": b""})
        assert sorted(path.name for path in sandbox.place.iterdir()) == ["e", "g"]
        assert (sandbox.place / "e").resolve() == sandbox.base.resolve() / "outside" / "target.txt"

    assert Toy(act).run(b"", tmp_path / "base").startswith("accepted")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_files_come_back_from_an_input():
    rng = random.Random(0)
    names = ("a", "b/c", "é", "\x1b[31m", "\udcff", "50%", "=== x ===", "a\nb")
    for _ in range(300):
        files = {rng.choice(names): rng.randbytes(rng.randrange(30)) + b"\n" for _ in range(rng.randrange(4))}
        assert unpacked(packed(files)) == files


def test_what_is_sealed_again_opens():
    surface = surfaces.surface("keys")
    for data in surface.prepared():
        fields, plain = opened(data)
        assert opened(sealed(fields, plain + b"x"))[1] == plain + b"x"
        meta, entries = read_safetensors(plain)
        assert read_safetensors(written_safetensors(meta, entries)) == (meta, entries)


def test_the_smallest_input_is_looked_for():
    assert smaller(b"abcdefgh" * 20, lambda data: b"d" in data) == b"d"
