"""The aggregation that a federation is given: who is offered and dropped, and what the server saw."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from fedkl.aggregation import Aggregation, PlainAggregation, PlainRound, RoundAggregation, weighted_average
from fedkl.config import TrainConfig
from fedkl.defenses import KeyLock, NoDefense
from fedkl.errors import ConfigError, TrainingError, UpdateError
from fedkl.federated import FederatedTraining, Federation, LocalTraining, ServerSGD
from tests.federated.setting import TwoNorms, copy_secrets, differences, everything, one_update, seeded
from tests.federated.test_rounds import flaky, small

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOME = {"clients": 6, "cohort": 4, "dropout": 0.4, "rounds": 4, "eval_every": 4}


class Spy(RoundAggregation):
    """Writes down what it is called with, and averages as ever."""

    def __init__(self, inner, calls, refuses):
        super().__init__(inner._plan.clients)
        self._inner, self._calls, self._refuses = inner, calls, refuses

    @property
    def update_bytes(self):
        return self._inner.update_bytes

    def what_the_server_sees(self):
        return self._inner.what_the_server_sees()

    def _take(self, client, update):
        if client in self._refuses:
            raise UpdateError("Not this one.")
        self._calls.append(("offer", client, update))
        self._inner.offer(client, update)

    def _leave(self, client):
        self._calls.append(("drop", client))
        self._inner.drop(client)

    def _result(self):
        self._calls.append(("result",))
        return self._inner.result()


class Spied(PlainAggregation):
    """Plain averaging that is watched."""

    def __init__(self, refuses=()):
        object.__setattr__(self, "calls", [])
        object.__setattr__(self, "refuses", refuses)
        object.__setattr__(self, "plans", [])

    def begin(self, plan, *, record=False):
        self.plans.append(plan)
        return Spy(PlainRound(plan, record=record), self.calls, self.refuses)


def watched(dataset, aggregation, *, defense=None, **options):
    training = FederatedTraining(**{**SOME, **options})
    return Federation(
        seeded(TwoNorms),
        defense=defense or NoDefense(),
        dataset=dataset,
        training=training,
        seed=0,
        aggregation=aggregation,
    )


def test_everyone_in_the_cohort_is_offered_or_dropped(dataset):
    spied = Spied()
    run = watched(dataset, spied)
    before = run.server.state
    result = run.run_round(1)
    offered = [call[1] for call in spied.calls if call[0] == "offer"]
    dropped = [call[1] for call in spied.calls if call[0] == "drop"]
    assert result.dropped
    assert dropped == list(result.dropped)
    assert len(offered) == result.updates > 1
    assert spied.calls[-1] == ("result",)
    [plan] = spied.plans
    assert plan.round == 1
    assert set(plan.clients) == {*offered, *dropped}
    names = [client.name for client in run.clients]
    assert list(plan.clients) == sorted(plan.clients, key=names.index)
    assert plan.clients == {c.name: c.num_samples for c in run.clients if c.name in plan.clients}
    assert not plan.schema.private
    assert not differences(plan.state, before)
    sent = {name: call[2] for name, call in zip(offered, spied.calls[len(dropped) :], strict=False)}
    assert not differences(weighted_average(sent.values()), run.server.state)


def test_one_that_diverges_is_dropped(dataset):
    store, broken = flaky(dataset)
    spied = Spied()
    run = watched(broken, spied, clients=3, cohort=None, dropout=0.0)
    store.broken[run.clients[1].samples] = True
    assert set(run.run_round(0).failed) == {"client-1"}
    assert [call[1] for call in spied.calls if call[0] == "drop"] == ["client-1"]


def test_one_that_the_aggregation_refuses_is_named_and_dropped(dataset):
    run = watched(dataset, Spied(refuses=("client-1",)), clients=3, cohort=None, dropout=0.0)
    result = run.run_round(0)
    assert result.failed == {"client-1": "Not this one."}
    assert (result.updates, result.aggregated) == (2, True)


def test_if_too_few_came_no_result_is_asked_for(dataset):
    """A masked sum of too few must never be opened."""
    spied = Spied()
    run = watched(dataset, spied, min_cohort=4)
    results = [run.run_round(round) for round in range(4)]
    asked = sum(call == ("result",) for call in spied.calls)
    assert asked == sum(result.aggregated for result in results) < 4


def test_if_all_diverge_no_result_is_asked_for(dataset):
    spied = Spied()
    run = watched(dataset, spied, local=LocalTraining(lr=1e38, batch_size=8), dropout=0.0)
    with pytest.raises(TrainingError):
        run.run_round(0)
    assert {call[0] for call in spied.calls} == {"drop"}


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_what_the_server_saw_is_what_the_clients_sent_to_the_last_bit(dataset, algorithm):
    """Oracle: the clients' updates from a federation of the same secrets."""
    options = {"local": {"algorithm": algorithm, "batch_size": 16}}
    run, alone = (small(dataset, KeyLock(layers="all"), clients=3, **options) for _ in range(2))
    copy_secrets(run, alone)
    shown = []
    run.run_round(0, on_seen=lambda plan, seen: shown.append((plan, seen)))
    [(plan, seen)] = shown
    assert not differences(plan.state, alone.server.state)
    assert sorted(one.clients for one in seen) == [("client-0",), ("client-1",), ("client-2",)]
    by_name = {one.clients[0]: one.update for one in seen}
    for client in alone.clients:
        expected = one_update(alone, client)
        assert not differences(dict(expected.tensors), dict(by_name[client.name].tensors))
        assert by_name[client.name].num_samples == expected.num_samples


