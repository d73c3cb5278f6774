"""How much memory there is, and that no more is done at once than fits into it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.attacks.memory import at_once, available_memory, kept_for_backward, size_of
from fedkl.attacks.parallel import shared_out
from fedkl.protocol import Procedure

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


@pytest.fixture
def eight(monkeypatch):
    """A machine with 8 GiB left."""
    monkeypatch.setattr("fedkl.attacks.memory.available_memory", lambda: 8 * GIB)


@pytest.mark.parametrize(("each", "most"), [(GIB, 4), (3 * GIB, 1), (100 * GIB, 1), (GIB // 2, 8)])
def test_half_of_what_is_left_is_taken(eight, each, most):
    assert at_once(each) == most


def test_nothing_fits_as_often_as_one_likes(eight):
    assert at_once(0) == 4 * GIB


def test_threads_share_what_is_left(eight):
    found = shared_out(
        lambda share, progress: [at_once(GIB)] * len(share), range(2), workers=2, progress=None
    )
    assert (found, at_once(GIB)) == ([2, 2], 4)


def test_what_a_network_keeps_for_the_way_back():
    """Of a row: its 10 numbers, and the 20 behind the ReLU, which it and the next layer keep once."""
    network = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    eight, four = (kept_for_backward(network, torch.zeros(rows, 10)) for rows in (8, 4))
    assert eight - four == 4 * 4 * (10 + 20)
    assert four >= 4 * 4 * (10 + 20) + size_of([network[2].weight])


def test_it_is_counted_where_no_weight_is_trained_too():
    network = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)).requires_grad_(False)
    with torch.no_grad():
        eight, four = (kept_for_backward(network, torch.zeros(rows, 10)) for rows in (8, 4))
    assert eight - four >= 4 * 4 * 20


def test_counting_draws_nothing():
    network = nn.Sequential(nn.Linear(10, 20), nn.Dropout())
    before = torch.get_rng_state()
    kept_for_backward(network, torch.zeros(4, 10))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_counted_is_freed():
    """A hook that gives back what a ReLU keeps of its own output would hold it for ever."""
    seen = []

    class Noting(nn.ReLU):
        def forward(self, x):
            found = super().forward(x)
            seen.append(weakref.ref(found.untyped_storage()))
            return found

    kept_for_backward(nn.Sequential(nn.Linear(10, 20), Noting(), nn.Linear(20, 5)), torch.zeros(4, 10))
    gc.collect()
    assert [each() for each in seen] == [None]


def test_a_view_counts_by_itself():
    """As of weights that lie in one stack with those of other problems."""
    whole, alone = nn.Linear(10, 20), nn.Linear(10, 20)
    whole.weight.data = torch.zeros(50, 20, 10)[7]
    assert kept_for_backward(whole, torch.zeros(4, 10)) == kept_for_backward(alone, torch.zeros(4, 10))


class Raising(nn.Module):
    def forward(self, x):
        raise KeyError("batch of one")


class InPlace(nn.Module):
    def forward(self, x):
        return x.sub_(1).sin()


def test_a_network_that_cannot_be_asked_takes_what_it_takes():
    assert kept_for_backward(Raising(), torch.zeros(4, 10)) == 0


def test_inputs_stay_as_they_are():
    inputs = torch.zeros(4, 10)
    assert kept_for_backward(InPlace(), inputs) >= inputs.nbytes
    assert inputs.eq(0).all()
    assert not inputs.requires_grad


def test_of_an_accelerator_its_own_memory_counts(monkeypatch):
    monkeypatch.setattr("fedkl.attacks.memory.available_memory", lambda: 8 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * GIB, 100 * GIB))
    assert at_once(GIB // 4, device=torch.device("cuda")) == 4
    assert at_once(GIB // 4) == 16


@pytest.mark.parametrize("most", [1, 2, 3])
def test_gradients_are_matched_as_many_at_once_as_fit(observe_plain, monkeypatch, most):
    """And the values are those of all at once."""
    observations = [observe_plain(first=place)[0] for place in range(5)]
    labels = [observation.labels for observation in observations]
    matching = GradientMatching(observations, labels=labels)
    points = matching.starts([torch.Generator().manual_seed(place) for place in range(5)])
    expected = matching(points, torch.arange(5))

    asked, sizes = [], []

    class Noting(GradientMatching):
        def _evaluated(self, points, index):
            sizes.append(len(index))
            return super()._evaluated(points, index)

    monkeypatch.setattr(
        "fedkl.attacks.matching.objectives.at_once", lambda each, device: (asked.append(each), most)[1]
    )
    found = Noting(observations, labels=labels)(points, torch.arange(5))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert (sum(sizes), max(sizes)) == (5, most)
    own = size_of(dict(observations[0].model.named_parameters()).values())
    assert asked[0] > 2 * 2 * own  # weights and what was observed, in double precision


def test_more_images_and_more_steps_take_more(observe_plain, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fedkl.attacks.matching.objectives.at_once", lambda each, device: (asked.append(each), 9)[1]
    )
    for size, epochs in ((1, 1), (4, 1), (4, 3)):
        local = Procedure(algorithm="fedavg", batch_size=2, epochs=epochs, lr=0.1)
        observation, _, _ = observe_plain(batch_size=size, local=local)
        matching = GradientMatching([observation], labels=[observation.labels])
        matching(matching.starts([torch.Generator()]), torch.tensor([0]))
    one, four, thrice = asked
    assert one < four
    assert 2.5 * four < thrice <= 3 * four


def test_what_a_problem_takes_does_not_depend_on_the_others(observe_plain, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fedkl.attacks.matching.objectives.at_once", lambda each, device: (asked.append(each), 9)[1]
    )
    observations = [observe_plain(first=place)[0] for place in range(5)]  # each of a network of its own
    for count in (1, 5):
        some = observations[:count]
        matching = GradientMatching(some, labels=[observation.labels for observation in some])
        matching(matching.starts([torch.Generator()] * count), torch.arange(count))
    assert asked[0] == asked[1]
