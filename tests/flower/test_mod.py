"""The client mod: what it lets in, what it lets out, and what is left on the node."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkl.defenses import KeyLock, NoDefense
from fedkl.defenses.masked import MaskedUpload
from fedkl.defenses.noise import GaussianNoise
from fedkl.errors import ConfigError, LockError, SecretError
from fedkl.flower import LockMod, TransformMod, current_client, public_arrays
from fedkl.flower.mod import FAILED, REFUSED_MESSAGE, REFUSED_REPLY
from fedkl.flower.records import arrays_of
from fedkl.flower.transforming import NOT_CHANGED
from tests.flower.setting import (
    DEFENSE,
    app_of,
    arrays_with,
    ask,
    good_content,
    honest,
    message_bytes,
    metrics,
    net,
    reply,
    store,
    stored,
)
from tests.locking.leaks import secrets_of

PRIVATE = ("1.parametrizations.weight.original0", "1.running_mean")
NUMBERS = torch.arange(18.0).reshape(3, 6) + 0.5


def test_an_honest_client_sends_exactly_the_public_tensors_and_keeps_the_rest():
    answer = ask(app_of(honest))
    assert sorted(answer.content["arrays"]) == [
        "0.bias",
        "0.weight",
        "3.bias",
        "3.weight",
        "4.bias",
        "4.weight",
    ]
    first = stored()
    ask(app_of(honest), good_content())
    second = stored()
    assert torch.equal(first["key"], second["key"])
    assert not torch.equal(first["1.running_mean"], second["1.running_mean"])


def test_the_model_of_the_client_has_the_servers_tensors_and_its_own_private_ones():
    changed = {"0.weight": torch.full((6, 4), 0.25)}
    ask(app_of(honest))
    seen = {}

    def look(message, context):
        seen.update(current_client().lock.full_state())
        return reply(message)

    ask(app_of(look), good_content(arrays=arrays_with(changed)), "evaluate")
    assert torch.equal(seen["0.weight"], changed["0.weight"])
    assert torch.equal(seen["1.running_mean"], stored()["1.running_mean"])


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"private": ("head",)}, ["0.bias", "0.weight", "3.bias", "3.weight"]),
        (
            {"layers": "classifier"},
            ["0.bias", "0.weight", "1.bias", "1.weight", "3.bias", "3.weight", "4.bias", "4.weight"],
        ),
    ],
)
def test_variants_of_the_lock_keep_what_is_theirs(options, sent):
    defense = KeyLock(key_length=16, **options)
    app, kept = app_of(honest, defense=defense), []
    for _ in range(2):
        content = good_content(arrays=public_arrays(net(), defense=defense))
        assert sorted(ask(app, content).content["arrays"]) == sent
        with store().client("client-0", model=net(), defense=defense) as client:
            kept.append(secrets_of(client.lock))
    assert torch.equal(kept[0]["key"], kept[1]["key"])
    trained = {name for name in kept[0] if not torch.equal(kept[0][name], kept[1][name])}
    assert any(name.startswith(("4.", "1.running")) for name in trained)


def test_evaluations_and_queries_store_nothing():
    ask(app_of(honest))
    before = stored()
    for kind in ("evaluate", "query"):
        assert ask(app_of(honest), kind=kind).has_content()
    assert all(torch.equal(before[name], tensor) for name, tensor in stored().items())


def recalibrating(message, context):
    """An evaluation that counts the statistics over the node's own images, and changes nothing else."""
    current_client().recalibrate_norms_(OWN)
    return reply(message)


OWN = torch.rand(40, 4, generator=torch.Generator().manual_seed(3))


def test_an_evaluation_that_recalibrates_stores_statistics_of_the_model_that_came():
    ask(app_of(honest))
    before = stored()
    changed = {"0.weight": torch.full((6, 4), 0.25)}
    answer = ask(app_of(recalibrating), good_content(arrays=arrays_with(changed)), "evaluate")
    assert list(answer.content) == ["metrics"]
    after = stored()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "1.running_mean", "1.running_var"
    }  # fmt: skip
    bias = torch.from_numpy(good_content()["arrays"]["0.bias"].numpy())
    values = OWN @ changed["0.weight"].T + bias
    torch.testing.assert_close(after["1.running_mean"], values.mean(0))
    torch.testing.assert_close(after["1.running_var"], values.var(0))


