"""Shares independent problems out among threads, each on one core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event, Lock
from typing import TypeVar

import torch

from fedkl.attacks.memory import shared_by

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
    shares = [list(problems[worker::workers]) for worker in range(workers)]
    board = _Board(progress or _ignore, [len(share) for share in shares])
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=_one_of, initargs=(workers,)) as executor:
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


def _one_of(workers: int) -> None:
    torch.set_num_threads(1)
    shared_by(workers)


class _Stopped(Exception):  # noqa: N818 - no error: the way out of a share whose results nobody wants
    pass


class _Board:
    """The progress of all shares as one: evaluations of the furthest, running problems of all.

    Args:
        progress: Told.
        sizes: Problems of each share: all of them run, also while it has not reported.
    """

    def __init__(self, progress: Progress, sizes: Sequence[int]) -> None:
        self.stop = Event()
        self._progress = progress
        self._lock = Lock()
        self._last = [(0, size) for size in sizes]

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
