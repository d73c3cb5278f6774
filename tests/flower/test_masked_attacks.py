"""Attacks on masked sums on Flower: a server, or a node, that says whatever it likes."""

from __future__ import annotations

import re
import shutil
import tracemalloc

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedkl import lockfile
from fedkl.errors import ConfigError, KeyFileError, MaskingError
from fedkl.flower import MaskMod, mask_records, model_records, node_member
from fedkl.flower.mask_mod import MASKS_REFUSED
from fedkl.flower.model_records import Base
from fedkl.flower.record_fields import PREFIX
from fedkl.flower.records import arrays_of
from fedkl.masking import Call, MaskedSum, Member, MemberFile, opened_mean
from fedkl.masking.memory_file import MemoryFile
from fedkl.masking.update_file import UpdateFile
from fedkl.update import TensorSpec
from tests.flower.cohorts import PASSPHRASE, app_of, cohort, run

RUN, NAMES = bytes(16), ("client-0", "client-1", "client-2")
MODEL = {"w": torch.tensor([0.5, -0.25]), "flag": torch.tensor([True, False])}
SPECS = {name: TensorSpec.of(tensor) for name, tensor in MODEL.items()}


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """Files that open fast: passphrases are not what is attacked here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lockfile, "_SCRYPT", {"n": 16, "r": 8, "p": 1})
        patch.setenv("FEDKL_PASSPHRASE", PASSPHRASE)
        yield


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory, cheap):
    rules = {"blind": {}, "pairwise": {}, "both": {}, "server": {"mode": "pairwise", "server_model": True}}
    return {
        name: cohort(tmp_path_factory.mktemp(name), **{"mode": name, **more}) for name, more in rules.items()
    }


@pytest.fixture
def server(cohorts, tmp_path):
    """A function that gives a server over a copy of a cohort."""
    return lambda kind="pairwise": Server(shutil.copytree(cohorts[kind], tmp_path / kind), kind)


class Server:
    """A server that sends each node what it likes; nodes train by ``lr``, never twice to the same result."""

    def __init__(self, folder, kind):
        self.folder, self.mode = folder, "pairwise" if kind == "server" else kind
        self.trained = 0
        self.app = ClientApp(mods=[MaskMod()])
        self.app.train()(self._train)
        self.app.evaluate()(self._evaluate)

    def _train(self, message, context):
        self.trained += 1
        state = message.content["arrays"].to_torch_state_dict()
        lr = message.content["config"]["lr"]
        state["w"] = state["w"] + lr * self.trained * torch.tensor([1.0, 2.0])
        metrics = MetricRecord({"num-examples": 10, "loss": 1.0})
        content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
        return Message(content, reply_to=message)

    def _evaluate(self, message, context):
        total = float(message.content["arrays"].to_torch_state_dict()["w"].sum())
        metrics = MetricRecord({"num-examples": 8, "total": total})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def ask(self, number, content, kind="train"):
        message = Message(content, dst_node_id=7 + number, message_type=kind)
        message.metadata.__dict__["_message_id"] = "1"
        config = {"partition-id": number, "fedkl-member": str(self.folder)}
        return self.app(message=message, context=Context(1, 7 + number, config, RecordDict(), {}))

    def train(self, number, *, call=None, content=None, lr=1.0):
        content = self.content("train", lr=lr) if content is None else content
        if call is None:
            request = Message(content, dst_node_id=7, message_type="train")
            call = Call(
                run=RUN,
                round=1,
                attempt=0,
                cohort=NAMES,
                settings=mask_records.settings_of(request, model="arrays"),
            )
        mask_records.put_call(content, call)
        return self.ask(number, content), call

    @staticmethod
    def content(stage, *, lr=1.0, total=None, model=None, record="arrays", name=RUN, specs=None):
        content = RecordDict({"config": ConfigRecord({"lr": lr})})
        model = MODEL if model is None else model
        if total is None:
            content[record] = arrays_of(model)
        mask_records.put_stage(content, stage)
        base = Base(
            run=name,
            specs=SPECS if specs is None else specs,
            metrics=(),
            rounds=1,
            total=total,
            booleans={"flag": model["flag"]} if "flag" in model else {},
            record=record,
        )
        model_records.put_base(content, base)
        return content

    def layout(self):
        with self.member(0) as file:
            return model_records.base_of(self.content("train")).layout(file.membership().roster.words)

    def member(self, number):
        return MemberFile.open(self.folder / f"client-{number}.secret", passphrase=PASSPHRASE)

    def again(self, number, call):
        content = self.content("again")
        mask_records.put_call(content, call)
        return self.ask(number, content)

    def opened(self, call, answers):
        """The mean of uploads, opened by all reveals; no check of the server's own is left out."""
        attempt = MaskedSum(call, layout=self.layout(), mode=self.mode, minimum=3)
        for answer in answers:
            attempt.offer(mask_records.upload_of(answer.content))
        for number, name in enumerate(NAMES):
            content = self.content("reveal")
            mask_records.put_list(content, attempt.list_for(name))
            reveal = self.ask(number, content)
            if not reveal.has_error():
                attempt.offer_reveal(mask_records.reveal_of(reveal.content))
        total = attempt.sealed()
        return opened_mean(total, layout=attempt.layout, booleans={"flag": MODEL["flag"]}).tensors["w"]

    def sealed(self):
        """A sum with blind masks."""
        attempt = None
        for number in range(3):
            answer, call = self.train(number)
            attempt = attempt or MaskedSum(call, layout=self.layout(), mode="blind", minimum=3)
            attempt.offer(mask_records.upload_of(answer.content))
        return attempt.sealed()