def test_an_evaluation_stores_statistics_and_nothing_else():
    """It may fit the model to its images for a figure of its own; the next round does not begin there."""

    def fine_tune(message, context):
        client = current_client()
        client.recalibrate_norms_(OWN)
        with torch.no_grad():
            for tensor in client.lock.private_parameters().values():
                tensor.add_(1)
        client.memory["steps"] = torch.ones(1)
        return reply(message)

    ask(app_of(honest))
    before = stored()
    ask(app_of(fine_tune), good_content(arrays=arrays_with({"0.weight": torch.ones(6, 4)})), "evaluate")
    after = stored()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1.running_mean", "1.running_var"}


def test_a_node_without_images_is_evaluated_with_the_statistics_that_it_has():
    def few(message, context):
        assert current_client().recalibrate_norms_(OWN[:1]) is False
        return reply(message)

    ask(app_of(honest))
    assert ask(app_of(few), kind="evaluate").has_content()


def test_recalibrated_statistics_are_not_sent():
    def leak(message, context):
        client = current_client()
        client.recalibrate_norms_(OWN)
        return reply(message, seen=metrics(m=client.model[1].running_mean.tolist()))

    ask(app_of(honest))
    before = stored()
    assert ask(app_of(leak), kind="evaluate").error.reason == REFUSED_REPLY
    assert all(torch.equal(before[name], tensor) for name, tensor in stored().items())


def test_memory_is_kept_with_the_lock():
    def remember(message, context):
        memory = current_client().memory
        memory["steps"] = memory.get("steps", torch.zeros(1)) + 1
        return reply(
            message, ArrayRecord(current_client().model.state_dict()), seen=metrics(s=float(memory["steps"]))
        )

    values = [ask(app_of(remember)).content["seen"]["s"] for _ in range(3)]
    assert values == [1.0, 2.0, 3.0]


BAD_MESSAGES = {
    "missing": {"arrays": arrays_with({"0.bias": None})},
    "unexpected": {"arrays": arrays_with({"new": torch.ones(2)})},
    "shape": {"arrays": arrays_with({"0.bias": torch.ones(5)})},
    "nan": {"arrays": arrays_with({"0.bias": torch.full((6,), math.nan)})},
    "infinite": {"arrays": arrays_with({"0.bias": torch.full((6,), math.inf)})},
    "infinite when cast": {"arrays": arrays_with({"0.bias": torch.full((6,), 1e300, dtype=torch.float64)})},
    "complex": {"arrays": arrays_with({"0.bias": torch.ones(6, dtype=torch.complex64)})},
    "no array": {"arrays": ArrayRecord({"0.bias": Array("float32", (6,), "numpy.ndarray", b"nothing")})},
    "foreign": {"arrays": ArrayRecord({"0.bias": Array("float32", (6,), "pickle", b"cos\nsystem")})},
    "two records": {"more": arrays_with({})},
    "no record": {"arrays": ConfigRecord()},
    "private array": {"arrays": arrays_with({PRIVATE[1]: torch.zeros(6)})},
    "asks by key": {"config": ConfigRecord({PRIVATE[0]: True})},
    "asks by name": {"config": ConfigRecord({"send": PRIVATE[0]})},
    "asks by list": {"config": ConfigRecord({"send": ["0.weight", PRIVATE[0]]})},
    "asks for gamma": {"config": ConfigRecord({"send": "1.weight"})},
    "asks in a text": {"config": ConfigRecord({"send": f"0.weight,{PRIVATE[1]}"})},
    "asks by record": {PRIVATE[0]: MetricRecord()},
}


