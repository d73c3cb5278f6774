"""Starts workers, each a process of its own, watches them, and ends those that hang."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.fuzzing import surfaces
from tests.fuzzing.contract import Finding
from tests.fuzzing.state import Store
from tests.fuzzing.surface import Surface
from tests.fuzzing.worker import WAITS, Beat, Limits, Worker, isolate, redirect, tried

ROOT = Path(__file__).parents[2]
GOAL = 20_000
"""Inputs that every surface gets before the rest of the time is shared evenly."""

_TURN = {"random": 45.0, "atheris": 240.0}  # seconds; Atheris takes twenty to start
_GRACE = 5.0  # seconds that a hanging worker has to answer its own alarm
_HARNESS = 3  # exit code of a worker that failed itself


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for.

    Attributes:
        surfaces: Names.
        state: Folder of corpus, counts and findings.
        limits: Of an input; and of each surface (inputs) or all of them together (end).
        engine: "random" or "atheris".
        seed: Of the mutations.
        jobs: Workers at once.
        made: Makes a surface; the harness's own tests give broken ones.
        told: Is given a line about every new finding.
    """

    surfaces: Sequence[str]
    state: Path
    limits: Limits
    engine: str = "random"
    seed: int = 0
    jobs: int = 1
    made: Callable[[str], Surface] = surfaces.surface
    told: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Row:
    """What a surface has come to; inputs per second of time, and per second that a core was at work."""

    surface: str
    inputs: int
    findings: int
    rate: float
    rate_of_work: float


class HarnessError(RuntimeError):
    """A worker failed outside of an input: the harness is broken, not the package."""


class Engine:
    """Runs a plan.

    Args:
        plan: What to do.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._stores = {name: Store(plan.state, name) for name in plan.surfaces}
        self._spent = dict.fromkeys(plan.surfaces, 0.0)
        self._begun = {name: self._total(name) for name in plan.surfaces}
        self._running: dict[int, _Turn] = {}
        self._turn = _turn_length(plan)
        # Made once, and inherited by all workers: importing what they use takes longer than a turn.
        self._made = {} if plan.engine == "atheris" else {name: plan.made(name) for name in plan.surfaces}
        for surface in self._made.values():
            surface.load()

    def run(self) -> list[Row]:
        """Works until all inputs are tried, or the time is over.

        Raises:
            HarnessError: A worker failed by itself.
        """
        base = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryDirectory(prefix="fedkl-fuzz-", dir=base) as folder:
            try:
                while self._start_workers(Path(folder)) or self._running:
                    time.sleep(0.05)
                    for turn in list(self._running.values()):
                        self._look_after(turn)
            finally:
                for turn in self._running.values():
                    turn.kill()
        return [self._row(name) for name in self._plan.surfaces]

    def _total(self, name: str) -> int:
        return int(self._stores[name].counts()["inputs"])

    def _row(self, name: str) -> Row:
        counts, findings = self._stores[name].counts(), self._stores[name].findings()
        rates = [counts["inputs"] / counts[unit] if counts[unit] else 0.0 for unit in ("seconds", "work")]
        return Row(name, int(counts["inputs"]), len(findings), *rates)

    def _start_workers(self, folder: Path) -> bool:
        """Fills free places; whether there is any work left to give."""
        while len(self._running) < self._plan.jobs:
            waiting = [name for name in self._plan.surfaces if self._is_waiting(name)]
            if not waiting:
                return False
            self._start(min(waiting, key=self._order), folder)
        return True

    def _is_waiting(self, name: str) -> bool:
        if any(turn.name == name for turn in self._running.values()) or self._left(name) == 0:
            return False
        return self._plan.limits.end is None or time.monotonic() < self._plan.limits.end - 0.5

    def _order(self, name: str) -> tuple[bool, float]:
        return self._total(name) >= GOAL, self._spent[name]

    def _left(self, name: str) -> int | None:
        """Inputs that a surface still gets; None: no bound."""
        wanted = self._plan.limits.inputs
        return None if wanted is None else max(0, wanted - (self._total(name) - self._begun[name]))

    def _start(self, name: str, folder: Path) -> None:
        place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
        limits = replace(self._plan.limits, inputs=self._left(name), end=self._turn_end())
        turn = _Turn(name, place, limits, known=frozenset(self._stores[name].findings()))
        turn.pid = os.fork()
        if turn.pid == 0:
            self._be_worker(turn)
        self._running[turn.pid] = turn

    def _turn_end(self) -> float | None:
        """When a worker makes room for another surface."""
        end, now = self._plan.limits.end, time.monotonic()
        if end is None:
            return None
        return end if end - now < 1.5 * self._turn else now + self._turn

    def _be_worker(self, turn: _Turn) -> None:
        """The life of the forked process."""
        code = _HARNESS
        try:
            redirect(turn.log)
            os.chdir(ROOT)
            os.environ.update(_environment(turn.folder))
            tempfile.tempdir = str(turn.folder)
            if self._plan.engine == "atheris":
                self._become_guided(turn)
            isolate(turn.limits)
            inputs = turn.folder / "inputs"
            inputs.mkdir()
            Worker(
                self._made[turn.name],
                store=self._stores[turn.name],
                beat=turn.beat,
                folder=inputs,
                limits=turn.limits,
            ).work(seed=self._plan.seed)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _become_guided(self, turn: _Turn) -> None:
        inputs = turn.folder / "inputs"
        inputs.mkdir()
        number = random.Random(f"{self._plan.seed} {turn.name} {self._total(turn.name)}").randrange(2**31)
        values = {
            "--state": self._plan.state.resolve(),
            "--beat": turn.beat_file,
            "--folder": inputs,
            "--end": time.monotonic() + 10.0**6 if turn.limits.end is None else turn.limits.end,
            "--patience": turn.limits.patience,
            "--memory": turn.limits.memory,
            "--inputs": -1 if turn.limits.inputs is None else turn.limits.inputs,
            "--seed": number,
        }
        words = [f"{flag}={value}" for flag, value in values.items()]
        os.execv(sys.executable, [sys.executable, "-m", "tests.fuzzing.guided", turn.name, *words])

    def _look_after(self, turn: _Turn) -> None:
        running = turn.beat.running
        hangs = running is not None and running > WAITS * turn.limits.patience + _GRACE
        if hangs:
            os.kill(turn.pid, signal.SIGKILL)
        pid, status, used = os.wait4(turn.pid, 0 if hangs else os.WNOHANG)
        if not pid:
            return
        del self._running[turn.pid]
        seconds = time.monotonic() - turn.begun
        self._spent[turn.name] += seconds
        store = self._stores[turn.name]
        store.add(inputs=turn.beat.inputs, seconds=seconds, work=used.ru_utime + used.ru_stime)
        if status:
            self._explain(turn, store, status, hangs=hangs)
        self._tell(turn, store)
        shutil.rmtree(turn.folder, ignore_errors=True)

    def _explain(self, turn: _Turn, store: Store, status: int, *, hangs: bool) -> None:
        """A worker that did not end by itself: the fault of its input, or of the harness."""
        log = turn.log.read_text(encoding="utf-8", errors="replace")[-6000:] if turn.log.exists() else ""
        if turn.beat.running is None:
            raise HarnessError(f"The worker of {turn.name} failed (status {status}):\n{log}")
        if hangs:
            what = "a hang that no signal could end"
        else:
            code = os.waitstatus_to_exitcode(status)
            what = f"the process died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
        store.record(turn.beat.data, Finding(what, cause=f"{what} {_crashed(log)}", details=log))

    def _tell(self, turn: _Turn, store: Store) -> None:
        for path in store.findings():
            if path not in turn.known:
                what = (path / "report.txt").read_text(encoding="utf-8").splitlines()[0]
                self._plan.told(f"{turn.name}: {what}  [{path / 'input'}]")


def _turn_length(plan: Plan) -> float:
    """Where time is short, all surfaces get some of it."""
    if plan.limits.end is None:
        return _TURN[plan.engine]
    share = (plan.limits.end - time.monotonic()) * plan.jobs / len(plan.surfaces)
    return min(_TURN[plan.engine], max(10.0, share))


class _Turn:
    """A worker at work."""

    def __init__(self, name: str, folder: Path, limits: Limits, *, known: frozenset[Path]) -> None:
        self.name = name
        self.folder = folder
        self.limits = limits
        self.log = folder / "log.txt"
        self.beat_file = folder / "beat"
        self.beat = Beat(self.beat_file)
        self.begun = time.monotonic()
        self.pid = 0
        self.known = known

    def kill(self) -> None:
        """Ends the worker, and waits until it has."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _environment(folder: Path) -> dict[str, str]:
    """Nothing is written to, or read from, the home of who fuzzes."""
    place = str(folder)
    return {
        "FLWR_HOME": place,
        "FLWR_TELEMETRY_ENABLED": "0",
        "XDG_CONFIG_HOME": place,
        "TMPDIR": place,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path),
    }


