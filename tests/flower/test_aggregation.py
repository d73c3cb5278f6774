"""The guard's seam: replies are offered, nodes dropped, and what comes of it goes to the strategy."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedkl.aggregation import Seen
from fedkl.errors import ConfigError, UpdateError
from fedkl.flower import Guard, InProcessGrid
from fedkl.flower.aggregation import PassedOn, ReplyAggregation, ReplyPlan, ReplyRound
from tests.flower.setting import metrics
from tests.flower.test_guard import SETTINGS, answer, average, initial, sound, values

BAD = {"metrics": metrics(loss=1.0)}  # without arrays


class Sum(ReplyAggregation):
    """It gives the strategy one reply, the average, as a masked sum will; and writes down what it is told."""

    server_learns = "sum"

    def __init__(self, *, refuses=(), fails=False):
        self.rounds, self.refuses, self.fails = [], refuses, fails

    def begin(self, plan, *, record=False):
        self.rounds.append(_Sum(plan, self))
        return self.rounds[-1]


class _Sum(ReplyRound):
    def __init__(self, plan, options):
        super().__init__(plan, clients=[str(node) for node in plan.nodes] or None)
        self.options, self.replies, self.left = options, {}, []

    @property
    def update_bytes(self):
        return 0

    def requests(self, messages):
        for message in messages:
            message.content["cohort"] = ConfigRecord({"nodes": list(self.plan.nodes)})
        return messages

    def what_the_server_sees(self):
        return (Seen(clients=self.offered),)

    def _take(self, client, update):
        if client in self.options.refuses:
            raise UpdateError("Not this one.")
        self.replies[client] = update

    def _leave(self, client):
        self.left.append(client)

    def _result(self):
        if self.options.fails:
            raise UpdateError("The sum does not open.")
        weights = [reply.content["metrics"]["num-examples"] for reply in self.replies.values()]
        all_values = [values(reply.content["arrays"]) for reply in self.replies.values()]
        mean = {
            name: np.average([each[name].astype(float) for each in all_values], axis=0, weights=weights)
            for name in all_values[0]
        }
        arrays = ArrayRecord({n: Array(m.astype(all_values[0][n].dtype)) for n, m in mean.items()})
        one = copy.copy(next(iter(self.replies.values())))
        one.content = RecordDict({"arrays": arrays, "metrics": _weighing(sum(weights))})
        return [one]


def _weighing(total):
    record = metrics(loss=1.0)
    record["num-examples"] = total
    return record


def guard(strategy=None, **options):
    made = Guard(strategy or FedAvg(**SETTINGS), **options)
    made.expect(initial())
    return made


def asked(made, *, nodes=3):
    """The messages of a first round, and who they are to."""
    grid = InProcessGrid(ClientApp(), clients=nodes)
    messages = list(made.configure_train(1, initial(), ConfigRecord(), grid))
    return messages, [message.metadata.dst_node_id for message in messages], grid


def test_the_strategy_gets_replies_as_they_came_and_errors_before_them():
    made, got = guard(), []
    made.strategy.aggregate_train = lambda number, replies: (got.extend(replies), (None, None))[1]
    first, second, gone = sound(3.0), sound(1.0), answer(Error(2, "gone"), node=9)
    made.aggregate_train(1, [first, gone, answer(BAD, node=66), second])
    assert [reply is each for reply, each in zip(got, [gone, first, second], strict=True)] == [True] * 3


@pytest.mark.parametrize("strategy", [FedAvg, FedAdam])
def test_one_reply_that_is_the_average_serves_a_strategy_as_all_do(strategy):
    results = []
    for aggregation in (PassedOn(), Sum()):
        made = guard(strategy(**SETTINGS), aggregation=aggregation)
        _, nodes, _ = asked(made)
        replies = [sound(value, node=node) for value, node in zip((1.0, 2.0, 4.5), nodes, strict=True)]
        results.append(values(made.aggregate_train(1, replies)[0]))
    for name, array in results[0].items():
        np.testing.assert_allclose(results[1][name], array, rtol=1e-6)


def test_a_round_knows_whom_it_asks_and_can_say_more_to_them():
    sums = Sum()
    made = guard(aggregation=sums)
    messages, nodes, grid = asked(made)
    plan = sums.rounds[0].plan
    assert (plan.round, plan.nodes, plan.grid) == (1, tuple(nodes), grid)
    assert list(plan.specs) == list(initial())
    assert [message.content["cohort"]["nodes"] for message in messages] == [nodes] * 3


def test_whoever_fails_is_refused_or_is_silent_is_dropped(caplog):
    sums = Sum()
    made = guard(aggregation=sums)
    _, nodes, _ = asked(made, nodes=5)
    made.strategy.min_train_nodes = 3
    taken, failed, refused, *silent = nodes
    again = sound(9.0, node=taken)
    replies = [
        sound(2.0, node=taken),
        answer(Error(2, "gone"), node=failed),
        answer(BAD, node=refused),
        again,
    ]
    assert average(made.aggregate_train(1, replies)[0]) == 2.0
    assert sums.rounds[0].offered == (str(taken),)
    assert sums.rounds[0].left == [str(node) for node in (failed, refused, *silent)]
    assert f"node {refused} refused" in caplog.text


def test_what_the_aggregation_refuses_does_not_count(caplog):
    made = guard(aggregation=Sum(refuses=("11",)), min_replies=2)
    assert average(made.aggregate_train(1, [sound(1.0), sound(2.0), sound(4.0)])[0]) == 3.0
    assert "reply of node 11 refused: Not this one." in caplog.text
    assert made.aggregate_train(2, [sound(1.0), sound(2.0)]) == (None, None)


def test_a_stranger_is_refused_where_the_round_is_of_those_who_were_asked(caplog):
    made = guard(aggregation=Sum())
    _, nodes, _ = asked(made)
    replies = [sound(1.0, node=nodes[0]), sound(5.0, node=4)]
    assert average(made.aggregate_train(1, replies)[0]) == 1.0
    assert "'4' was not asked" in caplog.text


def test_a_sum_that_does_not_open_costs_the_round(caplog):
    made = guard(aggregation=Sum(fails=True))
    assert made.aggregate_train(1, [sound(1.0)]) == (None, None)
    assert "The sum does not open. Nothing changes." in caplog.text


def test_with_too_few_replies_no_sum_is_opened():
    sums = Sum()
    made = guard(aggregation=sums, min_replies=2)
    assert made.aggregate_train(1, [sound(1.0)]) == (None, None)
    assert not sums.rounds[0]._closed


def test_the_server_saw_every_sound_reply_to_the_last_bit():
    shown = []
    made = guard(on_seen=lambda plan, seen: shown.append((plan, seen)))
    replies = [sound(1.0), sound(3.0)]
    bad = answer({"metrics": metrics(loss=math.nan)}, node=66)
    made.aggregate_train(4, [replies[0], bad, answer(Error(2, "gone"), node=9), replies[1]])
    [(plan, seen)] = shown
    assert plan.round == 4
    assert [one.clients for one in seen] == [("11",), ("13",)]
    for one, reply in zip(seen, replies, strict=True):
        assert one.reply is reply


def test_replies_are_shown_only_where_it_was_asked_for():
    with pytest.raises(ConfigError, match="record=True"):
        PassedOn().begin(ReplyPlan(round=1, nodes=(), specs={})).what_the_server_sees()
    kept = PassedOn().begin(ReplyPlan(round=1, nodes=(), specs={}), record=True)
    assert (kept.what_the_server_sees(), kept.update_bytes) == ((), 0)
    kept.offer("11", sound(1.0))
    assert kept.update_bytes == sum(len(array.data) for array in initial().values())
