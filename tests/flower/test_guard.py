"""The server's guard: bad replies, drop-outs, resume, and every strategy of Flower's unchanged."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as strategies
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies, PrivacyBudgetExhausted
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, QFedAvg

from fedkl.errors import ConfigError, UpdateError
from fedkl.flower import Guard, InProcessGrid, public_arrays, run_in_process
from fedkl.flower.aggregation import ReplyPlan
from fedkl.flower.round_files import RoundFiles
from fedkl.update import MAX_SAMPLES
from tests.flower.setting import DEFENSE, app_of, arrays_with, honest, metrics, net, request, server_of

SETTINGS = {"min_available_nodes": 3, "min_train_nodes": 3, "min_evaluate_nodes": 3, "fraction_evaluate": 0.0}


def initial():
    return public_arrays(net(), defense=DEFENSE)


def values(arrays):
    return {name: array.numpy() for name, array in arrays.items()}


def answer(content, node=5):
    message = request()
    message.metadata.dst_node_id = node  # of the reply, the source
    if isinstance(content, Error):
        return Message(content, reply_to=message)
    return Message(RecordDict(content), reply_to=message)


def sound(value=1.0, node=None, **numbers):
    """A reply of a node of its own for every value."""
    node = 10 + int(value) if node is None else node
    state = {name: np.full_like(array, value) for name, array in values(initial()).items()}
    record = ArrayRecord({n: Array(a) for n, a in state.items()})
    return answer({"arrays": record, "metrics": metrics(**{"loss": 1.0, **numbers})}, node)


def average(arrays):
    """The one value that all arrays have; see `sound`."""
    numbers = {float(number) for array in values(arrays).values() for number in np.unique(array)}
    assert len(numbers) == 1
    return numbers.pop()


def weighted(weight, **numbers):
    """Metrics with a weight that Flower's own checks may not let through."""
    record = metrics(loss=1.0, **numbers)
    record.__dict__["_data"]["num-examples"] = weight
    return record


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
    "zip": {"arrays": arrays_with({"0.bias": None})},
    "metric of 65 bits": {"arrays": arrays_with({}), "metrics": metrics(loss=2**64)},
    "metric of 65 bits, negative": {"arrays": arrays_with({}), "metrics": metrics(loss=-(2**64))},
    "metric of 10000 digits": {"arrays": arrays_with({}), "metrics": metrics(loss=10**10_000)},
    "list of 65 bits": {"arrays": arrays_with({}), "metrics": metrics(loss=[2**64])},
    "nothing": {"metrics": MetricRecord()},
}
BAD["zip"]["arrays"]["0.bias"] = Array("float32", (6,), "numpy.ndarray", b"PK\3\4")
WEIGHTS = {
    "a truth value": True,
    "nan": math.nan,
    "0": 0,
    "0.0": 0.0,
    "negative": -1,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "too large": MAX_SAMPLES + 1,
    "float too large": 1.7e308,
    "integer too large for a float": 10**400,
    "list": [1, 2],
    "empty list": [],
    "text": "8",
    "none": None,
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_bad_reply_is_refused_by_name_and_the_round_goes_on(content, caplog):
    bad = answer({"metrics": metrics(loss=1.0), **content}, node=66)
    arrays, result = guard().aggregate_train(1, [sound(1.0), bad, sound(3.0)])
    assert average(arrays) == 2.0
    assert result["loss"] == 1.0
    assert "node 66 refused" in caplog.text


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_makes_no_sense_is_refused(weight, training, caplog):
    bad = answer({"arrays": arrays_with({}), "metrics": weighted(weight)}, node=66)
    if training:
        arrays, _ = guard().aggregate_train(1, [bad, sound(1.0), sound(3.0)])
        assert average(arrays) == 2.0
    else:
        assert guard().aggregate_evaluate(1, [bad, sound(1.0), sound(3.0)])["loss"] == 1.0
    assert "node 66 refused" in caplog.text


@pytest.mark.parametrize("value", ["low", None, True, [[1.0]], [1.0, "low"], {"a": 1.0}, b"1"])
def test_metrics_that_are_no_numbers_are_refused_even_if_all_nodes_send_them(value, caplog):
    replies = [answer({"arrays": arrays_with({}), "metrics": metrics()}, node) for node in (66, 67)]
    for reply in replies:
        reply.content["metrics"].__dict__["_data"]["loss"] = value
    assert guard().aggregate_train(1, replies) == (None, None)
    assert "node 66 refused: Reply refused: the metric 'loss'" in caplog.text


def test_a_reply_of_nothing_at_all_is_refused(caplog):
    nothing = sound(node=66)
    nothing.__dict__["_content"] = None
    assert average(guard().aggregate_train(1, [nothing, sound(1.0), sound(3.0)])[0]) == 2.0
    assert "node 66 refused: it cannot be checked (ValueError)" in caplog.text


def test_weights_whose_sum_overflows_do_not_make_an_average_of_zeros(caplog):
    bad = [answer({"arrays": arrays_with({}), "metrics": weighted(1.7e308)}, node) for node in (66, 67)]
    assert guard().aggregate_train(1, bad) == (None, None)
    assert "expected the metric 'num-examples' as a number > 0 and at most 1000000000000" in caplog.text
    assert "1.7" not in caplog.text


def test_the_largest_weights_are_averaged():
    replies = [sound(1.0), sound(3.0)]
    for reply in replies:
        reply.content["metrics"]["num-examples"] = MAX_SAMPLES
    assert average(guard().aggregate_train(1, replies)[0]) == 2.0


@pytest.mark.parametrize("loss", [math.nan, -1.0, 1e300])
def test_a_loss_that_a_strategy_weights_by_is_checked_like_a_weight(loss, caplog):
    results = []
    for bad in ([sound(9.0, loss=loss)], []):
        made = guard(QFedAvg(**SETTINGS, client_learning_rate=0.1, train_loss_key="loss"))
        made.strategy.current_arrays = initial()
        results.append(values(made.aggregate_train(1, [*bad, sound(1.0), sound(3.0)])[0]))
    assert all(np.array_equal(array, results[1][name]) for name, array in results[0].items())
    assert "node 19 refused" in caplog.text


def test_the_key_of_the_weight_is_found_in_a_strategy_inside():
    inner = FedAvg(**SETTINGS, weighted_by_key="weight")
    made = guard(strategies.DifferentialPrivacyClientSideFixedClipping(inner, 0.1, 1.0, 2))
    made.strategy.current_arrays = initial()
    replies = [sound(1.0, weight=1.0), sound(3.0, weight=1.0)]
    assert made.aggregate_train(1, replies)[0] is not None
    assert made.aggregate_train(1, [sound(1.0, weight=0.0), sound(3.0, weight=math.nan)])[0] is None


def test_only_the_first_reply_of_a_node_counts(caplog):
    replies = [sound(1.0, node=66), sound(9.0, node=66), sound(9.0, node=66), sound(3.0)]
    assert average(guard().aggregate_train(1, replies)[0]) == 2.0
    assert caplog.text.count("node 66 refused: Reply refused: only the first") == 2
    replies = [sound(node=66, loss=loss) for loss in (1.0, 9.0)]
    assert guard().aggregate_evaluate(1, replies)["loss"] == 1.0
    replies = [answer({}, node=66), sound(9.0, node=66), sound(3.0)]  # unsound, and still the first
    assert average(guard().aggregate_train(2, replies)[0]) == 3.0


def test_errors_of_one_sender_are_all_passed_on():
    """Flower's own, for nodes that are gone, are all from the SuperLink."""
    seen = []
    made = guard()
    made.strategy.aggregate_train = lambda number, replies: (seen.extend(replies), None)[1:] * 2
    made.aggregate_train(1, [answer(Error(2, "gone")), answer(Error(3, "gone")), sound()])
    assert [reply.error.code for reply in seen if reply.has_error()] == [2, 3]


FORGED = "x\n[ROUND 9/9]\x1b[2J\u202e"


def test_no_name_or_text_of_a_client_breaks_a_line_of_the_log(caplog):
    record = ArrayRecord({FORGED: Array(np.ones(1))})
    replies = [
        answer({FORGED: record, "metrics": metrics()}, 1),
        answer({"arrays": arrays_with({FORGED: torch.ones(1)}), "metrics": metrics()}, 2),
        answer({"arrays": arrays_with({}), "metrics": metrics(**{FORGED: 2**64})}, 3),
        answer({"arrays": arrays_with({}), "metrics": metrics(**{FORGED: 1.0})}, 4),
        answer(Error(2, FORGED * 100), 5),
        sound(1.0),
        sound(3.0),
    ]
    assert average(guard().aggregate_train(1, replies)[0]) == 2.0
    texts = [record.getMessage() for record in caplog.records]
    lines = [line for text in texts for line in text.expandtabs().splitlines()]
    assert sum("node" in line for line in lines) >= 5
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
    assert not any(line.startswith("[ROUND") for line in lines)
    assert replies[4].error.reason == FORGED * 100  # what came stays as it is


def test_thousands_of_names_make_a_short_line(caplog):
    array = Array(np.ones(1))
    names = {f"n{index}": array for index in range(20_000)}
    wrong = answer({"arrays": ArrayRecord(names), "metrics": metrics()}, node=66)
    odd = answer({"arrays": arrays_with({}), "metrics": metrics(**dict.fromkeys(names, 1.0))}, node=67)
    assert average(guard().aggregate_train(1, [wrong, odd, sound(1.0), sound(3.0)])[0]) == 2.0
    assert "node 66 refused" in caplog.text
    assert "node 67 refused" in caplog.text
    assert len(caplog.text) < 3000


def test_arrays_in_another_order_are_put_in_order():
    """FedAvgM goes by position: the first reply's order would mix the tensors up."""

    def permuted(value):
        reply = sound(value)
        arrays = reply.content["arrays"]
        reply.content["arrays"] = ArrayRecord({name: arrays[name] for name in reversed(list(arrays))})
        return reply

    made = guard(FedAvgM(**SETTINGS, server_learning_rate=0.5))
    made.strategy.current_arrays = initial()
    first = permuted(1.0)
    arrays, _ = made.aggregate_train(1, [first, sound(3.0)])
    for name, array in values(initial()).items():
        np.testing.assert_allclose(values(arrays)[name], array / 2 + 1.0, rtol=1e-6)
    assert list(arrays) == list(initial())
    assert list(first.content["arrays"]) == list(reversed(list(initial())))  # what came stays as it is


class Raising(FedAvg):
    """A strategy with a mistake, or one that its replies lead into one."""

    def __init__(self, error):
        super().__init__(**SETTINGS)
        self.error = error
        self.moments = {"w": np.ones(2)}

    def aggregate_train(self, server_round, replies):
        self.moments["w"] += 1
        if self.error is not None:
            raise self.error
        return super().aggregate_train(server_round, replies)

    def aggregate_evaluate(self, server_round, replies):
        if self.error is not None:
            raise self.error
        return super().aggregate_evaluate(server_round, replies)


ERRORS = [
    ValueError("SECRET"),
    AttributeError("SECRET"),
    OverflowError("SECRET"),
    RecursionError("SECRET"),
    MemoryError("SECRET"),
    AssertionError("SECRET"),
    UpdateError("SECRET"),
    AggregationError("SECRET"),
    InconsistentMessageReplies("SECRET"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_strategy_that_raises_costs_a_round_and_is_logged_by_place(error, caplog):
    made = guard(Raising(error))
    assert made.aggregate_train(1, [sound()]) == (None, None)
    assert made.aggregate_evaluate(1, [sound()]) is None
    assert caplog.text.count("Nothing changes") == 2
    assert caplog.text.count(f"Raising raised {type(error).__name__} at {__file__}:") == 2
    assert "SECRET" not in caplog.text
    assert np.array_equal(made.strategy.moments["w"], np.ones(2))
    made.strategy.error = None
    arrays, result = made.aggregate_train(2, [sound(2.0)])
    assert average(arrays) == 2.0
    assert result["loss"] == 1.0
    assert made.aggregate_evaluate(2, [sound()])["loss"] == 1.0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), PrivacyBudgetExhausted("spent")])
