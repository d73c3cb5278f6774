"""How many updates an attacker of pictures is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedkl import Procedure
from fedkl.attacking.verdict import SAFE_FROM
from fedkl.auditing.clients import Clients
from fedkl.auditing.plan import exposures_of
from fedkl.auditing.rebuilding import _trials, dataset_of
from fedkl.auditing.recognition import Pools
from fedkl.defenses import NoDefense
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