def refused(answer):
    """One fixed text, one code, whatever the reason."""
    return answer.has_error() and (answer.error.code, answer.error.reason) == (2, MASKS_REFUSED)


def test_a_call_that_comes_again_is_neither_trained_for_nor_kept(server, monkeypatch):
    """Otherwise two sums of the same names differ by what one member trained twice."""
    for protected in (True, False):
        nodes = server() if protected else server("server")
        if not protected:  # the control
            monkeypatch.setattr(Member, "check", lambda self, call: None)
        answers = [nodes.train(number) for number in range(3)]
        call = answers[0][1]
        again, _ = nodes.train(0)
        assert refused(again)
        assert nodes.trained == (3 if protected else 4)
        further = Call(**{**vars(call), "attempt": 1})
        # The second attempt is masked before the first is opened; both are then, for the same names.
        masked = [nodes.again(number, further) for number in range(3)]
        first = nodes.opened(call, [answer for answer, _ in answers])
        second = nodes.opened(further, masked)
        assert torch.allclose(first, second, atol=1e-5) == protected


def test_members_that_are_asked_differently_are_in_no_sum(server, monkeypatch):
    """Otherwise a server has one train, and the others not, and reads the update of one."""
    nodes = server("pairwise")
    asked = [nodes.train(number, lr=1.0 if number == 0 else 0.0) for number in range(3)]
    assert len({mask_records.upload_of(answer.content).context for answer, _ in asked}) == 2
    with pytest.raises(MaskingError, match="another roster, model or history"):
        nodes.opened(asked[1][1], [answer for answer, _ in asked])
    other = server("both")
    call = other.train(0)[1]
    assert refused(other.train(1, call=call, lr=0.0)[0])  # it says one thing and asks another
    monkeypatch.setattr(mask_records, "settings_of", lambda message, model: b"")
    control = server("server")
    asked = [control.train(number, lr=1.0 if number == 0 else 0.0) for number in range(3)]
    mean = control.opened(asked[0][1], [answer for answer, _ in asked])
    torch.testing.assert_close(mean * 3 - MODEL["w"] * 2, MODEL["w"] + torch.tensor([1.0, 2.0]))


def test_what_was_trained_under_other_settings_is_not_masked_again(server, caplog):
    nodes = server()
    _, call = nodes.train(0)
    assert refused(nodes.again(0, Call(**{**vars(call), "attempt": 1, "settings": bytes(32)})))
    assert "no update of the round" in caplog.text
    assert not nodes.again(0, Call(**{**vars(call), "attempt": 1})).has_error()


