"""One process that gives inputs to one surface: own mutations, kept where they reach something new."""

from __future__ import annotations

import faulthandler
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from tests.fuzzing.contract import Finding, Hang
from tests.fuzzing.coverage import Lines
from tests.fuzzing.state import Store
from tests.fuzzing.surface import Surface

try:
    import resource
except ImportError:  # Windows, where the engine does not run either
    resource = None  # type: ignore[assignment]

LONGEST = 1 << 19
WAITS = 4
_HEAD = struct.Struct("<QdI")
_TRIES = 100  # to make the input of a new finding smaller
_TRACED = 8  # one input in so many is asked which lines it reaches: that takes three times as long


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one input, and one worker, may take.

    Attributes:
        patience: Seconds of work for one input; `WAITS` times as many if it only waits.
        memory: Bytes on top of what the worker has at its start.
        inputs: How many inputs the worker tries; None: as many as there is time for.
        end: Until when it works, on `time.monotonic`; None: until all inputs are tried.
    """

    patience: float
    memory: int = 3 << 29
    inputs: int | None = None
    end: float | None = None


class Beat:
    """Memory that a worker shares with the engine: how many inputs it has begun, and the present one.

    Args:
        path: A file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_HEAD.size + LONGEST)
            self._memory = mmap.mmap(file.fileno(), _HEAD.size + LONGEST)

    @property
    def inputs(self) -> int:
        """How many inputs were begun."""
        return int(_HEAD.unpack_from(self._memory)[0])

    @property
    def running(self) -> float | None:
        """Seconds since the present input was begun; None between inputs."""
        begun = float(_HEAD.unpack_from(self._memory)[1])
        return time.monotonic() - begun if begun else None

    @property
    def data(self) -> bytes:
        """The present input, or the last one."""
        size = int(_HEAD.unpack_from(self._memory)[2])
        return self._memory[_HEAD.size : _HEAD.size + size]

    def begin(self, data: bytes, *, counts: bool = True) -> None:
        """Says that an input is given to the surface."""
        self._memory[_HEAD.size : _HEAD.size + len(data)] = data
        _HEAD.pack_into(self._memory, 0, self.inputs + counts, time.monotonic(), len(data))

    def end(self) -> None:
        """Says that it has come back."""
        _HEAD.pack_into(self._memory, 0, self.inputs, 0.0, len(self.data))


def isolate(limits: Limits) -> None:
    """Sets this process up: bounded memory, no core dumps, one thread, an alarm that raises `Hang`."""
    faulthandler.enable()
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, _ring)
    signal.signal(signal.SIGALRM, _ring)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if resource is not None and Path("/proc/self/statm").exists():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + limits.memory
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _ring(number: int, frame: FrameType | None) -> None:
    raise Hang("the input took too long")


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Rings after so much work, or after more time than that takes on a machine that others use too."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITS * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def tried(surface: Surface, data: bytes, folder: Path, *, patience: float) -> str | Finding:
    """Gives an input to a surface: what came of it, or the finding that it is."""
    try:
        with _alarm(patience):
            return surface.run(data, folder)
    except Finding as finding:
        return finding
    except Hang as error:  # it rang in the harness itself, e.g. while files were written
        return Finding.of(error)


class Worker:
    """Tries inputs on a surface and keeps what they reach.

    Args:
        surface: The surface.
        store: Where corpus and findings go.
        beat: Tells the engine how it goes.
        folder: For the files of the inputs.
        limits: Of an input and of the work.
    """

    def __init__(self, surface: Surface, *, store: Store, beat: Beat, folder: Path, limits: Limits) -> None:
        self._surface = surface
        self._store = store
        self._beat = beat
        self._folder = folder
        self._limits = limits
        self._outcomes, lines = store.known()
        self._lines = Lines(lines)

    def work(self, *, seed: int) -> None:
        """Tries inputs until the limits are reached; the same ones for the same seed and state."""
        engine = os.getppid()
        begun = int(self._store.counts()["inputs"])
        rng = random.Random(f"{seed} {self._surface.name} {begun}")
        os.urandom = rng.randbytes  # keys and salts are part of the inputs
        torch.manual_seed(seed)
        seeds = self._surface.prepared()
        kept = self._store.corpus()
        while self._limits.inputs is None or self._beat.inputs < self._limits.inputs:
            if self._limits.end is not None and time.monotonic() > self._limits.end:
                break
            number = begun + self._beat.inputs
            data = seeds[number] if number < len(seeds) else self._next(rng, seeds, kept)
            if self._is_new(data, traced=number % _TRACED == 0):
                kept.append(data)
                self._store.keep(data)
            if os.getppid() != engine:  # it is gone, whatever ended it
                break
        self._store.remember(self._outcomes, self._lines.known)

    def _next(self, rng: random.Random, seeds: list[bytes], kept: list[bytes]) -> bytes:
        """A changed input: of the seeds, of those kept, or of the latest of them."""
        pools = [pool for pool in (seeds, kept, kept[-20:]) if pool]
        data, other = (rng.choice(rng.choice(pools)) for _ in range(2))
        return self._surface.mutate(data, rng, other)[:LONGEST]

    def _is_new(self, data: bytes, *, traced: bool) -> bool:
        """Tries an input; whether it reached anything that none had before."""
        self._lines.grown = False
        with self._lines.tracing() if traced else nullcontext():
            outcome = self._tried(data, counts=True)
        if isinstance(outcome, Finding):
            if not self._store.has(outcome):
                self._store.record(self._smaller(data, outcome), outcome)
            return False  # what lies behind a finding is explored when it is mended
        new = outcome not in self._outcomes or self._lines.grown
        self._outcomes.add(outcome)
        return new

    def _tried(self, data: bytes, *, counts: bool) -> str | Finding:
        self._beat.begin(data, counts=counts)
        try:
            return tried(self._surface, data, self._folder, patience=self._limits.patience)
        finally:
            self._beat.end()

    def _smaller(self, data: bytes, finding: Finding) -> bytes:
        """A smaller input of the same cause."""
        if finding.cause.startswith("Hang"):
            return data

        def same(other: bytes) -> bool:
            outcome = self._tried(other, counts=False)
            return isinstance(outcome, Finding) and outcome.cause == finding.cause

        while (part := next(filter(same, self._surface.parts(data)), None)) is not None:
            data = part
        return smaller(data, same)


def smaller(data: bytes, same: Callable[[bytes], bool], *, tries: int = _TRIES) -> bytes:
    """Leaves out pieces of an input, large ones first, while it stays the same in what matters."""
    size = len(data) // 2
    while size:
        at = 0
        while at < len(data):
            if not tries:
                return data
            tries -= 1
            shorter = data[:at] + data[at + size :]
            if same(shorter):
                data = shorter
            else:
                at += size
        size //= 2
    return data


def redirect(log: Path) -> None:
    """Lets everything that this process prints go into a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
