"""What holds in a round of every aggregation: who may offer, who has left, when the result is given."""

from __future__ import annotations

import pytest
import torch

from fedkl.aggregation import PlainAggregation, RoundAggregation, RoundPlan, Seen, weighted_average
from fedkl.errors import ConfigError, UpdateError
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec

SCHEMA = PublicSchema(
    kind="weights", specs={"w": TensorSpec.of(torch.zeros(3)), "n": TensorSpec.of(torch.tensor(0))}
)
CLIENTS = {"a": 5, "b": 7, "c": 9}


def plan():
    return RoundPlan(
        round=2, clients=CLIENTS, schema=SCHEMA, state={"w": torch.zeros(3), "n": torch.tensor(0)}
    )


def update(value=1.0, *, num_samples=4, round=2, schema=SCHEMA, tensors=None):
    tensors = tensors or {"w": torch.full((3,), value), "n": torch.tensor(int(value))}
    return PublicUpdate(schema=schema, tensors=tensors, num_samples=num_samples, round=round)


def begun(**options):
    return PlainAggregation().begin(plan(), **options)


class Pairs(RoundAggregation[str, str]):
    """A stand-in for a sum that needs two who are still there when it is opened."""

    def __init__(self, clients):
        super().__init__(clients)
        self.left = []

    @property
    def enough(self):
        return len(set(self.offered) - set(self.dropped)) >= 2

    @property
    def update_bytes(self):
        return 1

    def what_the_server_sees(self):
        return (Seen(clients=self.offered),)

    def _take(self, client, update):
        if not update:
            raise UpdateError("nothing")

    def _result(self):
        return "+".join(self.offered)

    def _leave(self, client):
        self.left.append((client, client in self.offered))


def test_the_result_is_the_weighted_average_of_what_was_offered():
    collected, updates = begun(), {"b": update(3.0, num_samples=7), "a": update(1.5, num_samples=2)}
    collected.drop("c")
    for client, sent in updates.items():
        collected.offer(client, sent)
    expected = weighted_average(updates.values())
    result = collected.result()
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    assert (collected.offered, collected.dropped) == (("b", "a"), ("c",))
    assert collected.update_bytes == 3 * 4 + 8


REFUSED = {
    "a stranger": ("d", update(), r"'d' was not asked"),
    "a second time": ("a", update(), r"'a' has offered already"),
    "after it was dropped": ("b", update(), r"'b' was dropped"),
    "of another round": ("c", update(round=3), r"\(kind, round\)"),
    "of another kind": (
        "c",
        update(schema=PublicSchema(kind="gradient", specs=SCHEMA.specs)),
        r"\(kind, round\)",
    ),
    "more samples than it has": ("c", update(num_samples=10), "at most 9 samples, got 10"),
    "another shape": (
        "c",
        update(
            schema=PublicSchema(kind="weights", specs={"w": TensorSpec.of(torch.zeros(4))}),
            tensors={"w": torch.zeros(4)},
        ),
        r"update of c refused\.\n  - 'n' is missing\n  - 'w' has shape \(4,\)",
    ),
}


@pytest.mark.parametrize(("client", "sent", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_the_round_as_it_was(client, sent, message):
    collected = begun(record=True)
    collected.offer("a", update(1.0))
    collected.drop("b")
    with pytest.raises(UpdateError, match=message):
        collected.offer(client, sent)
    assert (collected.offered, collected.dropped) == (("a",), ("b",))
    assert [seen.clients for seen in collected.what_the_server_sees()] == [("a",)]
    assert torch.equal(collected.result()["w"], torch.ones(3))


def test_the_plan_says_how_the_first_update_looks_too():
    other = PublicSchema(kind="weights", specs={"w": TensorSpec.of(torch.zeros(4))})
    collected = begun()
    with pytest.raises(UpdateError, match="update of a refused"):
        collected.offer("a", update(schema=other, tensors={"w": torch.zeros(4)}))
    collected.offer("b", update())
    assert collected.offered == ("b",)


def test_who_leaves_after_its_offer_stays_in_the_sum():
    collected = begun()
    for client in CLIENTS:
        collected.offer(client, update(float(CLIENTS[client])))
    collected.drop("a")
    assert torch.equal(collected.result()["w"], torch.full((3,), 7.0))


def test_strangers_cannot_be_dropped():
    with pytest.raises(UpdateError, match="'d' was not asked"):
        begun().drop("d")


def test_a_result_is_given_once_and_closes_the_round():
    collected = begun()
    collected.offer("a", update())
    collected.result()
    assert collected.dropped == ("b", "c")
    with pytest.raises(UpdateError, match="'b' comes after the result"):
        collected.offer("b", update())
    with pytest.raises(UpdateError, match="given once"):
        collected.result()


def test_a_round_in_which_nobody_offered_has_no_result():
    collected = begun()
    assert not collected.enough
    assert collected.update_bytes == 0
    with pytest.raises(UpdateError, match="at least one"):
        collected.result()


def test_an_aggregation_learns_who_has_left_and_whether_before_its_offer():
    """What secret sharing needs: before an upload pair seeds are opened, after it shares of the self mask."""
    collected = Pairs("abcd")
    for client in "abc":
        collected.offer(client, "x")
    with pytest.raises(UpdateError, match="nothing"):
        collected.offer("d", "")
    assert collected.enough
    collected.drop("a")
    collected.drop("a")
    assert collected.enough
    collected.drop("b")
    assert not collected.enough
    assert collected.left == [("a", True), ("b", True)]
    assert collected.result() == "a+b+c"
    assert collected.left[2:] == [("d", False)]


def test_whoever_comes_is_taken_where_nobody_was_named():
    collected = Pairs(None)
    collected.offer("x", "1")
    collected.drop("y")
    assert collected.result() == "x"


def test_the_server_sees_what_was_sent_to_the_last_bit_and_nothing_of_the_dropped():
    collected, sent = begun(record=True), {"c": update(0.1), "a": update(0.7)}
    collected.drop("b")
    for client, each in sent.items():
        collected.offer(client, each)
    collected.result()
    seen = collected.what_the_server_sees()
    assert [one.clients for one in seen] == [("c",), ("a",)]
    for one in seen:
        for name, tensor in sent[one.clients[0]].tensors.items():
            assert torch.equal(one.update.tensors[name], tensor)


def test_updates_are_kept_only_where_it_was_asked_for():
    collected = begun()
    collected.offer("a", update())
    with pytest.raises(ConfigError, match="record=True"):
        collected.what_the_server_sees()