@pytest.mark.parametrize("content", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_bad_message_is_refused_and_the_node_stays_up(content, caplog):
    called = []
    app = app_of(lambda message, context: called.append(message) or honest(message, context))
    answer = ask(app, good_content(**content))
    assert answer.error.reason == REFUSED_MESSAGE
    assert called == []
    assert "refused" in caplog.text
    assert ask(app).has_content()


def test_flowers_averages_of_counts_are_no_bad_message():
    assert ask(
        app_of(honest), good_content(arrays=arrays_with({"0.bias": torch.ones(6).double()}))
    ).has_content()


def parameters(client):
    return ArrayRecord({name: p.detach() for name, p in client.model.named_parameters()})


def with_tensor(client, tensor, name="3.weight"):
    return ArrayRecord({**client.lock.public_state(), name: tensor})


def hidden(client, values):
    state = client.lock.public_state()["3.weight"].flatten()
    state[7 : 7 + values.numel()] = values
    return with_tensor(client, state.reshape(6, 6))


def beta(client):
    return dict(client.model.named_modules())["1"].bias.detach()


def key_of(client):
    return client.lock.key.reveal().tolist()


def pieces(text):
    return [text[start : start + 8] for start in range(0, len(text), 8)]


BAD_REPLIES = {
    "parameters()": lambda c: {"arrays": parameters(c)},
    "private name": lambda c: {"arrays": with_tensor(c, torch.zeros(6), "1.running_mean")},
    "second record": lambda c: {"more": ArrayRecord(c.lock.private_state())},
    "renamed": lambda c: {"arrays": with_tensor(c, c.lock.private_state()["1.running_mean"], "0.bias")},
    "beta renamed": lambda c: {"arrays": with_tensor(c, beta(c), "3.bias")},
    "rounded": lambda c: {"arrays": with_tensor(c, beta(c).half().float(), "3.bias")},
    "bfloat16": lambda c: {"arrays": with_tensor(c, beta(c).bfloat16().float(), "3.bias")},
    "inside another": lambda c: {"arrays": hidden(c, c.lock.key.reveal().float())},
    "in a metric": lambda c: {"more": MetricRecord({"gamma": beta(c).tolist()})},
    "key in a metric": lambda c: {"more": MetricRecord({"key": c.lock.key.reveal().tolist()})},
    "bytes": lambda c: {"more": ConfigRecord({"file": b"x" + beta(c).numpy().tobytes()})},
    "half bytes": lambda c: {"more": ConfigRecord({"file": [beta(c).half().numpy().tobytes()]})},
    "a slice of the key": lambda c: {"more": MetricRecord({"k": c.lock.key.reveal()[1:].tolist()})},
    "spread over metrics": lambda c: {
        "more": MetricRecord({f"m{i}": x for i, x in enumerate(c.lock.key.reveal().tolist())})
    },
    "rounded in a list": lambda c: {"more": MetricRecord({"k": [float(f"{x:.4g}") for x in key_of(c)]})},
    "text": lambda c: {"more": ConfigRecord({"k": str(key_of(c))})},
    "json": lambda c: {"more": ConfigRecord({"k": json.dumps({"k": [round(x, 6) for x in key_of(c)]})})},
    "base64": lambda c: {
        "more": ConfigRecord({"k": base64.b64encode(c.lock.key.reveal().numpy()[3:].tobytes()).decode()})
    },
    "base64 in pieces": lambda c: {
        "more": ConfigRecord({"k": pieces(base64.b64encode(c.lock.key.reveal().numpy().tobytes()).decode())})
    },
    "hexadecimal name of a record": lambda c: {c.lock.key.reveal().numpy().tobytes().hex(): MetricRecord()},
    "name of a metric": lambda c: {"more": MetricRecord({str(key_of(c)): 1.0})},
    "other byte order": lambda c: {
        "more": ConfigRecord({"k": c.lock.key.reveal().numpy().astype(">f8").tobytes()})
    },
    "bytes as numbers": lambda c: {
        "more": MetricRecord({"k": list(c.lock.key.reveal().float().numpy().tobytes())})
    },
    "private name in json": lambda c: {"more": ConfigRecord({"k": '{"1.running_mean": 3}'})},
    "metric's name": lambda c: {"more": MetricRecord({"1.running_mean": 0.5})},
    "name in a text": lambda c: {"more": ConfigRecord({"norms": "1.running_mean"})},
    "nan": lambda c: {"arrays": with_tensor(c, torch.full((6,), math.nan), "3.bias")},
    "shape": lambda c: {"arrays": with_tensor(c, torch.ones(2), "3.bias")},
    "dtype": lambda c: {"arrays": with_tensor(c, NUMBERS.double(), "4.weight")},
}


@pytest.mark.parametrize("build", BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_reply_with_private_names_or_numbers_is_not_sent(build, caplog):
    def leak(message, context):
        honest(message, context)
        client = current_client()
        return reply(message, **{"arrays": ArrayRecord(client.lock.public_state()), **build(client)})

    ask(app_of(honest))  # the numbers of a new lock may still be constants
    before = stored()
    answer = ask(app_of(leak))
    assert answer.error.reason == REFUSED_REPLY
    assert "refused" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in stored().items())
    assert ask(app_of(honest)).has_content()


def test_numbers_from_before_the_training_are_not_sent_either(caplog):
    def leak(message, context):
        before = beta(current_client()).clone()
        honest(message, context)
        return reply(message, with_tensor(current_client(), before, "3.bias"))

    ask(app_of(honest))  # the numbers of a new lock may still be constants
    assert ask(app_of(leak)).error.reason == REFUSED_REPLY
    assert "'3.bias' holds numbers of a private tensor" in caplog.text


def test_nothing_that_the_app_says_of_its_reply_is_sent():
    secret = "0123456789abcdef" * 4

    def label(message, context):
        answer = honest(message, context)
        answer.metadata.group_id = secret
        answer.metadata.ttl = 1234567.0
        answer.metadata.created_at = 0.0
        return answer

    assert ask(app_of(honest)).has_content()
    sent = ask(app_of(label))
    assert sent.has_content()
    assert secret not in str(sent.metadata)
    assert sent.metadata.ttl != 1234567.0
    assert sent.metadata.created_at > 0


def test_the_code_of_the_apps_own_error_is_not_sent():
    assert ask(app_of(own_error)).error.code == 2


def test_a_message_of_many_names_is_refused_before_an_array_is_read(monkeypatch, caplog):
    many = ArrayRecord({f"x{n}\n": Array("float32", (1,), "numpy.ndarray", b"") for n in range(2000)})
    assert ask(app_of(honest), good_content(arrays=many)).error.reason == REFUSED_MESSAGE
    assert len(caplog.text) < 10_000
    assert "x0\n" not in caplog.text.replace("\\n", "")


def test_bytes_around_an_array_are_not_sent():
    def stow(message, context):
        state = ArrayRecord(current_client().model.state_dict())
        array = state["0.bias"]
        state["0.bias"] = Array(array.dtype, array.shape, array.stype, array.data + b"secret")
        return reply(message, state)

    assert b"secret" not in message_bytes(ask(app_of(stow)))


def raises(message, context):
    raise ValueError(f"secret {current_client().lock.key.reveal().tolist()}")


def own_error(message, context):
    return Message(Error(9, f"secret {current_client().lock.key.reveal().tolist()}"), reply_to=message)


def nothing(message, context):
    return None


@pytest.mark.parametrize("handler", [raises, own_error, nothing])
def test_no_text_of_a_failure_leaves_the_node(handler, caplog, capfd):
    answer = ask(app_of(handler))
    assert answer.error.reason in (FAILED, REFUSED_REPLY)
    number = str(float(stored()["key"][0]))[:8]
    for text in (caplog.text, *capfd.readouterr()):
        assert "secret" not in text
        assert number not in text
    assert ask(app_of(honest)).has_content()


@pytest.mark.parametrize("place", ["lock", "memory"])
def test_a_private_side_that_diverged_is_not_kept(place, caplog):
    def diverge(message, context):
        client = current_client()
        if place == "memory":
            client.memory["momentum"] = torch.tensor([math.inf])
        else:
            client.model.get_buffer("1.running_mean").fill_(math.nan)
        return reply(message, ArrayRecord(client.model.state_dict()))

    assert ask(app_of(honest)).has_content()
    before = stored()
    assert ask(app_of(diverge)).error.reason == FAILED
    assert "diverged" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in stored().items())
    assert ask(app_of(honest)).has_content()