@pytest.mark.parametrize("change", ["type", "group", "record", "key", "kind", "value"])
def test_settings_are_all_that_an_app_gets(change):
    def digest(*, kind="train", group="1", name="config", record=None, model="arrays"):
        content = RecordDict({name: record or ConfigRecord({"lr": 1})})
        return mask_records.settings_of(
            Message(content, dst_node_id=7, message_type=kind, group_id=group), model=model
        )

    changed = {
        "type": {"kind": "train.other"},
        "group": {"group": "2"},
        "record": {"name": "other"},
        "key": {"record": ConfigRecord({"LR": 1})},
        "kind": {"record": ConfigRecord({"lr": 1.0})},
        "value": {"record": ConfigRecord({"lr": 2})},
    }
    assert digest(**changed[change]) != digest()
    assert digest() == digest()


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_an_app_gets_no_model_but_the_one_that_was_checked(kind, server, caplog):
    """The checked model under another name, and the server's where the app looks for it."""
    nodes = server("server")
    content = nodes.content(kind, record="decoy")
    content["arrays"] = arrays_of({**MODEL, "w": torch.zeros(2)})
    call = Call(run=RUN, round=1, attempt=0, cohort=NAMES)
    mask_records.put_call(content, call)
    if kind == "train":
        for settings in (b"", bytes(32)):
            assert refused(
                nodes.train(0, call=Call(**{**vars(call), "settings": settings}), content=content)[0]
            )
    else:
        assert refused(nodes.ask(0, content, kind))
    assert "arrays beside the model" in caplog.text
    assert not nodes.trained


@pytest.mark.parametrize("kind", ["blind", "pairwise", "both", "server"])
def test_an_evaluation_is_of_models_that_members_have_made(kind, server):
    """Losses of models of the server's choice give gradients of one node's data."""
    nodes = server(kind)
    answers = [
        nodes.ask(
            0, nodes.content("evaluate", model={**MODEL, "w": w}, name=bytes([number] * 16)), "evaluate"
        )
        for number, w in enumerate((torch.zeros(2), torch.tensor([0.001, 0.0])))
    ]
    if kind == "server":  # the members have agreed to that
        totals = [answer.content["metrics"]["total"] for answer in answers]
        assert totals == [0.0, pytest.approx(0.001)]
    else:
        assert all(map(refused, answers))


def test_booleans_are_those_of_the_members(server):
    nodes = server("blind")
    total = nodes.sealed()
    flipped = {**MODEL, "flag": ~MODEL["flag"]}
    for stage in ("deliver", "evaluate"):
        kind = "evaluate" if stage == "evaluate" else "train"
        assert refused(nodes.ask(0, nodes.content(stage, total=total, model=flipped), kind))
        assert not nodes.ask(0, nodes.content(stage, total=total), kind).has_error()


def test_no_message_makes_a_memory_grow(server):
    """A memory that is too large does not open again."""
    nodes = server()

    def begun(name, names=NAMES):
        """A training of another run."""
        content = nodes.content("train", name=name)
        request = Message(content, dst_node_id=7, message_type="train")
        settings = mask_records.settings_of(request, model="arrays")
        call = Call(run=name, round=1, attempt=0, cohort=names, settings=settings)
        return nodes.train(0, content=content, call=call)[0]

    def remembered():
        with nodes.member(0) as file:
            return set(file.memory().runs)

    assert refused(begun(bytes(10**6)))
    assert not remembered()
    for number in range(5):
        assert refused(begun(bytes([number] * 16), NAMES[:1]))
    assert len(remembered()) == 1
    assert not begun(bytes([7] * 16)).has_error()
    assert refused(begun(bytes([8] * 16), NAMES[:1]))  # nothing is forgotten that matters
    assert remembered() == {(bytes([number]) * 16).hex() for number in (7, 8)}


@pytest.mark.parametrize(
    "specs",
    [
        {"w": TensorSpec(shape=(10**18,), dtype=torch.float32)},
        {"w": TensorSpec(shape=(10**9, 10**9, 10**9), dtype=torch.float32)},
        {"w": TensorSpec(shape=(1,) * 400, dtype=torch.float32)},
        {f"w{number}": TensorSpec(shape=(10**6,), dtype=torch.int64) for number in range(1000)},
    ],
)
def test_a_huge_layout_costs_nothing(specs, server):
    nodes = server("blind")
    total = nodes.sealed()
    tracemalloc.start()
    for one in (None, total):
        content = nodes.content("train", specs=specs, total=one, model={"w": torch.zeros(2)})
        assert refused(nodes.train(0, content=content)[0])
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


def test_no_name_of_a_layout_breaks_a_line_of_a_log(server, caplog):
    specs = {"w\nINFO all is well": SPECS["w"]}
    assert refused(server().train(0, content=Server.content("train", specs=specs))[0])
    assert "all is well" not in caplog.text


