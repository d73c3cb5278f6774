"""Core dumps: a process that has opened secrets must not leave its memory in a file when it crashes."""

from __future__ import annotations

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def forbid_core_dumps() -> None:
    """Lets the system write no core file of this process and of those that it starts, where it can (POSIX).

    Where crashes are piped to a program (``/proc/sys/kernel/core_pattern`` begins with ``|``), that program
    is told the limit and decides: systemd-coredump then keeps no memory.
    """
    if resource:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
