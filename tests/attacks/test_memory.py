"""How much memory there is."""

from __future__ import annotations

import pytest

from fedkl.attacks.memory import available_memory

GIB = 2**30
UNLIMITED = 9223372036854771712  # as version 1 says it


def a_machine(root, *, groups=(), own=()):
    """A machine with 8 GiB free: its files below `root`; a group is (folder, version, limit, used, cache)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:  16777216 kB\nMemAvailable:  8388608 kB\n")
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in own))
    for folder, version, limit, used, cache in groups:
        group = root / "sys/fs/cgroup" / folder
        group.mkdir(parents=True, exist_ok=True)
        names = ("max", "current", "") if version == 2 else ("limit_in_bytes", "usage_in_bytes", "total_")
        (group / f"memory.{names[0]}").write_text(f"{limit}\n")
        (group / f"memory.{names[1]}").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\n{names[2]}inactive_file {cache}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "own", "expected"),
    [
        ([], [], 8 * GIB),
        ([("", 2, "max", GIB, 0)], ["0::/"], 8 * GIB),
        ([("", 2, 4 * GIB, 3 * GIB, 0)], ["0::/"], GIB),
        ([("", 2, 4 * GIB, 3 * GIB, GIB)], ["0::/"], 2 * GIB),
        ([("", 2, 40 * GIB, 3 * GIB, 0)], ["0::/"], 8 * GIB),
        ([("", 2, 4 * GIB, 5 * GIB, 0)], ["0::/"], 0),
        ([("a/b", 2, 3 * GIB, GIB, 0)], ["0::/a/b"], 2 * GIB),
        ([("a", 2, 2 * GIB, GIB, 0), ("a/b", 2, "max", GIB, 0)], ["0::/a/b"], GIB),
        ([("x", 2, GIB, GIB, 0)], ["0::/a"], 8 * GIB),
        ([("memory/a", 1, 3 * GIB, GIB, GIB)], ["3:cpu:/", "4:memory:/a", "0::/"], 3 * GIB),
        ([("memory", 1, 3 * GIB, GIB, 0)], ["4:memory:/outside/the/container"], 2 * GIB),
        ([("memory", 1, UNLIMITED, GIB, 0)], ["4:memory:/"], 8 * GIB),
        ([("memory/a", 1, "damaged", GIB, 0)], ["4:memory:/a"], 8 * GIB),
        ([("", 2, 4 * GIB, GIB, 0)], ["nonsense"], 3 * GIB),
        ([("", 2, 4 * GIB, GIB, 0)], ["0::/../outside"], 3 * GIB),
    ],
)
def test_the_memory_that_is_left(tmp_path, groups, own, expected):
    assert available_memory(a_machine(tmp_path, groups=groups, own=own)) == expected


def test_the_memory_that_is_left_of_a_machine_without_such_files(tmp_path):
    assert available_memory(tmp_path) > 0
    assert 0 <= available_memory() < 2**50
