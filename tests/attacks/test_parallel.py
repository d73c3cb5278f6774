"""Problems shared out among threads: order, progress, memory, and that a failure ends every share."""

from __future__ import annotations

import time

import pytest
import torch

from fedkl.attacks import Attack, Reconstruction
from fedkl.attacks.parallel import available_memory, shared_out


def squares(share, progress):
    progress(1, len(share))
    return [number**2 for number in share]


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 20])
def test_results_come_in_the_order_of_the_problems(workers):
    seen = []
    found = shared_out(squares, range(7), workers=workers, progress=lambda *step: seen.append(step))
    assert found == [number**2 for number in range(7)]
    assert seen[-1] == (1, 7)


def test_a_share_runs_on_one_core_and_the_setting_is_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        counts = shared_out(
            lambda share, progress: [torch.get_num_threads()] * len(share), range(2), workers=2, progress=None
        )
        assert counts == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_ends_the_other_shares(broken):
    """A share that is not needed any more leaves at its next report."""
    steps = []

    def run(share, progress):
        if broken in share:
            raise ValueError("broken")
        for step in range(500):
            time.sleep(0.01)
            steps.append(step)
            progress(step, 1)
        return share

    with pytest.raises(ValueError, match="broken"):
        shared_out(run, range(2), workers=2, progress=None)
    assert len(steps) < 400


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


def guess(observation):
    blank = torch.zeros(1, *observation.image_shape)
    return Reconstruction(images=blank, labels=None, scaling="clip", loss=1.0, evaluations=0, start=0)


@pytest.mark.parametrize(
    ("wanted", "workers", "shares"), [(0, 4, 4), (1, 4, 4), (4, 4, 2), (5, 4, 1), (8, 4, 1), (4, 1, 1)]
)
def test_so_many_threads_as_the_memory_suffices_for(observe_plain, monkeypatch, wanted, workers, shares):
    seen = []

    class Sharing(Attack):
        def memory(self, observation):
            return wanted * GIB

        def _run(self, observations, generators, on_evaluation):
            seen.append(len(observations))
            return [guess(observation) for observation in observations]

    monkeypatch.setattr("fedkl.attacks.base.available_memory", lambda: 8 * GIB)
    observation, _, _ = observe_plain()
    given = 4 * [observation]
    found = Sharing().reconstruct_many(given, generators=4 * [torch.Generator()], workers=workers)
    assert (len(found), len(seen), sum(seen)) == (4, shares, 4)
