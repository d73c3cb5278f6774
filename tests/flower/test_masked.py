"""Masked sums on Flower: the same models as plain ones, and a server that reads what it may, no more."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Krum
from safetensors.torch import load_file

import fedkl
from fedkl import cli
from fedkl.aggregation import SeenUpload
from fedkl.errors import ConfigError, MaskingError
from fedkl.export import export
from fedkl.flower import Guard, LockMod, Masked, MaskMod, current_client, public_arrays, run_in_process
from fedkl.flower import mask_records as records
from fedkl.flower.aggregation import PassedOn, SeenReply
from fedkl.flower.kept_sums import opened_by
from fedkl.flower.mask_mod import MASKS_REFUSED
from fedkl.flower.model_records import Base, put_base
from fedkl.flower.record_fields import PREFIX, WORDS, words_of
from fedkl.flower.round_files import RoundFiles
from fedkl.masking import Call, MemberFile
from fedkl.update import TensorSpec
from tests.flower.cohorts import PASSPHRASE, app_of, cohort, found, run, trained
from tests.flower.setting import DEFENSE, found_in, honest, net, reply, server_of, step, store, stored

MODES = ("blind", "pairwise", "both")
REQUEST = {"dst_node_id": 7, "message_type": "train"}


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    """One cohort of three a mode; tests take copies."""
    return {mode: cohort(tmp_path_factory.mktemp(mode), mode=mode) for mode in MODES}


@pytest.fixture
def members(cohorts, tmp_path):
    """A function that gives a copy of a cohort's folder."""

    def copy(mode):
        return shutil.copytree(cohorts[mode], tmp_path / f"members-{mode}")

    return copy


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same training without masks, two rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("flwr")))
        patch.setenv("FEDKL_PASSPHRASE", PASSPHRASE)
        return run(".", app=app_of(), aggregation=PassedOn())


def state(result):
    return result.arrays.to_torch_state_dict()


def delivered(folder, number=0):
    return load_file(folder / f"client-{number}.study.safetensors")


def assert_close(found, expected, atol=1e-6):
    assert list(found)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)


class Lossy:
    """A network around a mod: what it loses is answered with an error, as by a SuperLink whose node is gone.

    Args:
        loses: By stage: partition numbers whose answers never come, once each.
        before: Whether the node is gone before it handles the message, or right afterwards.
    """

    def __init__(self, loses, *, before=True):
        self.loses, self.before = {stage: set(numbers) for stage, numbers in loses.items()}, before
        self.stages = []

    def __call__(self, message, context, call_next):
        stage, number = records.stage_of(message.content), int(context.node_config["partition-id"])
        self.stages.append((number, stage))
        gone = number in self.loses.get(stage, ())
        if gone:
            self.loses[stage].remove(number)
        answer = None if gone and self.before else call_next(message, context)
        return Message(Error(3, "node unavailable"), reply_to=message) if gone else answer


# What comes out


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_that_of_plain_sums_and_every_node_has_it(mode, members, plain):
    folder = members(mode)
    result = run(folder)
    for number in range(3):
        assert_close(delivered(folder, number), state(plain))
        assert (folder / f"client-{number}.study.safetensors").stat().st_mode & 0o777 == 0o600
    for number, metrics in plain.evaluate_metrics_clientapp.items():
        assert result.evaluate_metrics_clientapp[number]["total"] == pytest.approx(metrics["total"], abs=1e-5)
    if mode == "pairwise":
        assert_close(state(result), state(plain))
        assert result.train_metrics_clientapp[2] == {
            "loss": pytest.approx(plain.train_metrics_clientapp[2]["loss"], abs=1e-5)
        }
    else:
        assert not result.arrays
        assert not result.train_metrics_clientapp


@pytest.mark.parametrize("strategy", [FedAvgM, FedAdam, FedYogi, FedAdagrad])
def test_a_servers_optimizer_works_on_the_sum_where_the_members_allow_it(strategy, tmp_path):
    folder = cohort(tmp_path / "members", mode="pairwise", server_model=True)
    result = run(folder, strategy=strategy())
    expected = run(folder, strategy=strategy(), app=app_of(), aggregation=PassedOn())
    assert_close(state(result), state(expected), atol=2e-5)
    assert_close(delivered(folder), state(result))


def test_members_take_turns_where_cohorts_are_sampled(tmp_path):
    folder = cohort(tmp_path / "members", members=4, mode="both", sampled=True)
    network = Lossy({})
    run(folder, nodes=4, app=app_of(network, MaskMod()), strategy=FedAvg(fraction_train=0.75))
    assert sum(stage == "train" for _, stage in network.stages) == 6
    states = [delivered(folder, number) for number in range(4)]
    for other in states[1:]:
        assert_close(other, states[0], atol=0)


# What the server sees


