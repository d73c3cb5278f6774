"""Shares independent problems out among threads, each on one core."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
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
    shares = [list(problems[worker::workers]) for worker in range(workers)]
    board = _Board(progress or _ignore, [len(share) for share in shares])
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as executor:
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


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine, or of a control group of its if that is less.

    Args:
        root: Where `/proc` and `/sys` are.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**62
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return max(min([free, *_left_in_groups(root)]), 0)


_GROUP_FILES = (  # limit, use, and the name of a cache in memory.stat: version 2, version 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the limits of this process's control groups, and of those around them, leave."""
    for folder in _groups(root):
        for limit, used, cache in _GROUP_FILES:
            # Without a limit, version 2 says "max", and version 1 a number that is larger than any memory.
            with contextlib.suppress(OSError, ValueError, KeyError):
                numbers = [int((folder / name).read_text(encoding="ascii")) for name in (limit, used)]
                lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
                given_up = int(dict(line.split() for line in lines)[cache])  # when memory is needed
                yield numbers[0] - numbers[1] + given_up


def _groups(root: Path) -> list[Path]:
    """Folders of the control groups; in a container the own one may be where the root's would be."""
    mount = root / "sys/fs/cgroup"
    folders = [mount, mount / "memory"]
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            parts = [part for part in path.split("/") if part]
            if ".." in parts or not (controllers == "" or "memory" in controllers.split(",")):
                continue
            base = mount / "memory" if controllers else mount
            folders += [base.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return folders
