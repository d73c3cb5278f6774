"""Problems shared out among threads: order, progress, memory, and that a failure ends every share."""

from __future__ import annotations

import time

import pytest
import torch

from fedkl.attacks import Attack, Reconstruction
from fedkl.attacks.parallel import shared_out


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