def test_what_ends_a_run_on_purpose_goes_through(error):
    made = guard(Raising(error))
    with pytest.raises(type(error)):
        made.aggregate_train(1, [sound()])
    with pytest.raises(type(error)):
        made.aggregate_evaluate(1, [sound()])


def test_a_run_whose_strategy_raises_goes_on_to_its_end_and_says_so(caplog):
    result = run(Raising(ValueError()), rounds=2)
    assert values(result.arrays).keys() == values(initial()).keys()
    assert all(np.array_equal(array, values(initial())[n]) for n, array in values(result.arrays).items())
    assert "raised in 2 of the rounds" in caplog.text


MADE = {
    "other names": (ArrayRecord({"x": Array(np.ones(1))}), MetricRecord()),
    "one more": (arrays_with({"more": torch.ones(1)}), MetricRecord()),
    "one less": (arrays_with({"0.bias": None}), MetricRecord()),
    "none at all": (ArrayRecord(), MetricRecord()),
    "another shape": (arrays_with({"0.bias": torch.ones(6, 1)}), MetricRecord()),
    "words": (ArrayRecord({**arrays_with({}), "0.bias": Array(np.array(["SECRET"]))}), MetricRecord()),
    "infinite in its dtype": (
        arrays_with({"0.bias": torch.full((6,), 1e300, dtype=torch.float64)}),
        MetricRecord(),
    ),
    "a dict": ({"0.bias": np.ones(6)}, MetricRecord()),
    "a list": ([np.ones(6)], MetricRecord()),
    "three things": (arrays_with({}), MetricRecord(), 1),
    "arrays only": arrays_with({}),
    "nothing": None,
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_an_aggregate_that_is_none_changes_nothing(made, caplog, tmp_path):
    strategy = Raising(None)

    def aggregate(number, replies):
        strategy.moments["w"] += 1
        return made

    strategy.aggregate_train = aggregate
    arrays, _ = guard(strategy, checkpoints=tmp_path).aggregate_train(1, [sound()])
    assert arrays is None
    assert "stay as they were" in caplog.text or "Nothing changes" in caplog.text
    assert "SECRET" not in caplog.text
    assert np.array_equal(strategy.moments["w"], np.ones(2))
    assert not list(tmp_path.glob("round-*"))


@pytest.mark.parametrize("made", [5, "loss", {"loss": "low"}, {"loss": 2**64}, {1: 2.0}])
def test_metrics_that_are_none_are_left_out(made, caplog):
    strategy = Raising(None)
    strategy.aggregate_train = lambda number, replies: (arrays_with({}), made)
    strategy.aggregate_evaluate = lambda number, replies: made
    arrays, result = guard(strategy).aggregate_train(1, [sound()])
    assert arrays is not None
    assert result is None
    assert guard(strategy).aggregate_evaluate(1, [sound()]) is None
    assert caplog.text.count("Round 1:") == 2


def test_a_strategy_that_gathers_for_several_rounds_keeps_what_it_gathered():
    strategy = Raising(None)

    def aggregate(number, replies):
        strategy.moments["w"] += 1
        return None, None

    strategy.aggregate_train = aggregate
    assert guard(strategy).aggregate_train(1, [sound()]) == (None, None)
    assert np.array_equal(strategy.moments["w"], np.full(2, 2.0))


def after_one_bad_round(kind, bad, **settings):
    """The arrays after a sound round, with and without a bad one before it."""
    results = []
    for rounds in ([bad, [sound(0.5)]], [[sound(0.5)]]):
        made = guard(kind(**SETTINGS, **settings))
        made.configure_train(1, initial(), ConfigRecord(), InProcessGrid(ClientApp(), clients=3))
        results.append([made.aggregate_train(2, replies)[0] for replies in rounds])
    assert results[0][0] is None
    return values(results[0][1]), values(results[1][0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "settings", "bad"),
    [
        (FedAvgM, {"server_momentum": 0.9, "server_learning_rate": 2.0}, 3e38),  # the average is infinite
        (
            FedAdam,
            {},
            3e38,
        ),  # the average is finite, its second moments are not: that weight would rest forever
        (FedAvg, {}, math.nan),
    ],
)
def test_the_strategys_own_arrays_are_those_before_a_round_that_does_not_count(kind, settings, bad):
    after, expected = after_one_bad_round(kind, [sound(bad, node=66)], **settings)
    for name, array in after.items():
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("count", [math.nan, math.inf, 1e300])
def test_an_average_of_a_count_that_is_no_count_is_refused(count, caplog):
    """Rounded, it would be some whole number like any other."""
    start = ArrayRecord({"count": Array(np.array([3], dtype=np.int64))})
    made = Guard(FedAvg(**SETTINGS))
    made.expect(start)
    made.strategy.aggregate_train = lambda number, replies: (
        ArrayRecord({"count": Array(np.array([count]))}),
        MetricRecord(),
    )
    assert made.aggregate_train(1, [answer({"arrays": start, "metrics": metrics()})])[0] is None
    assert "'count'" in caplog.text


def test_records_of_another_name_are_refused(caplog):
    content = {"weights": arrays_with({}), "metrics": metrics(loss=1.0)}
    arrays, _ = guard().aggregate_train(1, [answer(content, node=66), sound(1.0), sound(3.0)])
    assert average(arrays) == 2.0
    assert "node 66 refused" in caplog.text


def test_a_reply_with_bad_evaluation_metrics_is_refused(caplog):
    bad = answer({"metrics": MetricRecord({"accuracy": 1.0})}, node=66)
    result = guard().aggregate_evaluate(1, [sound(), bad])
    assert dict(result) == {"loss": 1.0}
    assert "node 66 refused" in caplog.text


def test_errors_and_missing_replies_do_not_end_a_round():
    gone = answer(Error(2, "gone"))
    arrays, _ = guard().aggregate_train(1, [gone, sound(2.0)])
    assert average(arrays) == 2.0
    assert guard().aggregate_train(1, []) == (None, None)


def test_too_few_sound_replies_change_nothing(caplog):
    assert guard(min_replies=2).aggregate_train(1, [sound(), answer(Error(2, "gone"))]) == (None, None)
    assert "1 sound replies of 2 that it needs" in caplog.text
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
    replies = [answer({"arrays": start, "metrics": metrics()}, node) for node in range(2)]
    arrays, _ = made.aggregate_train(1, replies)
    assert {name: array.dtype.name for name, array in values(arrays).items()} == {
        "count": "int64",
        "w": "float32",
    }


LARGEST = np.array([np.iinfo(np.int64).max, 2**60 + 1])


def averaged(sent, *replies):
    """The guard's average of replies to arrays that were sent."""
    made, sent = Guard(FedAvg(**SETTINGS)), ArrayRecord({"w": Array(np.ones(2, np.float32)), **sent})
    made.expect(sent)
    made._round = made._begin(ReplyPlan(round=1, nodes=(), specs=made._specs, arrays=sent))
    content = [{"arrays": ArrayRecord({**sent, **reply}), "metrics": metrics()} for reply in replies]
    arrays, _ = made.aggregate_train(1, [answer(each, node) for node, each in enumerate(content)])
    return arrays


@pytest.mark.parametrize("constant", [np.array([True, False]), LARGEST], ids=["truth values", "integers"])
def test_a_constant_comes_back_as_it_was_sent(constant):
    """Flower averages all arrays as float64."""
    arrays = averaged({"c": Array(constant)}, {}, {}, {})
    assert arrays["c"].numpy().dtype == constant.dtype
    np.testing.assert_array_equal(arrays["c"].numpy(), constant)


def test_truth_values_that_all_clients_change_alike_are_the_new_ones():
    new = {"c": Array(np.array([True, True]))}
    assert averaged({"c": Array(np.array([True, False]))}, new, new, new)["c"].numpy().all()


@pytest.mark.parametrize("other", [np.array([False, False]), LARGEST - 1], ids=["truth values", "integers"])
def test_what_has_no_average_is_refused_with_what_to_do(other, caplog):
    sent = LARGEST if other.dtype == np.int64 else ~other
    assert averaged({"c": Array(sent)}, {}, {"c": Array(other)}) is None
    assert "'c' has dtype torch.float64" in caplog.text
    assert "persistent=False" in caplog.text
    assert "learning rate" not in caplog.text


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


def test_metrics_of_rounds_after_the_checkpoint_are_left(tmp_path):
    """They are of rounds that are done again."""
    run(FedAvg(**SETTINGS), rounds=3, checkpoints=tmp_path)
    (tmp_path / "round-000003.fedkl").unlink()
    result = run(FedAvg(**SETTINGS), rounds=2, checkpoints=tmp_path)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert RoundFiles(tmp_path).newest().round == 2


def test_metrics_that_are_not_finite_survive_a_restart(tmp_path):
    made = guard(checkpoints=tmp_path)
    arrays, result = made.aggregate_train(1, [sound(loss=math.nan)])
    assert arrays is not None  # a client with one class has no AUC: that is no reason to refuse its training
    result = run(FedAvg(**SETTINGS), rounds=1, checkpoints=tmp_path)
    assert math.isnan(result.train_metrics_clientapp[1]["loss"])


def test_checkpoints_behind_a_link_are_refused(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "rounds").symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match="symbolic link"):
        run(FedAvg(**SETTINGS), rounds=1, checkpoints=tmp_path / "rounds")
    assert list((tmp_path / "target").iterdir()) == []