def test_a_secret_file_that_is_open_elsewhere_costs_one_message(server):
    nodes = server()
    with nodes.member(0):
        assert refused(nodes.train(0)[0])
    assert not nodes.train(0)[0].has_error()


@pytest.mark.parametrize("where", [UpdateFile, MemoryFile])
def test_a_full_disk_sends_nothing_and_uses_no_mask(where, server, monkeypatch):
    nodes, name = server(), "write" if where is UpdateFile else "_write"

    def full(*_, **__):
        raise KeyFileError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        assert refused(nodes.train(0)[0])
    answers = [nodes.train(number) for number in range(3)]
    nodes.opened(answers[0][1], [answer for answer, _ in answers])


def test_a_model_that_cannot_be_written_is_delivered_later(server, monkeypatch):
    nodes = server("blind")
    total = nodes.sealed()

    def full(*_, **__):
        raise ConfigError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(node_member, "write_model", full)
        assert refused(nodes.ask(0, nodes.content("deliver", total=total)))
    assert not nodes.ask(0, nodes.content("deliver", total=total)).has_error()


# A node that says what it likes


class Says:
    """A node that changes what it answers at one stage."""

    def __init__(self, stage, change, number=3):
        self.stage, self.change, self.number = stage, change, number

    def __call__(self, message, context, call_next):
        answer = call_next(message, context)
        mine = int(context.node_config["partition-id"]) == self.number
        if not mine or answer.has_error() or mask_records.stage_of(message.content) != self.stage:
            return answer
        content = RecordDict(dict(answer.content.items()))
        self.change(content)
        return Message(content, reply_to=message)


def changed(part, **values):
    """A change of fields of one record."""

    def change(content):
        record = content[f"{PREFIX}.{part}"]
        content[f"{PREFIX}.{part}"] = ConfigRecord({**record, **values})

    return change


def fewer_shares(content):
    record = content[f"{PREFIX}.upload"]
    changed("upload", owners=[record["member"]], shares=record["shares"][-1:])(content)


def false_share(content):
    shares = content[f"{PREFIX}.reveal"]["shares"]
    changed("reveal", shares=[bytes(32), *shares[1:]])(content)


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("reveal", changed("reveal", member="client-0"), "of another member than this node's"),
        ("reveal", false_share, "shares from client-3 are false, or were when client-0 sent them to it"),
        ("train", fewer_shares, "shares for others than the cohort"),
        ("train", changed("upload", commitment=bytes(10**6)), "parts of a wrong size"),
        ("train", changed("upload", shares=[bytes(10**5)] * 5), "parts of a wrong size"),
        ("who", changed("who", member="z\nERROR", members=["z\nERROR"]), "does not say|Member name"),
    ],
)
def test_one_node_does_not_cost_the_others_their_round(stage, change, message, tmp_path, caplog):
    folder = cohort(tmp_path / "members", members=5, mode="pairwise")
    result = run(folder, nodes=5, rounds=1, app=app_of(Says(stage, change), MaskMod()))
    assert list(result.train_metrics_clientapp) == [1]
    assert re.search(message, caplog.text)
    assert "\nERROR" not in caplog.text


def test_a_cohort_that_one_node_claims_does_not_end_a_training(tmp_path, caplog):
    """Its rules would not go with what the server wants, which ends a training."""
    folder = cohort(tmp_path / "members", mode="pairwise")
    asked = []

    def alone(message, context, call_next):
        stage, number = mask_records.stage_of(message.content), context.node_config["partition-id"]
        asked.append(stage)
        if stage == "who" and number and len(asked) <= 3:
            raise ValueError
        return call_next(message, context)

    claim = Says("who", changed("who", mode="blind", roster=bytes(32)), number=0)
    result = run(
        folder, rounds=1, evaluate_fn=lambda number, arrays: None, app=app_of(alone, claim, MaskMod())
    )
    assert "too few nodes are of one cohort" in caplog.text
    assert not result.train_metrics_clientapp


def test_nodes_that_are_asked_for_different_things_are_found_before_anybody_trains(tmp_path):
    class Uneven(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            for number, message in enumerate(super().configure_train(server_round, arrays, config, grid)):
                content = RecordDict(dict(message.content.items()))
                content["config"] = ConfigRecord({"lr": float(number)})
                message.content = content
                yield message

    with pytest.raises(ConfigError, match="asks different nodes for different things"):
        run(cohort(tmp_path / "members"), rounds=1, strategy=Uneven())