def test_watching_changes_nothing_and_shows_the_watched_rounds_only(dataset):
    plain, seen_from = (small(dataset, KeyLock(), **SOME) for _ in range(2))
    copy_secrets(plain, seen_from)
    shown = {}

    def note(plan, seen):
        shown[plan.round] = seen

    without = list(plain.run())
    results = list(seen_from.run(on_seen=note, watched={1, 3}))
    assert set(shown) == {1, 3}
    assert [len(shown[round]) for round in (1, 3)] == [results[round].updates for round in (1, 3)]
    assert not differences(everything(plain), everything(seen_from))
    assert [result.loss for result in without] == [result.loss for result in results]


def test_a_round_that_was_not_aggregated_was_seen_all_the_same(dataset):
    run = small(dataset, **SOME, min_cohort=4)
    shown, results = [], []
    for round in range(4):
        results.append(run.run_round(round, on_seen=lambda plan, seen: shown.append(len(seen))))
    assert not all(result.aggregated for result in results)
    assert shown == [result.updates for result in results]


@dataclass(frozen=True, kw_only=True)
class Blind(Aggregation):
    """It shows the server nothing."""

    type: Literal["test"] = "test"
    server_learns: ClassVar = "nothing"

    def begin(self, plan, *, record=False):
        return PlainRound(plan, record=record)


@pytest.mark.parametrize(
    "options", [{"server": ServerSGD()}, {"local": LocalTraining(algorithm="fedsgd")}], ids=["sgd", "fedsgd"]
)
def test_a_server_that_learns_nothing_cannot_step(dataset, options):
    with pytest.raises(ConfigError, match=r"'test' shows the server no average.*type 'averaging'"):
        watched(dataset, Blind(), defense=KeyLock(layers="all"), **options)
    watched(dataset, Blind(), defense=KeyLock(layers="all"))


def test_an_older_configuration_has_plain_averaging():
    text = (Path(__file__).parents[1] / "vectors/generation-1/train/config.toml").read_text()
    assert "aggregation" not in text
    assert TrainConfig.model_validate(tomllib.loads(text)).training.aggregation == PlainAggregation()
    again = TrainConfig().model_dump(mode="json")
    assert again["training"]["aggregation"] == {"type": "plain"}
    assert TrainConfig.model_validate(again).training.aggregation == PlainAggregation()


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="plain"):
        TrainConfig.model_validate({"training": {"aggregation": {"type": "unheard-of"}}})
