"""How many updates an attacker of pictures is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedkl import Procedure
from fedkl.attacking.verdict import SAFE_FROM
from fedkl.attacks import ATTACKS, register_attack
from fedkl.attacks.memory import size_of
from fedkl.auditing.attackers import Attacker
from fedkl.auditing.clients import Clients
from fedkl.auditing.findings import of_pictures
from fedkl.auditing.plan import Planned, exposures_of
from fedkl.auditing.rebuilding import _lots, _trials, dataset_of, rebuild
from fedkl.auditing.recognition import Pools
from fedkl.defenses import NoDefense, plain_arm
from fedkl.metrics import success_rate, wilson_interval
from tests.attacking.breaking import Breaking
from tests.auditing.subjects import images, labels, subject


def attacked(size, *, most, pictures):
    whole = replace(
        subject(),
        images=images(pictures),
        labels=labels(pictures),
        images_per_client=size,
        procedure=Procedure(),
    )
    (clients, *_) = exposures_of(whole, defense=NoDefense(), masking="none", batch_sizes=(), seed=0)
    assert isinstance(clients, Clients)
    pools = Pools.of(whole.images, whole.labels, seed=0)
    trials = _trials(clients, dataset_of(clients, pools), most=most)
    assert all(len(trial.images) == size for trial in trials)
    return len(trials)


@pytest.mark.parametrize(
    ("size", "most", "pictures", "expected"),
    [
        (1, 100, 1000, 100),
        (16, 100, 1000, 7),  # 6 would be 96 images, of which no verdict says "at the floor"
        (16, 20, 1000, 1),  # too few in any case
        (16, 100, 260, 6),  # there are no more than 104 images of clients
        (300, 100, 1000, 1),
    ],
)
def test_batches_are_rounded_up_where_that_lets_a_verdict_say_something(size, most, pictures, expected):
    assert SAFE_FROM == 100
    assert attacked(size, most=most, pictures=pictures) == expected


def test_images_of_one_update_are_no_trials_of_their_own():
    """All of an update's images are found, or none: of two updates nothing is known of a third."""
    whole = replace(
        subject(), images=images(100), labels=labels(100), images_per_client=20, procedure=Procedure()
    )
    (clients, *_) = exposures_of(whole, defense=NoDefense(), masking="none", batch_sizes=(), seed=0)
    pools = Pools.of(whole.images, whole.labels, seed=0)
    attacker = Attacker(name="dlg", type="dlg", threat_model="C", images=40, options={"evaluations": 1})
    found = rebuild(attacker, clients, pools=pools, enough=lambda: False)
    assert (found.found["updates"], found.found["success"]["n"]) == (2, 40)
    assert found.found["success"]["rate"] == 0
    assert found.found["success"]["high"] == pytest.approx(wilson_interval(0, 2)[1])
    assert found.floor["success"]["high"] == pytest.approx(wilson_interval(0, 40)[1])


def test_what_an_attack_broke_on_is_not_left_out():
    """All of its images count, and a figure with broken ones says nothing of what was not found."""
    register_attack(Breaking)
    try:
        whole = subject(procedure=Procedure(), images_per_client=1)
        (clients, *_) = exposures_of(whole, defense=NoDefense(), masking="none", batch_sizes=(), seed=0)
        pools = Pools.of(whole.images, whole.labels, seed=0)
        attacker = Attacker(name="breaking", type="test-breaking", threat_model="C", images=40)
        rebuilt = rebuild(attacker, clients, pools=pools, enough=lambda: False)
    finally:
        ATTACKS.forget("test-breaking")
    labels = dataset_of(clients, pools).test_labels[:40].tolist()
    assert 0 < rebuilt.found["broke"] == labels.count(2)
    assert rebuilt.found["updates"] == 40 - rebuilt.found["broke"]
    assert rebuilt.found["identified"]["n"] == rebuilt.found["success"]["n"] == 40
    resists = replace(
        rebuilt,
        found=rebuilt.found | {name: share(0, 100) for name in ("success", "identified")},
        floor={name: share(0, 100) for name in ("success", "identified")},
        control={name: share(100, 100) for name in ("success", "identified")},
    )
    entry = Planned(attacker=attacker, clients=clients, seconds=1.0)

    def outcomes(rebuilt):
        about = {"pools": pools, "earlier": [], "pictures": "pictures/a.safetensors", "seconds": 1.0}
        return {finding.outcome for finding in of_pictures(entry, rebuilt, **about)}

    assert outcomes(replace(resists, found=resists.found | {"broke": 0})) == {"at the floor"}
    assert outcomes(resists) == {"says nothing"}


def share(hits, n):
    return success_rate([float(number < hits) for number in range(n)], threshold=1.0)._asdict()


@pytest.mark.parametrize(
    ("count", "most", "ends"),
    [
        (20, 100, [2, 4, 8, 16, 20]),
        (20, 5, [2, 4, 8, 13, 18, 20]),
        (3, 1, [1, 2, 3]),
        (2, 100, [2]),
        (1, 100, [1]),
    ],
)
def test_lots_grow_as_far_as_the_memory_lets_them(count, most, ends):
    assert list(_lots(count, most=most)) == ends


@pytest.mark.parametrize(("arms", "expected"), [(0, 100), (1, 30), (3, 30)])
def test_an_attacker_of_all_at_once_gets_as_many_as_fit(monkeypatch, arms, expected):
    asked = []
    monkeypatch.setattr("fedkl.auditing.rebuilding.at_once", lambda each: (asked.append(each), 30)[1])
    whole = replace(subject(), images=images(1000), labels=labels(1000), images_per_client=1)
    (clients, *_) = exposures_of(whole, defense=NoDefense(), masking="none", batch_sizes=(), seed=0)
    pools = Pools.of(whole.images, whole.labels, seed=0)
    trials = _trials(clients, dataset_of(clients, pools), most=100, together=arms * [plain_arm()])
    assert len(trials) == expected
    assert asked == [5 * arms * size_of(clients.network.parameters())][: min(arms, 1)]