def test_a_node_without_a_store_or_a_name_says_so_and_the_server_learns_nothing(monkeypatch, caplog):
    monkeypatch.delenv("FEDKL_STORE")
    assert ask(app_of(honest)).error.reason == FAILED
    assert "no store" in caplog.text
    message = ask(app_of(honest), **{"fedkl-store": "x", "fedkl-client": "../x"})
    assert message.error.reason == FAILED
    assert "Client name" in caplog.text


def test_there_is_no_client_outside_a_message():
    with pytest.raises(LockError, match="no message"):
        current_client()


def test_clients_have_keys_of_their_own():
    for name in ("a", "b"):
        ask(app_of(honest), **{"fedkl-client": name})
    assert not torch.equal(stored("a")["key"], stored("b")["key"])
    assert net()[0].weight.shape == (6, 4)


def with_noise(handler, *, before=True):
    mods = [LockMod(net, defense=DEFENSE)]
    mods.insert(0 if before else 1, TransformMod(GaussianNoise(deviation=1e-3)))
    app = ClientApp(mods=mods)
    app.train()(handler)
    return app


def test_noise_after_the_lock_hides_no_private_numbers_from_its_search():
    """The lock looks first, at what the app made; noise is put on what it let through."""

    def leaking(message, context):
        model = current_client().model
        state = dict(model.state_dict())
        secret = current_client().lock.key.reveal().float()
        state["3.weight"].view(-1)[: len(secret)] = secret
        return reply(message, ArrayRecord(state))

    assert ask(with_noise(leaking)).error.reason == REFUSED_REPLY
    answer = ask(with_noise(honest))
    sent = answer.content["arrays"].to_torch_state_dict()
    with store().client("client-0", model=net(), defense=DEFENSE) as client:
        assert sent.keys() == client.lock.public_state().keys()
    assert ask(with_noise(honest, before=False)).has_error()