@pytest.mark.parametrize("mode", MODES)
def test_no_number_of_an_update_or_model_is_on_the_wire(mode, members):
    folder, messages, updates = members(mode), [], {}

    def train(message, context):
        answer = trained(message, context)
        for name, tensor in answer.content["arrays"].to_torch_state_dict().items():
            updates[f"{context.node_id}/{name}"] = tensor.flatten()[:6]
        return answer

    def spied(app):
        messages.clear()
        run(folder, app=app, observe=messages.append, aggregation=None, rounds=1)
        return found_in(
            [m for m in messages if m.metadata.dst_node_id == 1],
            {name: tensor for name, tensor in updates.items() if "num_batches" not in name},
        )

    assert spied(app_of(MaskMod(), train=train)) == []
    messages.clear()  # the control: without the mod, all of them
    run(folder, app=app_of(train=train), aggregation=PassedOn(), observe=messages.append, rounds=1)
    assert found_in(messages, {"update": next(iter(updates.values()))}) == ["update"]


def test_over_a_lock_the_public_tensors_are_masked_and_the_private_ones_stay(members):
    folder, messages = members("blind"), []
    app = app_of(MaskMod(), LockMod(net, defense=DEFENSE), train=honest, evaluate=honest_evaluation)
    initial = public_arrays(net(), defense=DEFENSE)
    run(folder, app=app, initial=initial, observe=messages.append, aggregation=Masked())
    assert found_in(messages, stored("client-0")) == []
    final = delivered(folder)
    assert set(final) == set(initial)
    replies = [message for message in messages if message.metadata.dst_node_id == 1]
    assert found_in(replies, {n: t for n, t in final.items() if t.is_floating_point()}) == []
    assert len({message.metadata.src_node_id for message in replies}) == 3


def honest_evaluation(message, context):
    assert current_client().model is not None
    return reply(message)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_server_saw_can_be_recorded(mode, members):
    shown = []
    guard = Guard(FedAvg(), aggregation=Masked(), on_seen=lambda plan, seen: shown.append(seen))

    def main(grid):
        guard.start(grid, ArrayRecord(net().state_dict()), num_rounds=1)

    folder = members(mode)
    run_in_process(server_of(main), app_of(MaskMod()), clients=3, node_config={"fedkl-member": str(folder)})
    [seen] = shown
    kinds = [type(one) for one in seen]
    assert kinds == [SeenUpload] * 3 + [SeenReply] * (mode == "pairwise")
    numbers = seen[0].as_numbers()
    assert {name: tensor.shape for name, tensor in numbers.items()} == {
        name: tensor.shape for name, tensor in net().state_dict().items() if tensor.is_floating_point()
    }