def _crashed(log: str) -> str:
    """The innermost line of the package in what `faulthandler` has left."""
    lines = [
        line.strip() for line in log.splitlines() if "/fedkl/" in line and line.strip().startswith("File")
    ]
    return f"at {lines[0].split('/fedkl/')[-1]}" if lines else "at an unknown place"


@functools.cache
def _loaded(name: str) -> Surface:
    surface = surfaces.surface(name)
    surface.load()
    return surface


def replayed(path: Path, name: str, *, limits: Limits) -> Finding | None:
    """Gives one stored input to its surface, in a process of its own."""
    surface = _loaded(name)
    with tempfile.TemporaryDirectory(prefix="fedkl-fuzz-") as folder:
        place = Path(folder)
        store = Store(place / "state", name)
        log = place / "log.txt"
        pid = os.fork()
        if pid == 0:
            _be_replayer(path, surface, place, store, limits)
        _, status = os.waitpid(pid, 0)
        found = store.findings()
        if found:
            what, _, details = (found[0] / "report.txt").read_text(encoding="utf-8").split("\n\n", 2)
            return Finding(what, details=details)
        if status:
            log_text = log.read_text(encoding="utf-8", errors="replace")
            return Finding(f"the process died (status {status})", details=log_text)
        return None


def _be_replayer(path: Path, surface: Surface, place: Path, store: Store, limits: Limits) -> None:
    code = _HARNESS
    try:
        redirect(place / "log.txt")
        os.environ.update(_environment(place))
        isolate(limits)
        (place / "inputs").mkdir()
        data = path.read_bytes()
        outcome = tried(surface, data, place / "inputs", patience=limits.patience)
        if isinstance(outcome, Finding):
            store.record(data, outcome)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