def test_a_run_goes_on_in_the_order_of_its_checkpoint(tmp_path):
    """The list in which FedAvgM keeps its momentum has no names."""
    settings = {**SETTINGS, "server_momentum": 0.9, "min_available_nodes": 1, "min_train_nodes": 1}
    app = ClientApp()

    @app.train()
    def train(message, context):
        content = {"arrays": sound(2.0).content["arrays"], "metrics": metrics()}
        return Message(RecordDict(content), reply_to=message)

    def life(folder, start, rounds):
        made = Guard(FedAvgM(**settings), checkpoints=folder)
        return made.start(InProcessGrid(app, clients=1), start, num_rounds=rounds).arrays

    start = initial()
    other = ArrayRecord({name: start[name] for name in reversed(list(start))})
    whole = values(life(tmp_path / "whole", start, 3))
    life(tmp_path / "parts", start, 2)
    parts = values(life(tmp_path / "parts", other, 3))
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array)


def test_checkpoints_of_another_model_or_strategy_are_refused(tmp_path):
    run(FedAdam(**SETTINGS), rounds=1, checkpoints=tmp_path)
    with pytest.raises(ConfigError, match="another model"):
        run(FedAdam(**SETTINGS), start=arrays_with({"0.bias": None}), checkpoints=tmp_path)
    with pytest.raises(ConfigError, match="another strategy"):
        run(strategies.FedMedian(**SETTINGS), checkpoints=tmp_path)