def test_a_lock_whose_transform_would_be_left_out_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Noisy(KeyLock):
        def transform(self, update, *, client):
            return update

    with pytest.raises(ConfigError, match="transform would not be applied"):
        LockMod(net, defense=Noisy())
    with pytest.raises(ConfigError, match="cannot be trained with"):  # a plain average of words is noise
        TransformMod(MaskedUpload())


def test_no_text_of_a_defense_reaches_the_server():
    class Talking(GaussianNoise):
        def transform(self, update, *, client):
            raise ValueError(f"weights are {update.tensors['0.weight']}")

    app = ClientApp(mods=[TransformMod(Talking())])
    app.train()(lambda message, context: reply(message, ArrayRecord(net().state_dict())))
    state = net().state_dict()
    state["1.num_batches_tracked"] = state["1.num_batches_tracked"].double()  # as Flower's averages are
    sent = RecordDict({"arrays": ArrayRecord(state)})
    assert ask(app, sent).error.reason == NOT_CHANGED
    plain = ClientApp(mods=[TransformMod(GaussianNoise(deviation=1e-3))])
    plain.train()(lambda message, context: reply(message, ArrayRecord(net().state_dict())))
    assert not ask(plain, sent).has_error()


def test_a_baked_model_is_no_start_for_a_server_and_no_network_of_an_app():
    baked = DEFENSE.prepare(net()).bake()
    for defense in (None, DEFENSE, NoDefense(), GaussianNoise(deviation=0.1)):
        with pytest.raises(SecretError, match=r"public_arrays: .* made by bake\(\).*public_state"):
            public_arrays(baked, defense=defense)
    with pytest.raises(SecretError, match=r"TransformMod: .* made by bake\(\)"):
        TransformMod(GaussianNoise(deviation=0.1), network=baked)
    TransformMod(GaussianNoise(deviation=0.1), network=net())


def baked_whole(state):
    return state


def baked_scale_as_a_bias(state):
    return {name: state[name] for name in arrays_with({})} | {"0.bias": state["1.weight"]}


@pytest.mark.parametrize("made", [baked_whole, baked_scale_as_a_bias])
def test_a_reply_with_a_baked_models_tensors_is_refused(made):
    def reply_baked(message, context):
        return reply(message, arrays_of(made(current_client().lock.bake().state_dict())))

    answer = ask(app_of(reply_baked))
    assert (answer.has_content(), answer.error.reason) == (False, REFUSED_REPLY)