@pytest.mark.parametrize("mode", MODES)
def test_what_the_server_has_only_members_can_open_unless_it_is_the_sum(mode, members, tmp_path, monkeypatch):
    folder, rounds = members(mode), tmp_path / "rounds"
    run(folder, checkpoints=rounds)
    first, saved = net().state_dict(), RoundFiles(rounds).newest()
    assert all(torch.equal(saved.arrays[name], first[name]) for name in first) == (mode != "pairwise")
    if mode != "pairwise":
        with pytest.raises(ConfigError, match="only members can open it"):
            export(rounds, out=tmp_path / "model.safetensors")
    out, secret = tmp_path / "m.safetensors", folder / "client-1.secret"
    monkeypatch.setattr(
        "sys.argv", ["fedkl", "export", str(rounds), "--out", str(out), "--member", str(secret)]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert_close(load_file(out), delivered(folder), atol=0)
    assert out.stat().st_mode & 0o777 == (0o644 if mode == "pairwise" else 0o600)


def test_a_stranger_or_a_changed_byte_opens_no_checkpoint(members, tmp_path):
    rounds, other = tmp_path / "rounds", cohort(tmp_path / "others")
    folder = members("blind")
    run(folder, rounds=1, checkpoints=rounds)
    with (
        MemberFile.open(other / "client-0.secret", passphrase=PASSPHRASE) as file,
        pytest.raises(MaskingError, match="of another cohort or epoch, or was altered"),
    ):
        export(rounds, out=tmp_path / "m.safetensors", member=file)
    saved = RoundFiles(rounds).newest()
    saved.kept["sum/words"][200] ^= 1
    with (
        MemberFile.open(folder / "client-0.secret", passphrase=PASSPHRASE) as file,
        pytest.raises(MaskingError, match="or was altered"),
    ):
        opened_by(file, saved)


@pytest.mark.parametrize("mode", MODES)
def test_a_node_has_its_model_from_its_lock_and_the_delivered_file(mode, members):
    folder, said = members(mode), {}
    x = torch.linspace(-1, 1, 20).reshape(5, 4)

    def evaluate(message, context):
        said[current_client().name] = current_client().model.eval()(x).detach()
        return reply(message)

    app = app_of(MaskMod(), LockMod(net, defense=DEFENSE), train=honest, evaluate=evaluate)
    run(folder, app=app, initial=public_arrays(net(), defense=DEFENSE), aggregation=Masked())
    assert len(said) == 3
    for name, expected in said.items():
        lock = fedkl.load_lock(
            store().path(name), net(), passphrase=PASSPHRASE, public=folder / f"{name}.study.safetensors"
        )
        torch.testing.assert_close(lock.model.eval()(x).detach(), expected, rtol=0, atol=0)


# Who is gone


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before", [True, False])
def test_a_member_that_is_gone_before_or_after_its_upload_costs_nothing_more(mode, before, tmp_path):
    folder = cohort(tmp_path / "members", members=4, mode=mode)
    network = Lossy({"train": {3}}, before=before)
    result = run(folder, nodes=4, rounds=2, app=app_of(network, MaskMod()))
    assert len(result.evaluate_metrics_clientapp) == 2
    assert_close(delivered(folder, 3), delivered(folder, 0), atol=0)
    assert [number for number, stage in network.stages if stage == "train"].count(3) == 2


@pytest.mark.parametrize("mode", ["pairwise", "both"])
def test_a_member_that_is_gone_before_it_reveals_is_still_in_the_sum(mode, tmp_path):
    folder = cohort(tmp_path / "members", members=5, mode=mode)
    network = Lossy({"reveal": {1}})
    run(folder, nodes=5, rounds=1, app=app_of(network, MaskMod()))
    expected = run(folder, nodes=5, rounds=1, app=app_of(), aggregation=PassedOn())
    assert_close(delivered(folder), state(expected))


@pytest.mark.parametrize("mode", ["pairwise", "both"])
def test_with_one_gone_before_and_one_after_its_upload_the_others_mask_again(mode, tmp_path, caplog):
    folder = cohort(tmp_path / "members", members=5, mode=mode)
    network = Lossy({"train": {4}, "here": {1}})
    run(folder, nodes=5, rounds=1, app=app_of(network, MaskMod()))
    assert sorted(number for number, stage in network.stages if stage == "again") == [0, 2, 3]
    assert "tried again with 3" in caplog.text
    three = [number for number in range(5) if number not in (1, 4)]
    expected = mean_of(three)
    assert_close(delivered(folder, 1), expected)


def mean_of(numbers):
    """The mean of what some clients train from the first model, computed here."""
    states = []
    for number in numbers:
        model = net()
        step(model, seed=number)
        states.append((8 + number, model.state_dict()))
    total = sum(weight for weight, _ in states)
    mean = {
        name: sum(weight * each[name].double() for weight, each in states) / total for name in states[0][1]
    }
    return {name: tensor.to(states[0][1][name].dtype) for name, tensor in mean.items()}


@pytest.mark.parametrize(("available", "told"), [(2, True), (3, False)])
def test_a_strategy_that_begins_with_fewer_nodes_than_a_sum_needs_is_told(available, told, members, caplog):
    run(members("blind"), rounds=1, strategy=FedAvg(min_available_nodes=available))
    assert ("Set its min_available_nodes to 3 or more" in caplog.text) == told


def test_too_few_are_a_lost_round_and_the_next_one_goes_on(members, caplog):
    folder = members("both")
    network = Lossy({"train": {0, 1}})
    result = run(folder, rounds=2, app=app_of(network, MaskMod()))
    assert "Nothing changes" in caplog.text or "nothing changes" in caplog.text
    assert_close(delivered(folder), mean_of(range(3)))
    assert list(result.evaluate_metrics_clientapp) == [2]  # before a sum there is nothing to evaluate


def test_a_round_that_cannot_be_opened_is_lost_and_the_next_one_goes_on(members, caplog):
    folder = members("pairwise")
    network = Lossy({"reveal": {0, 1}})
    run(folder, rounds=2, app=app_of(network, MaskMod()))
    assert "cannot be opened" in caplog.text
    assert_close(delivered(folder), mean_of(range(3)))


@pytest.mark.parametrize("restarted", [False, True])
def test_after_a_round_that_was_revealed_for_in_vain_the_same_members_make_the_next_sum(
    restarted, tmp_path, caplog
):
    """One was away, another went before it revealed. With both back, members reveal for the same only."""
    folder = cohort(tmp_path / "members", members=5, mode="both")
    app = app_of(Lossy({"train": {4}, "reveal": {3}}), MaskMod())
    more = {"nodes": 5, "app": app, "checkpoints": tmp_path / "rounds"}
    result = run(folder, rounds=1 if restarted else 2, **more)
    if restarted:
        assert not result.evaluate_metrics_clientapp
        result = run(folder, rounds=1, **more)
    assert "3 shares of 4" in caplog.text
    assert "tried again with 4 of the members" in caplog.text
    assert list(result.evaluate_metrics_clientapp) == [1 if restarted else 2]
    assert_close(delivered(folder, 4), mean_of(range(4)))


def test_while_one_of_those_who_were_asked_to_reveal_is_away_nobody_is_asked(tmp_path, caplog):
    folder = cohort(tmp_path / "members", members=5, mode="pairwise")
    network = Lossy({"train": {4}, "reveal": {3}})
    network.loses["again"] = {3}
    run(folder, nodes=5, rounds=3, app=app_of(network, MaskMod()))
    assert "not here: client-3" in caplog.text
    reveals = [number for number, stage in network.stages if stage == "reveal"]
    assert sorted(reveals) == [0, 0, 1, 1, 2, 2, 3, 3]  # in the first round and in the third
    assert_close(delivered(folder), mean_of(range(4)))


def test_nobody_is_asked_to_reveal_in_a_round_that_cannot_be_opened(tmp_path, caplog):
    folder = cohort(tmp_path / "members", members=5, mode="pairwise")
    network = Lossy({"train": {4}, "here": {0, 1}})
    run(folder, nodes=5, rounds=2, app=app_of(network, MaskMod()))
    assert "cannot be opened, and nobody was asked to reveal" in caplog.text
    assert [stage for _, stage in network.stages].count("reveal") == 5  # of the second round
    assert_close(delivered(folder), mean_of(range(5)))


# Going on


def uploads(messages):
    """All masked updates in messages to the server."""
    return [
        records.upload_of(message.content)
        for message in messages
        if message.has_content() and f"{PREFIX}.upload" in message.content
    ]


@pytest.mark.parametrize("mode", MODES)
def test_a_training_goes_on_after_its_last_round_and_no_mask_is_used_twice(mode, members, tmp_path):
    folder, messages = members(mode), []
    more = {"checkpoints": tmp_path / "rounds", "observe": messages.append}
    run(folder, rounds=1, **more)
    result = run(folder, rounds=3, **more)
    assert list(result.evaluate_metrics_clientapp) == [1, 2, 3]
    expected = run(folder, rounds=3, app=app_of(), aggregation=PassedOn())
    assert_close(delivered(folder), state(expected))
    assert_no_mask_twice(uploads(messages), count=9)


def assert_no_mask_twice(found, *, count):
    assert len(found) == count
    assert len({upload.nonce for upload in found}) == count
    assert len({(upload.member, upload.context) for upload in found}) == count


@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_dies_before_its_checkpoint_does_the_round_again(mode, members, tmp_path, monkeypatch):
    folder, messages = members(mode), []
    more = {"checkpoints": tmp_path / "rounds", "observe": messages.append}

    def dies(self, saved):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(RoundFiles, "save", dies)
        with pytest.raises(SystemExit):
            run(folder, rounds=2, **more)
    run(folder, rounds=2, **more)
    expected = run(folder, rounds=2, app=app_of(), aggregation=PassedOn())
    assert_close(delivered(folder), state(expected))
    assert_no_mask_twice(uploads(messages), count=9)


def test_a_lost_count_of_calls_costs_rounds_and_no_mask(members, tmp_path):
    folder, messages = members("pairwise"), []
    more = {"checkpoints": tmp_path / "rounds", "observe": messages.append}
    run(folder, rounds=1, **more)
    (tmp_path / "rounds" / "calls.json").write_text("{")
    with pytest.warns(UserWarning, match=r"calls\.json: cannot be read"):
        run(folder, rounds=2, **more)
    assert_no_mask_twice(uploads(messages), count=6)


def test_metrics_may_be_a_list_and_a_training_goes_on_with_it(members, tmp_path):
    folder, more = members("blind"), {"checkpoints": tmp_path / "rounds"}
    for rounds in (1, 2):
        result = run(folder, rounds=rounds, aggregation=Masked(metrics=["loss"]), **more)
    assert list(result.evaluate_metrics_clientapp) == [1, 2]


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ("loss", "expected names, got 'loss'"),
        (("loss", 3), "expected names"),
        (None, "expected names, got 'None'"),
        (("loss", "loss"), "'loss' is there twice"),
    ],
)
def test_metrics_that_are_no_names_are_refused(metrics, problem):
    with pytest.raises(ConfigError, match=f"Masked: metrics: {problem}"):
        Masked(metrics=metrics)


