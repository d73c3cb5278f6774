"""The mod that records: what it writes and where, that it changes nothing, and never costs a round."""

from __future__ import annotations

import copy
import json
import logging
import math
import stat

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file

from fedkl.auditing import RecordedUpdate
from fedkl.defenses.noise import GaussianNoise
from fedkl.errors import ConfigError
from fedkl.flower import LockMod, MaskMod, RecordingMod, TransformMod, run_in_process
from tests.flower import cohorts
from tests.flower.setting import DEFENSE, ask, honest, net, reply, server_of, step

NODE = "node-7"  # of every message of `ask`


def app_of(*mods, train=cohorts.trained):
    return cohorts.app_of(*mods, train=train)


def plain_content(number=1, **config):
    return RecordDict(
        {
            "arrays": ArrayRecord(net().state_dict()),
            "config": ConfigRecord({"server-round": number, **config}),
        }
    )


def bits(content):
    """A message's content, byte by byte."""
    return {
        (name, key): (value.data, value.dtype, value.shape) if isinstance(record, ArrayRecord) else value
        for name, record in content.items()
        for key, value in record.items()
    }


def lines(caplog):
    return [each.getMessage() for each in caplog.records if each.name == "fedkl.flower"]


def test_it_writes_what_arrives_and_what_is_sent_for_the_owner_only(tmp_path):
    content = plain_content(4, lr=0.1, name="x", many=[1, 2], raw=b"1", odd=math.inf)
    answer = ask(app_of(RecordingMod(tmp_path / "updates")), copy.deepcopy(content))
    folder = tmp_path / "updates" / NODE / "round-4"
    for name, record in (("received", content["arrays"]), ("sent", answer.content["arrays"])):
        expected = record.to_torch_state_dict()
        found = load_file(folder / f"{name}.safetensors")
        assert sorted(found) == sorted(expected)
        assert all(torch.equal(found[key], t) and found[key].dtype == t.dtype for key, t in expected.items())
    about = json.loads((folder / "about.json").read_text())
    assert about["round"] == 4
    assert about["config"] == {"config": {"server-round": 4, "lr": 0.1, "name": "x"}}
    assert about["metrics"]["metrics"]["num-examples"] == 8
    modes = {
        path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
    }
    assert len(modes) == 6
    assert all(mode == (0o600 if "." in name else 0o700) for name, mode in modes.items()), modes


@pytest.mark.parametrize("kind", ["train", "evaluate", "query"])
def test_messages_and_replies_are_the_same_to_the_last_bit(tmp_path, kind):
    seen = []

    def look(message, context):
        seen.append(bits(message.content))
        return cohorts.trained(message, context)

    answers = []
    for mods in ((), (RecordingMod(tmp_path),)):
        app = app_of(*mods, train=look)
        app.query()(look)
        answers.append(ask(app, plain_content(), kind))
    assert seen == [] if kind == "evaluate" else seen[0] == seen[1]
    assert bits(answers[0].content) == bits(answers[1].content)
    assert (tmp_path / NODE).exists() == (kind == "train")


def test_an_app_that_changes_its_message_does_not_change_the_recording(tmp_path):
    def greedy(message, context):
        answer = cohorts.trained(message, context)
        message.content["arrays"] = ArrayRecord({"0": torch.zeros(1)})
        return answer

    ask(app_of(RecordingMod(tmp_path), train=greedy), plain_content())
    assert sorted(load_file(tmp_path / NODE / "round-1" / "received.safetensors")) == sorted(
        net().state_dict()
    )


def test_only_the_newest_rounds_are_kept_and_nothing_foreign_is_removed(tmp_path):
    app = app_of(RecordingMod(tmp_path, rounds=2))
    for number in (7, 8, 9, 1):  # a new run begins again
        ask(app, plain_content(number))
        (tmp_path / NODE / "round-7" / "notes.txt").touch() if number == 7 else None
    left = {path.name: sorted(file.name for file in path.iterdir()) for path in (tmp_path / NODE).iterdir()}
    whole = ["about.json", "received.safetensors", "sent.safetensors"]
    assert left == {"round-7": ["notes.txt"], "round-9": whole, "round-1": whole}
    with pytest.raises(ConfigError, match=r"rounds: expected at least 1, got 0"):
        RecordingMod(tmp_path, rounds=0)


def test_rounds_without_a_number_are_counted(tmp_path):
    app = app_of(RecordingMod(tmp_path))
    for number in ("1", -1, 10**13):
        ask(app, plain_content(number))
    assert sorted(path.name for path in (tmp_path / NODE).iterdir()) == ["round-1", "round-2", "round-3"]


@pytest.mark.parametrize("fault", ["no folder", "full disk", "no arrays", "two arrays"])
def test_what_goes_wrong_costs_one_line_and_no_round(tmp_path, monkeypatch, caplog, fault):
    content = plain_content()
    if fault == "no folder":
        (tmp_path / "updates").touch()
    elif fault == "full disk":

        def full(path, data, *, mode=0):
            if path.name == "sent.safetensors":
                raise OSError(28, "No space left on device")
            path.write_bytes(data)

        monkeypatch.setattr("fedkl.recordingfile.write_atomically", full)
    elif fault == "no arrays":
        del content["arrays"]
    else:
        content["more"] = content["arrays"]

    def steady(message, context):
        return reply(message, ArrayRecord(net().state_dict()))

    app = app_of(RecordingMod(tmp_path / "updates"), train=steady)
    with caplog.at_level(logging.INFO, logger="fedkl.flower"):
        answer = ask(app, content)
    assert bits(answer.content) == bits(ask(app_of(train=steady), plain_content()).content)
    (line,) = lines(caplog)
    assert "was not recorded" in line
    assert "\n" not in line
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".json", ".part")]


