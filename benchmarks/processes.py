"""Processes that a benchmark starts, and all that those start: known by a mark in their environment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

MARK = "FEDKL_BENCHMARK_MARK"


def free_ports(count: int) -> list[int]:
    """Ports on the loopback interface that nobody listens on."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def end_marked(mark: str, *children: subprocess.Popen[bytes]) -> None:
    """Ends children and all that carries the mark: first asked, then, after five seconds, killed."""
    deadline = time.monotonic() + 5
    while True:
        number = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
        left = [child.pid for child in children if child.poll() is None]
        left += [pid for pid in marked(mark) if pid not in left]
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        time.sleep(0.2)


def marked(mark: str, *entries: str, command: str = "") -> list[int]:
    """Processes with the mark in their environment; none where there is no /proc.

    Args:
        mark: Its value.
        entries: Further entries, ``NAME=value``, that their environment must have.
        command: A part of their command line.
    """
    wanted = {entry.encode() for entry in (f"{MARK}={mark}", *entries)}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((folder / "environ").read_bytes().split(b"\0"))
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended meanwhile, or another user's
            continue
        if wanted <= environment and command in line:
            found.append(int(folder.name))
    return found