def test_the_metrics_of_a_training_stay_the_same(members, tmp_path):
    folder = members("blind")
    run(folder, rounds=1, checkpoints=tmp_path / "rounds")
    with pytest.raises(ConfigError, match="have 'loss' in their sums"):
        run(folder, rounds=2, checkpoints=tmp_path / "rounds", aggregation=Masked())


def test_rounds_with_masks_and_without_do_not_mix(members, tmp_path):
    run(members("blind"), rounds=1, checkpoints=tmp_path / "rounds")
    with pytest.raises(ConfigError, match="the rounds of a masked training"):
        run(".", rounds=2, app=app_of(), aggregation=PassedOn(), checkpoints=tmp_path / "rounds")


# What is refused


@pytest.mark.parametrize(
    ("rules", "strategy", "evaluate", "message"),
    [
        ({"mode": "blind"}, FedAdam(), False, "FedAdam makes a model of its own"),
        ({"mode": "both"}, FedAvgM(), False, "--mode pairwise --server-model"),
        ({"mode": "pairwise"}, FedAdam(), False, "found the cohort with --server-model"),
        ({"mode": "blind"}, FedAvg(), True, "no model to evaluate"),
        ({"mode": "pairwise", "server_model": True}, Krum(), False, "each client's own update"),
    ],
)
def test_a_server_that_wants_more_than_it_may_read_is_told_before_anybody_trains(
    rules, strategy, evaluate, message, tmp_path
):
    folder = cohort(tmp_path / "members", **rules)
    network = Lossy({})
    with pytest.raises(ConfigError, match=message):
        run(
            folder,
            strategy=strategy,
            evaluate_fn=(lambda number, arrays: None) if evaluate else None,
            app=app_of(network, MaskMod()),
        )
    assert {stage for _, stage in network.stages} == {"who"}


