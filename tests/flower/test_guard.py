"""The server's guard: bad replies, drop-outs, resume, and every strategy of Flower's unchanged."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM

from fedkl.errors import ConfigError, UpdateError
from fedkl.flower import Guard, InProcessGrid, public_arrays, run_in_process
from fedkl.flower.round_files import RoundFiles
from tests.flower.setting import DEFENSE, app_of, arrays_with, honest, metrics, net, request, server_of

SETTINGS = {"min_available_nodes": 3, "min_train_nodes": 3, "min_evaluate_nodes": 3, "fraction_evaluate": 0.0}


def initial():
    return public_arrays(net(), defense=DEFENSE)


def values(arrays):
    return {name: array.numpy() for name, array in arrays.items()}


def answer(content, node=5):
    message = request()
    message.metadata.dst_node_id = node
    if isinstance(content, Error):
        return Message(content, reply_to=message)
    return Message(RecordDict(content), reply_to=message)


def sound(value=1.0, node=5):
    state = {name: np.full_like(array, value) for name, array in values(initial()).items()}
    return answer(
        {"arrays": ArrayRecord({n: Array(a) for n, a in state.items()}), "metrics": metrics(loss=1.0)}, node
    )


def guard(strategy=None, **options):
    made = Guard(strategy or FedAvg(**SETTINGS), **options)
    made.expect(initial())
    return made


BAD = {
    "nan": {"arrays": arrays_with({"0.bias": torch.full((6,), math.nan)})},
    "infinite": {"arrays": arrays_with({"0.bias": torch.full((6,), math.inf)})},
    "shape": {"arrays": arrays_with({"0.bias": torch.ones(1)})},
    "missing": {"arrays": arrays_with({"0.bias": None})},
    "extra": {"arrays": arrays_with({"more": torch.ones(1)})},
    "private": {"arrays": arrays_with({"1.running_mean": torch.ones(6)})},
    "not numpy": {"arrays": ArrayRecord({"0.bias": Array("float32", (6,), "pickle", b"x")})},
    "objects": {"arrays": ArrayRecord({"0.bias": Array("object", (6,), "numpy.ndarray", b"\x93NUMPY")})},
    "words": {"arrays": ArrayRecord({"0.bias": Array(np.array(["a"]))})},
    "two records": {"arrays": arrays_with({}), "more": arrays_with({})},
    "no metrics": {"arrays": arrays_with({}), "metrics": arrays_with({})},
    "two metrics": {"arrays": arrays_with({}), "other": metrics()},
    "no weight": {"arrays": arrays_with({}), "metrics": MetricRecord({"loss": 1.0})},
    "weight 0": {"arrays": arrays_with({}), "metrics": MetricRecord({"num-examples": 0, "loss": 1.0})},
    "weight nan": {
        "arrays": arrays_with({}),
        "metrics": MetricRecord({"num-examples": math.nan, "loss": 1.0}),
    },
    "weights": {"arrays": arrays_with({}), "metrics": MetricRecord({"num-examples": [1, 2], "loss": 1.0})},
    "list for a number": {"arrays": arrays_with({}), "metrics": metrics(loss=[1.0, 2.0])},
    "other dtype": {"arrays": arrays_with({"0.bias": torch.ones(6).double()})},
    "complex": {"arrays": arrays_with({"0.bias": torch.ones(6, dtype=torch.complex64)})},
    "other metrics": {"arrays": arrays_with({}), "metrics": metrics(accuracy=1.0)},
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_bad_reply_is_refused_by_name_and_the_round_goes_on(content, caplog):
    bad = answer({"metrics": metrics(loss=1.0), **content}, node=66)
    arrays, result = guard().aggregate_train(1, [sound(1.0), bad, sound(3.0)])
    assert all(np.array_equal(array, np.full_like(array, 2.0)) for array in values(arrays).values())
    assert result["loss"] == 1.0
    assert "node 66 refused" in caplog.text


def test_records_of_another_name_are_refused(caplog):
    content = {"weights": arrays_with({}), "metrics": metrics(loss=1.0)}
    arrays, _ = guard().aggregate_train(1, [answer(content, node=66), sound(1.0), sound(3.0)])
    assert all(np.array_equal(array, np.full_like(array, 2.0)) for array in values(arrays).values())
    assert "node 66 refused" in caplog.text


def test_a_reply_with_bad_evaluation_metrics_is_refused(caplog):
    bad = answer({"metrics": MetricRecord({"accuracy": 1.0})}, node=66)
    result = guard().aggregate_evaluate(1, [sound(), bad])
    assert dict(result) == {"loss": 1.0}
    assert "node 66 refused" in caplog.text


def test_errors_and_missing_replies_do_not_end_a_round():
    gone = answer(Error(2, "gone"))
    arrays, _ = guard().aggregate_train(1, [gone, sound(2.0)])
    assert all(np.array_equal(array, np.full_like(array, 2.0)) for array in values(arrays).values())
    assert guard().aggregate_train(1, []) == (None, None)


def test_too_few_sound_replies_change_nothing(caplog):
    assert guard(min_replies=2).aggregate_train(1, [sound(), answer(Error(2, "gone"))]) == (None, None)
    assert "fewer than 2" in caplog.text
    with pytest.raises(ConfigError, match="min_replies"):
        Guard(FedAvg(), min_replies=0)


def test_an_average_that_is_not_finite_changes_nothing(caplog):
    arrays, _ = guard(FedAdam(**SETTINGS)), None
    arrays.strategy.aggregate_train = lambda number, replies: (
        arrays_with({"0.bias": torch.full((6,), math.nan)}),
        MetricRecord(),
    )
    assert arrays.aggregate_train(1, [sound()])[0] is None
    assert "stay as they were" in caplog.text


def test_counts_stay_integers():
    start = ArrayRecord({"count": Array(np.array([3], dtype=np.int64)), "w": Array(np.ones(2, np.float32))})
    made = Guard(FedAvg(**SETTINGS))
    made.expect(start)
    replies = [answer({"arrays": start, "metrics": metrics()}) for _ in range(2)]
    arrays, _ = made.aggregate_train(1, replies)
    assert {name: array.dtype.name for name, array in values(arrays).items()} == {
        "count": "int64",
        "w": "float32",
    }


def test_unsound_initial_arrays_are_refused():
    with pytest.raises(UpdateError, match="Initial arrays"):
        Guard(FedAvg()).expect(arrays_with({"0.bias": torch.full((6,), math.nan)}))


SPECIAL = {
    "Krum": {"num_malicious_nodes": 0},
    "MultiKrum": {"num_malicious_nodes": 0, "num_nodes_to_select": 2},
    "Bulyan": {"num_malicious_nodes": 0},
    "FedProx": {"proximal_mu": 0.1},
    "FedTrimmedAvg": {"beta": 0.34},
    "QFedAvg": {"client_learning_rate": 0.1, "train_loss_key": "loss"},
}
ORDINARY = ("FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "FedMedian", *SPECIAL)


def run(strategy, rounds=2, handler=honest, start=None, **options):
    result = {}

    def main(grid):
        made = Guard(strategy, **options)
        result["result"] = made.start(grid, start or initial(), num_rounds=rounds)

    run_in_process(server_of(main), app_of(handler), clients=3)
    return result["result"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_strategies_work_unchanged_on_the_public_tensors(name):
    def with_loss(message, context):
        reply = honest(message, context)
        reply.content["metrics"]["loss"] = 1.0
        return reply

    strategy = getattr(strategies, name)(**SETTINGS, **SPECIAL.get(name, {}))
    arrays = values(run(strategy, handler=with_loss).arrays)
    start = values(initial())
    assert arrays.keys() == start.keys()
    assert all(np.isfinite(array).all() and array.dtype == start[n].dtype for n, array in arrays.items())
    assert not all(np.array_equal(array, start[name]) for name, array in arrays.items())


def crash_at(number):
    def evaluate(round, arrays):
        if round == number:
            raise KeyboardInterrupt
        return MetricRecord({"round": round})

    return evaluate


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedAdam])
def test_a_server_that_died_goes_on_after_its_last_round(kind, tmp_path):
    """Clients here depend on the server's arrays only; Flower adds their replies up in a random order."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        shift = 0.1 * (1 + context.node_config["partition-id"])
        state = {
            n: Array(a * np.float32(0.9) + np.float32(shift))
            for n, a in values(message.content["arrays"]).items()
        }
        return Message(
            RecordDict({"arrays": ArrayRecord(state), "metrics": metrics(loss=shift)}), reply_to=message
        )

    def life(folder, *, evaluate=None, rounds=5):
        settings = {**SETTINGS, **({"server_momentum": 0.9} if kind is FedAvgM else {})}
        made = Guard(kind(**settings), checkpoints=folder)
        grid = InProcessGrid(app, clients=3)
        return made.start(grid, initial(), num_rounds=rounds, evaluate_fn=evaluate)

    whole = life(tmp_path / "whole", evaluate=crash_at(99))
    for number in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            life(tmp_path / "parts", evaluate=crash_at(number))
    parts = life(tmp_path / "parts", evaluate=crash_at(99))
    expected = values(whole.arrays)
    for name, array in values(parts.arrays).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)
    assert sorted(parts.train_metrics_clientapp) == [1, 2, 3, 4, 5]
    assert parts.evaluate_metrics_serverapp[5]["round"] == 5
    again = life(tmp_path / "parts")  # nothing left to do
    last = values(parts.arrays)
    assert all(np.array_equal(array, last[name]) for name, array in values(again.arrays).items())


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    run(FedAvg(**SETTINGS), rounds=3, checkpoints=tmp_path)
    newest = tmp_path / "round-000003.fedkl"
    newest.write_bytes(newest.read_bytes()[:-5] + b"xxxxx")
    with pytest.warns(UserWarning, match="round 2 is used"):
        saved = RoundFiles(tmp_path).newest()
    assert saved.round == 2
    assert sorted(path.name for path in tmp_path.glob("round-*")) == [
        "round-000002.fedkl",
        "round-000003.fedkl",
    ]
    assert set(json.loads((tmp_path / "history.json").read_text())["train_metrics_clientapp"]) == {
        "1",
        "2",
        "3",
    }


def test_checkpoints_of_another_model_or_strategy_are_refused(tmp_path):
    run(FedAdam(**SETTINGS), rounds=1, checkpoints=tmp_path)
    with pytest.raises(ConfigError, match="another model"):
        run(FedAdam(**SETTINGS), start=arrays_with({"0.bias": None}), checkpoints=tmp_path)
    with pytest.raises(ConfigError, match="another strategy"):
        run(strategies.FedMedian(**SETTINGS), checkpoints=tmp_path)