def test_an_error_of_the_app_is_its_own_and_an_error_reply_is_not_recorded(tmp_path):
    def raises(message, context):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        ask(app_of(RecordingMod(tmp_path), train=raises), plain_content())
    assert not list(tmp_path.iterdir())


class Lists(NumPyClient):
    """A client of older releases: it gets and gives lists of arrays, in the order of the state."""

    def fit(self, parameters, config):
        model = net()
        tensors = [torch.from_numpy(np.array(array)) for array in parameters]
        model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
        step(model)
        return [tensor.numpy() for tensor in model.state_dict().values()], 8, {"loss": 1.0}


def test_lists_of_arrays_of_older_apps_are_recorded_by_number(tmp_path):
    arrays = ArrayRecord([t.numpy() for t in net().state_dict().values()])
    for array in arrays.values():  # as Flower makes them of a server's list
        array.dtype, array.shape = "", ()
    content = RecordDict(
        {
            "fitins.parameters": arrays,
            "fitins.config": ConfigRecord({"server-round": 2}),
        }
    )
    app = ClientApp(client_fn=lambda context: Lists().to_client(), mods=[RecordingMod(tmp_path)])
    assert ask(app, content).has_content()
    recorded = RecordedUpdate.from_recording(tmp_path / NODE / "round-2")
    assert sorted(recorded.tensors, key=int) == [str(n) for n in range(len(net().state_dict()))]
    assert torch.equal(recorded.received["0"], net().state_dict()["0.weight"])
    assert not torch.equal(recorded.tensors["0"], recorded.received["0"])


def test_an_unmodified_app_is_recorded_round_by_round(tmp_path):
    app = app_of(RecordingMod(tmp_path))

    def main(grid):
        arrays = ArrayRecord(net().state_dict())
        FedAvg(fraction_evaluate=0).start(grid=grid, initial_arrays=arrays, num_rounds=2, timeout=60.0)

    run_in_process(server_of(main), app, clients=2)
    nodes = sorted(tmp_path.iterdir())
    assert [path.name for path in nodes] == ["node-1000", "node-1001"]
    first, second = (RecordedUpdate.from_recording(nodes[0] / f"round-{n}") for n in (1, 2))
    assert (first.kind, first.images) == ("weights", 8)
    assert all(torch.equal(first.received[name], t) for name, t in net().state_dict().items())
    assert any(not torch.equal(second.received[name], t) for name, t in first.received.items())
    with pytest.raises(ConfigError, match=r"not a recording .*Give the folder of one round, e\.g\..*round-1"):
        RecordedUpdate.from_recording(tmp_path)


def test_with_a_lock_either_place_records_the_public_tensors(tmp_path):
    outside, inside = RecordingMod(tmp_path / "outside"), RecordingMod(tmp_path / "inside")
    ask(app_of(outside, LockMod(net, defense=DEFENSE), inside, train=honest))
    found = [
        load_file(tmp_path / place / NODE / "round-1" / "sent.safetensors") for place in ("outside", "inside")
    ]
    assert sorted(found[0]) == ["0.bias", "0.weight", "3.bias", "3.weight", "4.bias", "4.weight"]
    assert all(torch.equal(found[1][name], t) for name, t in found[0].items())


def test_before_a_transform_what_the_server_sees_is_recorded_and_after_it_what_the_app_gave(tmp_path):
    outside, inside = RecordingMod(tmp_path / "outside"), RecordingMod(tmp_path / "inside")
    given = []

    def note(message, context):
        answer = cohorts.trained(message, context)
        given.append(answer.content["arrays"].to_torch_state_dict())
        return answer

    noise = TransformMod(GaussianNoise(deviation=0.5))
    answer = ask(app_of(outside, noise, inside, train=note), plain_content())
    expected = {"outside": answer.content["arrays"].to_torch_state_dict(), "inside": given[0]}
    for place, tensors in expected.items():
        found = load_file(tmp_path / place / NODE / "round-1" / "sent.safetensors")
        assert all(torch.equal(found[name], t) for name, t in tensors.items())
    assert not torch.equal(expected["outside"]["0.weight"], expected["inside"]["0.weight"])


def test_before_masks_there_are_only_words_and_after_them_the_update(tmp_path):
    folder = cohorts.cohort(tmp_path / "members")
    outside, inside = RecordingMod(tmp_path / "outside"), RecordingMod(tmp_path / "inside")
    result = cohorts.run(folder, rounds=1, app=app_of(outside, MaskMod(), inside))
    assert result is not None
    masked, plain = (next((tmp_path / place).glob("node-*/round-*")) for place in ("outside", "inside"))
    with pytest.raises(ConfigError, match=r"masked.*words.*after MaskMod"):
        RecordedUpdate.from_recording(masked)
    recorded = RecordedUpdate.from_recording(plain)
    assert sorted(recorded.tensors) == sorted(net().state_dict())


@pytest.mark.parametrize("fault", ["cut", "format", "missing"])
def test_a_damaged_recording_is_refused(tmp_path, fault):
    ask(app_of(RecordingMod(tmp_path)), plain_content())
    folder = tmp_path / NODE / "round-1"
    if fault == "cut":
        path = folder / "sent.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    elif fault == "format":
        (folder / "about.json").write_text('{"format": "other"}')
    else:
        (folder / "about.json").unlink()
    with pytest.raises(ConfigError, match="not a recording that can be read"):
        RecordedUpdate.from_recording(folder)