def ask(folder, message, *, app=None):
    """A node's answer to one message."""
    message.metadata.__dict__["_message_id"] = "1"
    config = {"partition-id": 0, "fedkl-member": str(folder)}
    return (app or app_of(MaskMod()))(message=message, context=Context(1, 7, config, RecordDict(), {}))


def refused(answer):
    return answer.has_error() and answer.error.reason == MASKS_REFUSED


def plain_request(**records_):
    return Message(RecordDict({"arrays": ArrayRecord(net().state_dict()), **records_}), **REQUEST)


def test_nothing_is_ever_sent_unmasked(members, caplog):
    folder = members("blind")
    assert refused(ask(folder, plain_request()))
    assert "sends nothing unmasked" in caplog.text
    message = plain_request()
    message.metadata.message_type = "evaluate"
    assert refused(ask(folder, message))


def test_stages_belong_to_a_type_of_message(members):
    content = RecordDict()
    records.put_stage(content, "who")
    assert refused(ask(members("blind"), Message(content, dst_node_id=7, message_type="evaluate")))
    odd = RecordDict({f"{PREFIX}.stage": ConfigRecord({"stage": "upload-plain"})})
    assert refused(ask(members("both"), Message(odd, **REQUEST)))


def test_settings_come_in_one_order():
    """That in which their digest has them."""
    given = {"z": ConfigRecord({"b": 2, "a": 1}), "c": MetricRecord({"y": 1.0, "x": 2.0})}
    found = records.in_order(given)
    assert [(name, type(record), list(record)) for name, record in found.items()] == [
        ("c", MetricRecord, ["x", "y"]),
        ("z", ConfigRecord, ["a", "b"]),
    ]
    assert dict(found["z"]) == dict(given["z"])


@pytest.mark.parametrize("mode", ["pairwise", "blind"])
def test_an_app_gets_arrays_in_the_order_that_is_agreed_on(mode, members):
    """Many apps go by position: exchanged arrays have one node train, the others not, and tell its update."""
    got = []

    def exchanging(message, context, call_next):
        if records.stage_of(message.content) == "train":
            turn = reversed if int(context.node_config["partition-id"]) == 1 else list
            arrays = message.content.array_records.get("arrays")
            if arrays is not None:
                message.content["arrays"] = ArrayRecord(dict(turn(arrays.items())))
        return call_next(message, context)

    def train(message, context):
        content = {name: list(record) for name, record in message.content.items()}
        got.append((int(context.node_config["partition-id"]), list(content), content))
        return trained(message, context)

    run(members(mode), app=app_of(exchanging, MaskMod(), train=train))
    assert [number for number, *_ in got].count(1) == 2
    assert all(each[1:] == got[0][1:] for each in got)
    assert got[0][2]["arrays"] == list(net().state_dict())


