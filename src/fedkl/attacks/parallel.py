"""Shares independent problems out among threads, each on one core."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from typing import TypeVar

import torch

Progress = Callable[[int, int], None]
"""Called with (evaluations so far, problems still running)."""

_Problem = TypeVar("_Problem")
_Result = TypeVar("_Result")


def shared_out(
    run: Callable[[list[_Problem], Progress], list[_Result]],
    problems: Sequence[_Problem],
    *,
    workers: int,
    progress: Progress | None,
) -> list[_Result]:
    """Runs problems in as many shares as there are workers; results in the order of the problems.

    Several threads with one share each beat one batch on several cores: PyTorch splits every single
    operation among its threads, and the operations on networks this small do not gain by it.

    Args:
        run: Solves a share, reporting its progress.
        problems: Independent of each other.
        workers: At least 1; with 1, everything runs in this thread.
        progress: Told about all shares together.
    """
    workers = max(1, min(workers, len(problems)))
    if workers == 1:
        return run(list(problems), progress or _ignore)
    board = _Board(progress or _ignore, workers)
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            shares = [list(problems[worker::workers]) for worker in range(workers)]
            futures = [executor.submit(run, share, board.of(worker)) for worker, share in enumerate(shares)]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises what went wrong, before any other share is stopped by it
                found = [future.result() for future in futures]
            except BaseException:
                board.stop.set()  # without it, leaving the pool would wait for the other shares
                raise
    finally:
        torch.set_num_threads(before)
    results: dict[int, _Result] = {}
    for worker, share in enumerate(found):
        results |= {worker + workers * place: result for place, result in enumerate(share)}
    return [results[place] for place in range(len(problems))]


class _Stopped(Exception):  # noqa: N818 - no error: the way out of a share whose results nobody wants
    pass


class _Board:
    """The progress of all shares as one: evaluations of the furthest, running problems of all."""

    def __init__(self, progress: Progress, workers: int) -> None:
        self.stop = Event()
        self._progress = progress
        self._lock = Lock()
        self._last = [(0, 0)] * workers

    def of(self, worker: int) -> Progress:
        def report(evaluations: int, running: int) -> None:
            if self.stop.is_set():
                raise _Stopped
            with self._lock:
                self._last[worker] = (evaluations, running)
                self._progress(max(e for e, _ in self._last), sum(r for _, r in self._last))

        return report


def _ignore(evaluations: int, running: int) -> None:
    return


def available_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its control group if that is less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**62
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with contextlib.suppress(OSError, ValueError, KeyError):  # without a limit it says "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics["inactive_file"]))  # a cache, given up when needed
    return max(free, 0)