def test_an_evaluation_sends_single_numbers_only(members, caplog):
    def leaks(message, context):
        content = RecordDict(
            {"metrics": MetricRecord({"num-examples": 8}), "arrays": message.content["arrays"]}
        )
        return Message(content, reply_to=message)

    def lists(message, context):
        values = message.content["arrays"]["0.weight"].numpy().ravel().tolist()
        return Message(
            RecordDict({"metrics": MetricRecord({"num-examples": 8, "w": values})}), reply_to=message
        )

    for number, evaluate in enumerate((leaks, lists)):
        folder = members(MODES[number])
        result = run(folder, rounds=1, app=app_of(MaskMod(), evaluate=evaluate))
        assert not result.evaluate_metrics_clientapp
        assert "would leave this node unmasked" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": 1.0}, "'num-examples' as a whole number"),
        ({"num-examples": 2.5, "loss": 1.0}, "'num-examples' as a whole number"),
        ({"num-examples": float("inf"), "loss": 1.0}, "'num-examples' as a whole number"),
        ({"num-examples": 2**21, "loss": 1.0}, "the roster's bound"),
        ({"num-examples": 0, "loss": 1.0}, "the roster's bound"),
        ({"num-examples": 8}, "the metric 'loss', which this app does not give"),
        ({"num-examples": 8, "loss": float("nan")}, "not a number within"),
    ],
)
def test_an_update_that_does_not_fit_stays_on_its_node(metrics, message, members, caplog):
    def train(request, context):
        content = {"arrays": request.content["arrays"], "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=request)

    run(members("blind"), rounds=1, app=app_of(MaskMod(), train=train))
    assert message in caplog.text
    assert "no node has written" in caplog.text or "0 of" not in caplog.text


def test_the_mod_comes_first(members, monkeypatch):
    app = app_of(LockMod(net, defense=DEFENSE), MaskMod(), train=honest)
    answer = ask(members("blind"), plain_request(), app=app)
    assert answer.has_error()


def test_a_failure_of_the_app_tells_the_server_nothing(members, caplog):
    def train(message, context):
        raise ValueError("patient 4711")

    messages = []
    run(members("blind"), rounds=1, app=app_of(MaskMod(), train=train), observe=messages.append)
    reasons = {message.error.reason for message in messages if message.has_error()}
    assert reasons == {MASKS_REFUSED}
    assert "4711" not in caplog.text


@pytest.mark.parametrize(
    ("node_config", "message"),
    [
        ({}, "no member's secret file"),
        ({"fedkl-member": "/nowhere/x.secret"}, "cannot be read"),
        ({"fedkl-cohort": "other"}, "no cohort 'other'"),
    ],
)
def test_a_node_without_its_member_says_so_in_its_own_log(node_config, message, members, caplog):
    folder = members("blind")
    config = {"partition-id": 0, **({"fedkl-member": str(folder)} if "fedkl-cohort" in node_config else {})}
    content = RecordDict()
    records.put_stage(content, "who")
    request = Message(content, **REQUEST)
    request.metadata.__dict__["_message_id"] = "1"
    answer = app_of(MaskMod())(
        message=request, context=Context(1, 7, {**config, **node_config}, RecordDict(), {})
    )
    assert refused(answer)
    assert message in caplog.text


def test_a_member_of_another_cohort_and_a_double_are_not_asked(members, tmp_path, caplog):
    folder = members("blind")
    cohort(tmp_path / "others", members=4)
    shutil.copy(tmp_path / "others" / "client-3.secret", folder / "client-3.secret")
    result = run(folder, nodes=4, rounds=1)
    assert "is of another cohort or epoch" in caplog.text
    assert result.evaluate_metrics_clientapp

    shutil.copy(folder / "client-0.secret", folder / "client-3.secret")
    shutil.copy(folder / "client-0.memory", folder / "client-3.memory")
    caplog.clear()
    run(folder, nodes=4, rounds=1)
    assert "as another does; it is not asked" in caplog.text


class Impostor:
    """A fourth node, without a key, that says it is client-1 once that has trained so often, and sends noise.

    All that it knows is what client-1 has told the server, and what that sent.
    """

    def __init__(self, *, after):
        self.after, self.seen, self.trained = after, {}, 0

    def __call__(self, message, context, call_next):
        stage, number = records.stage_of(message.content), int(context.node_config["partition-id"])
        if number != 3:
            answer = call_next(message, context)
            if number == 1 and not answer.has_error():
                self.seen[stage] = answer.content
                self.trained += stage == "train"
            return answer
        content = RecordDict(dict(self.seen.get(stage, {}).items()))
        if self.trained < self.after or not content:
            return Message(Error(2, "not now"), reply_to=message)
        if stage == "train":
            content[WORDS] = ArrayRecord({"words": Array(words_of(content)[::-1].copy())})
        return Message(content, reply_to=message)


@pytest.mark.parametrize("after", [0, 2])
def test_a_node_that_says_it_is_a_member_does_not_take_its_seat(after, members, caplog):
    """One whose updates members have taken is the member; before any has, those that say so take turns."""
    caplog.set_level(logging.INFO)
    result = run(members("blind"), nodes=4, rounds=8, app=app_of(Impostor(after=after), MaskMod()))
    assert "says that it is 'client-1', as another does" in caplog.text
    lost = [number for number in range(1, 9) if f"Round {number}: a sum of 3 updates" not in caplog.text]
    assert lost == [] if after else len(lost) <= 4
    assert result.evaluate_metrics_clientapp[8]


def test_nodes_without_the_mod_are_named(caplog):
    run(".", rounds=1, app=app_of())
    assert "Has its app a MaskMod?" in caplog.text
    assert "no node has said who its member is" in caplog.text


class Forged:
    """A node that answers trainings with something else."""

    def __init__(self, change, number=1):
        self.change, self.number = change, number

    def __call__(self, message, context, call_next):
        answer = call_next(message, context)
        mine = int(context.node_config["partition-id"]) == self.number
        if mine and not answer.has_error() and records.stage_of(message.content) == "train":
            content = RecordDict(dict(answer.content.items()))
            self.change(content)
            return Message(content, reply_to=message)
        return answer


def as_another(content):
    upload = records.upload_of(content)
    records.put_upload(content, type(upload)(**{**vars(upload), "member": "client-2"}))


def shorter(content):
    upload = records.upload_of(content)
    records.put_upload(content, type(upload)(**{**vars(upload), "words": upload.words[:-16].copy()}))


def in_the_clear(content):
    content.clear()
    content["arrays"] = ArrayRecord(net().state_dict())


def without_nonce(content):
    content[f"{PREFIX}.upload"] = ConfigRecord({"member": "client-1"})


@pytest.mark.parametrize("change", [as_another, shorter, in_the_clear, without_nonce])
def test_a_reply_that_is_no_upload_is_left_out(change, tmp_path, caplog):
    folder = cohort(tmp_path / "members", members=4)
    run(folder, nodes=4, rounds=1, app=app_of(Forged(change), MaskMod()))
    assert "refused" in caplog.text
    assert_close(delivered(folder, 0), mean_of([0, 2, 3]))


class Flipping:
    """Flips one bit of the words of one node's so-manieth uploads: a tag that no server can check."""

    def __init__(self, *which):
        self.which, self.count = which, 0

    def __call__(self, message, context, call_next):
        answer = call_next(message, context)
        mine = int(context.node_config["partition-id"]) == 1
        if mine and not answer.has_error() and records.stage_of(message.content) == "train":
            self.count += 1
            if self.count in self.which:
                words = words_of(answer.content).copy()
                words[-40] ^= 1
                content = RecordDict(dict(answer.content.items()))
                content[WORDS] = ArrayRecord({"words": Array(words)})
                return Message(content, reply_to=message)
        return answer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", [1, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kept", [True, False], ids=["checkpoints", "memory"])
def test_one_broken_upload_costs_a_round_or_two_and_not_the_training(kept, which, mode, tmp_path, caplog):
    folder = cohort(tmp_path / "members", mode=mode)
    place = tmp_path / "rounds" if kept else None
    result = run(folder, rounds=4, app=app_of(Flipping(which), MaskMod()), checkpoints=place)
    good = {1, 2, 3, 4} - {which, which + 1}  # the members refuse the sum, and then go on from the one before
    assert set(result.evaluate_metrics_clientapp) >= good
    assert "It goes on from the model before" in caplog.text
    states = [delivered(folder, number) for number in range(3)]
    assert all(tensor.isfinite().all() for tensor in states[0].values())
    for other in states[1:]:
        assert_close(other, states[0], atol=0)
    if kept:  # a new start does not fall into the same hole
        again = run(folder, rounds=7, app=app_of(MaskMod()), checkpoints=place)
        assert set(again.evaluate_metrics_clientapp) >= good | {6, 7}


class Stubborn:
    """All three members refuse the second training that they are asked for."""

    def __init__(self):
        self.count = 0

    def __call__(self, message, context, call_next):
        if records.stage_of(message.content) == "train":
            self.count += 1
            if 4 <= self.count <= 6:
                return Message(Error(2, MASKS_REFUSED), reply_to=message)
        return call_next(message, context)


def test_who_goes_back_for_nothing_comes_forward_again(members, tmp_path, caplog):
    folder = members("blind")
    result = run(folder, rounds=6, app=app_of(Stubborn(), MaskMod()), checkpoints=tmp_path / "rounds")
    assert "It goes on from the model before" in caplog.text
    assert set(result.evaluate_metrics_clientapp) >= {1, 5, 6}


class Away:
    """A network around a mod: nodes that are away in some rounds, and apps that fail in some."""

    def __init__(self, *, away=(), failing=()):
        self.away, self.failing, self.round = dict(away), dict(failing), 0

    def __call__(self, message, context, call_next):
        number, stage = int(context.node_config["partition-id"]), records.stage_of(message.content)
        if stage == "train":
            self.round = max(self.round, int(message.content["config"]["server-round"]))
        if self.round in self.away.get(number, ()):
            return Message(Error(3, "node unavailable"), reply_to=message)
        if stage == "train" and self.round in self.failing.get(number, ()):
            return Message(Error(2, MASKS_REFUSED), reply_to=message)
        return call_next(message, context)


def test_one_that_was_away_does_not_keep_the_others_on_an_old_model(tmp_path):
    """It takes the model before, which the others have left behind: most decide."""
    folder = cohort(tmp_path / "members", members=4)
    network = Away(away={3: (3, 4)}, failing={0: (4,), 1: (4,), 2: (4,)})
    result = run(folder, nodes=4, rounds=8, app=app_of(network, MaskMod()), checkpoints=tmp_path / "rounds")
    assert set(result.evaluate_metrics_clientapp) >= {7, 8}
    states = [delivered(folder, number) for number in range(4)]
    for other in states[1:]:
        assert_close(other, states[0], atol=0)


@pytest.mark.parametrize("mode", ["blind", "both"])
def test_one_that_forges_every_upload_does_not_stop_what_the_others_had(mode, tmp_path):
    folder = cohort(tmp_path / "members", members=4, mode=mode)
    forger = Flipping(*range(2, 20))
    run(folder, nodes=4, rounds=5, app=app_of(forger, MaskMod()), checkpoints=tmp_path / "rounds")
    assert_close(delivered(folder, 0), delivered(folder, 2), atol=0)
    after = run(folder, nodes=4, rounds=8, app=app_of(MaskMod()), checkpoints=tmp_path / "rounds")
    assert 8 in after.evaluate_metrics_clientapp


def test_with_pair_masks_all_of_a_broken_sum_have_to_come_back(tmp_path, caplog):
    """They have revealed for one another on the model before: other names would give somebody away."""
    folder = cohort(tmp_path / "members", members=4, mode="pairwise")
    network = Away(away={1: range(3, 7)})
    caplog.set_level(logging.INFO)
    run(folder, nodes=4, rounds=6, app=app_of(network, Flipping(2), MaskMod()))
    assert "all who were in the sum have to come back" in caplog.text
    assert caplog.text.count("sound replies") >= 1


def test_where_the_server_may_change_the_model_nothing_is_gone_back_from(tmp_path, caplog):
    folder = cohort(tmp_path / "members", mode="pairwise", server_model=True)
    network = Away(failing={0: (3,), 1: (3,), 2: (3,)})
    result = run(folder, rounds=4, strategy=FedAdam(), app=app_of(network, MaskMod()))
    assert "It goes on from the model before" not in caplog.text
    totals = [result.evaluate_metrics_clientapp[number]["total"] for number in (2, 3)]
    assert totals[0] == totals[1]


def test_a_last_sum_that_is_refused_is_not_what_the_server_keeps(tmp_path):
    folder, place = cohort(tmp_path / "members", mode="pairwise"), tmp_path / "rounds"
    result = run(folder, rounds=3, app=app_of(Flipping(3), MaskMod()), checkpoints=place)
    assert_close(delivered(folder), state(result))
    assert_close(delivered(folder), RoundFiles(place).newest().arrays)
    blind = run(cohort(tmp_path / "blind"), rounds=3, app=app_of(Flipping(3), MaskMod()))
    assert not blind.arrays


def altered(message):
    """The words of the sum in a message with one bit flipped."""
    name = f"{PREFIX}.words"
    words = words_of(message.content).copy()
    words[100] ^= 1
    message.content[name] = ArrayRecord({"words": Array(words)})


@pytest.mark.parametrize("mode", MODES)
def test_a_sum_with_one_bit_changed_is_taken_by_nobody(mode, members, caplog):
    folder = members(mode)

    def observe(message):
        stage = records.stage_of(message.content) if message.has_content() else None
        if stage == "evaluate" and f"{PREFIX}.words" in message.content:
            altered(message)

    result = run(folder, rounds=1, observe=observe)
    assert not result.evaluate_metrics_clientapp
    assert "its tag does not fit" in caplog.text


def test_a_model_in_the_clear_is_not_taken_where_there_is_a_sum(members, caplog):
    folder, asked = members("blind"), []

    def observe(message):
        stage = records.stage_of(message.content) if message.has_content() else None
        asked.append(stage)
        if stage == "evaluate" and asked.count(stage) > 3:  # in round 2: all have opened the first sum
            for name in (f"{PREFIX}.sum", f"{PREFIX}.words", f"{PREFIX}.booleans"):
                message.content.pop(name, None)
            message.content["arrays"] = ArrayRecord(net().state_dict())

    result = run(folder, rounds=2, observe=observe)
    assert list(result.evaluate_metrics_clientapp) == [1]
    assert "expected the trained model as a sum" in caplog.text


@pytest.mark.parametrize(
    ("stage", "message"),
    [("train", "masks the update that there is"), ("deliver", "expected the trained model as a sum")],
)
def test_a_node_neither_trains_twice_for_a_round_nor_takes_any_model_for_the_trained_one(
    stage, message, members, caplog
):
    folder = members("pairwise")
    content = RecordDict({"arrays": ArrayRecord(net().state_dict())})
    records.put_stage(content, stage)
    run_name = bytes(16)
    cohort_of = tuple(f"client-{number}" for number in range(3))
    records.put_call(content, Call(run=run_name, round=1, attempt=1, cohort=cohort_of))
    specs = {name: TensorSpec.of(tensor) for name, tensor in net().state_dict().items()}
    nothing = {"metrics": (), "rounds": 0, "total": None, "booleans": {}}
    base = Base(run=run_name, specs=specs, record="arrays", **nothing)
    put_base(content, base)
    assert refused(ask(folder, Message(content, **REQUEST)))
    assert message in caplog.text
    assert not list(folder.glob("*.safetensors"))


def test_no_secret_is_in_a_message_or_a_log(members, caplog):
    caplog.set_level(logging.DEBUG)
    folder, messages = members("both"), []
    run(folder, observe=messages.append)
    secrets = {}
    for path in sorted(folder.glob("*.secret")):
        with MemberFile.open(path, passphrase=PASSPHRASE) as file:
            for kind, seed in file.keys.seeds.items():
                secrets[f"{path.stem}/{kind}"] = seed.reveal()
            secrets[f"{path.stem}/cohort"] = file.membership().secret.reveal()
    wire = b"|".join(
        piece if isinstance(piece, bytes) else str(piece).encode()
        for message in messages
        if message.has_content()
        for record in message.content.values()
        for value in record.values()
        for piece in (value if isinstance(value, list) else [getattr(value, "data", value)])
    )
    assert uploads(messages)[0].nonce in wire  # the search finds what is there
    for name, secret in secrets.items():
        assert secret not in wire, name
        assert secret.hex() not in caplog.text, name


def test_a_changed_cohort_is_found_by_asking_again(members, tmp_path):
    """Who fails in a round is asked anew who it is."""
    folder = members("blind")
    run(folder, rounds=1)
    files = {
        path.stem: MemberFile.open(path, passphrase=PASSPHRASE) for path in sorted(folder.glob("*.secret"))
    }
    previous = files["client-0"].membership().roster
    found(files, previous=previous, mode="blind")
    run(folder, rounds=1)
    assert_close(delivered(folder), mean_of(range(3)))
