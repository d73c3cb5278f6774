"""Rounds on disk: what anyone could have put there, full disks, links, and a strategy's own arrays."""

from __future__ import annotations

import errno
import json
import math
import os

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAdam, FedAvg, FedAvgM

from fedkl import lockfile
from fedkl.errors import ConfigError, KeyFileError
from fedkl.flower.round_files import RoundFiles, SavedRound
from fedkl.flower.strategy_memory import StrategyMemory, arrays_in, put_arrays

TRAIN = "train_metrics_clientapp"
ARRAYS = {"w": torch.ones(2), "deep/name": torch.zeros(1)}


def saved(number, **memory):
    return SavedRound(round=number, arrays=ARRAYS, memory=memory)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def put(folder, number, *, order=None, tensors=None, **meta):
    """A round file with a sound container, whatever it holds."""
    tensors = {"arrays/w": torch.ones(2)} if tensors is None else tensors
    meta = {"round": number, "order": list(tensors) if order is None else order, **meta}
    path = folder / f"round-{number:06d}.fedkl"
    lockfile.write(path, kind="checkpoint", meta=meta, tensors=tensors, passphrase=None)


def test_rounds_come_back_in_their_order(tmp_path):
    files = RoundFiles(tmp_path)
    memory = {
        f"m/dict/{dtype}": torch.ones(2, dtype=getattr(torch, dtype))
        for dtype in ("uint64", "float16", "bool")
    }
    for number in (9, 10, 999_999, 1_000_000):
        files.save(saved(number, **memory))
    assert names(tmp_path) == ["round-1000000.fedkl", "round-999999.fedkl"]
    newest = files.newest()
    assert newest.round == 1_000_000
    assert list(newest.arrays) == list(ARRAYS)
    assert list(newest.memory) == list(memory)
    assert all(torch.equal(newest.memory[name], tensor) for name, tensor in memory.items())
    assert RoundFiles(tmp_path / "none").newest() is None


ODD = {
    "no order": {"order": 5},
    "order of lists": {"order": [["arrays/w"]]},
    "order of objects": {"order": [{}]},
    "twice": {"order": ["arrays/w", "arrays/w"]},
    "missing in the order": {"order": []},
    "others in the order": {"order": ["arrays/x"]},
    "round as a text": {"round": "3"},
    "round as a truth value": {"round": True},
    "no round": {"round": None},
    "another round": {"round": 2},
    "no part": {"tensors": {"w": torch.ones(2)}},
    "another part": {"tensors": {"secrets/w": torch.ones(2)}},
    "no name": {"tensors": {"arrays/": torch.ones(2)}},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_round_file_with_odd_content_falls_back_to_the_one_before(odd, tmp_path):
    number = 3
    put(tmp_path, number, **odd)
    with pytest.raises(KeyFileError, match="round-000003"):
        RoundFiles(tmp_path).newest()
    put(tmp_path, 2)
    with pytest.warns(UserWarning, match="round 2 is used"):
        assert RoundFiles(tmp_path).newest().round == 2


def test_round_zero_is_no_round(tmp_path):
    put(tmp_path, 0)
    with pytest.raises(KeyFileError, match="another round"):
        RoundFiles(tmp_path).newest()


@pytest.mark.parametrize("error", [RecursionError(), KeyError(), AttributeError(), MemoryError()])
def test_whatever_a_reader_raises_is_one_error(error, tmp_path, monkeypatch):
    put(tmp_path, 1)

    def read(*args, **kwargs):
        raise error

    monkeypatch.setattr(lockfile, "read", read)
    with pytest.raises(KeyFileError, match=type(error).__name__):
        RoundFiles(tmp_path).newest()


def make_link(path, folder):
    target = folder / "target"
    put(folder, 9)
    (folder / "round-000009.fedkl").rename(target)
    path.symlink_to(target)


MADE = {
    "a folder": lambda path, folder: path.mkdir(),
    "a pipe": lambda path, folder: os.mkfifo(path),
    "a link to a round": make_link,
    "a broken link": lambda path, folder: path.symlink_to(folder / "none"),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_what_is_no_file_is_neither_read_nor_removed(make, tmp_path):
    """A pipe that nobody writes to would be waited for."""
    files = RoundFiles(tmp_path / "rounds")
    files.save(saved(1))
    other = tmp_path / "rounds" / "round-000009.fedkl"
    make(other, tmp_path)
    with pytest.warns(UserWarning, match="round 1 is used"):
        assert files.newest().round == 1
    for number in range(10, 14):
        files.save(saved(number))
    assert other.is_symlink() or other.exists()
    assert len(names(tmp_path / "rounds")) == 3


def test_only_rounds_are_removed_and_only_earlier_ones(tmp_path):
    foreign = [
        "round-1.fedkl",
        "round-0000001.fedkl",
        "round-000001.fedkl.bak",
        "round-x.fedkl",
        "round-000001.txt",
        "round-٠٠٠٠٠١.fedkl",
        "round-000001.fedkl\n",
        "round-000099.fedkl",  # damaged, or of another machine: its rounds are not done yet
    ]
    files = RoundFiles(tmp_path)
    for name in foreign[:-1]:
        (tmp_path / name).touch()
    assert files.newest() is None
    (tmp_path / foreign[-1]).touch()
    for number in range(1, 5):
        files.save(saved(number))
    assert names(tmp_path) == sorted([*foreign, "round-000003.fedkl", "round-000004.fedkl"])


def test_the_folder_is_no_link(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "rounds").symlink_to(tmp_path / "target")
    files = RoundFiles(tmp_path / "rounds")
    with pytest.raises(ConfigError, match="symbolic link"):
        files.save(saved(1))
    with pytest.raises(ConfigError, match="symbolic link"):
        files.save_history({})
    assert names(tmp_path / "target") == []


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "rounds").touch()
    files = RoundFiles(tmp_path / "rounds")
    for use in (files.newest, lambda: files.save(saved(1)), lambda: files.save_history({})):
        with pytest.raises(ConfigError, match="cannot be"):
            use()


def test_a_full_disk_ends_in_a_sentence_and_leaves_what_was_there(tmp_path, monkeypatch):
    files = RoundFiles(tmp_path)
    files.save(saved(1))
    files.save_history({})
    before = names(tmp_path)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"No space left on device.*Make room"):
            files.save(saved(2))
        with pytest.raises(ConfigError, match=r"No space left on device.*Make room"):
            files.save_history({TRAIN: {2: {"loss": 1.0}}})
    assert names(tmp_path) == before
    assert files.newest().round == 1
    assert files.history(until=9) == {}


def test_metrics_come_back_up_to_a_round_also_those_that_are_not_finite(tmp_path):
    history = {
        TRAIN: {1: {"loss": -math.inf, "auc": [1.0, math.inf]}, 2: {"loss": 0.5, "n": 2**63}, 10: {}},
        "evaluate_metrics_serverapp": {0: {"loss": 1.0}},
    }
    files = RoundFiles(tmp_path)
    assert files.history(until=9) == {}
    files.save_history(history)
    assert files.history(until=10) == history
    assert files.history(until=2)[TRAIN] == {1: history[TRAIN][1], 2: history[TRAIN][2]}
    assert files.history(until=0) == {TRAIN: {}, "evaluate_metrics_serverapp": {0: {"loss": 1.0}}}
    files.save_history({TRAIN: {1: {"loss": math.nan}}})
    assert math.isnan(files.history(until=1)[TRAIN][1]["loss"])
    json.loads((tmp_path / "history.json").read_text(), parse_constant=pytest.fail)


TEXTS = {
    "deep": "[" * 100_000,
    "deep below": json.dumps({TRAIN: {"1": {"loss": 1}}}).replace("1}", "[" * 100_000),
    "no text": "\udcff",
    "no JSON": "{",
    "NaN": f'{{"{TRAIN}": {{"1": {{"loss": NaN}}}}}}',
    **{
        name: json.dumps(value)
        for name, value in {
            "a list": [],
            "another kind": {"arrays": {}},
            "a method": {"__class__": {}},
            "rounds as a list": {TRAIN: [1]},
            "a word": {TRAIN: {"one": {}}},
            "negative": {TRAIN: {"-1": {}}},
            "padded": {TRAIN: {"01": {}}},
            "other digits": {TRAIN: {"٣": {}}},
            "huge": {TRAIN: {"9" * 5000: {}}},
            "values as a list": {TRAIN: {"1": [1]}},
            "none": {TRAIN: {"1": {"loss": None}}},
            "a truth value": {TRAIN: {"1": {"loss": True}}},
            "a text": {TRAIN: {"1": {"loss": "low"}}},
            "lists in lists": {TRAIN: {"1": {"loss": [[1.0]]}}},
            "an object": {TRAIN: {"1": {"loss": {}}}},
            "mixed": {TRAIN: {"1": {"loss": [1, 2.0]}}},
        }.items()
    },
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_history_that_is_none_is_said_and_left(text, tmp_path):
    (tmp_path / "history.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="not the metrics of a training"):
        assert RoundFiles(tmp_path).history(until=9) == {}


def test_a_history_that_is_a_link_is_not_followed(tmp_path):
    files = RoundFiles(tmp_path / "rounds")
    (tmp_path / "rounds").mkdir()
    (tmp_path / "target").write_text("{}")
    (tmp_path / "rounds" / "history.json").symlink_to(tmp_path / "target")
    with pytest.warns(UserWarning, match="not the metrics"):
        assert files.history(until=9) == {}
    files.save_history({TRAIN: {1: {"loss": 1.0}}})
    assert (tmp_path / "target").read_text() == "{}"
    assert files.history(until=9) == {TRAIN: {1: {"loss": 1.0}}}


def full_adam():
    strategy = FedAdam()
    strategy.m_t = {"w": np.ones(2, np.float32)}
    return strategy


def test_arrays_come_back_to_a_strategy_and_to_one_inside(tmp_path):
    inner = FedAvgM(server_momentum=0.9)
    inner.momentum_vector = [np.arange(3.0), np.ones((2, 2), np.float32)]
    inner.current_arrays = ArrayRecord({"a/b": Array(np.ones(2))})
    tensors = arrays_in(DifferentialPrivacyClientSideFixedClipping(inner, 1.0, 1.0, 3))
    assert set(tensors) == {
        "strategy.momentum_vector/list/0",
        "strategy.momentum_vector/list/1",
        "strategy.current_arrays/record/a/b",
    }
    RoundFiles(tmp_path).save(saved(1, **tensors))
    fresh = FedAvgM(server_momentum=0.9)
    put_arrays(
        DifferentialPrivacyClientSideFixedClipping(fresh, 1.0, 1.0, 3), RoundFiles(tmp_path).newest().memory
    )
    for array, expected in zip(fresh.momentum_vector, inner.momentum_vector, strict=True):
        np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(fresh.current_arrays["a/b"].numpy(), np.ones(2))


ONE = torch.ones(2)
PLACES = {
    "attribute alone": {"m_t": ONE},
    "no key": {"m_t/dict": ONE},
    "unknown kind": {"m_t/tuple/a": ONE},
    "two kinds": {"v_t/dict/a": ONE, "v_t/list/0": ONE},
    "list that starts at 1": {"v_t/list/1": ONE},
    "list with a gap": {"v_t/list/0": ONE, "v_t/list/2": ONE},
    "list with a word": {"v_t/list/x": ONE},
    "list with padding": {"v_t/list/00": ONE},
    "a method": {"summary/dict/a": ONE},
    "a private method": {"_construct_messages/list/0": ONE},
    "the class": {"__class__/dict/a": ONE},
    "the attributes": {"__dict__/dict/a": ONE},
    "a number": {"eta/dict/a": ONE},
    "a function": {"train_metrics_aggr_fn/dict/a": ONE},
    "a text": {"weighted_by_key/list/0": ONE},
    "not there": {"n_t/dict/a": ONE},
    "no name": {"/dict/a": ONE},
    "dots": {".m_t/dict/a": ONE},
    "nothing inside": {"strategy.m_t/dict/a": ONE},
    "another shape": {"m_t/dict/w": torch.ones(3)},
    "a shape that would broadcast": {"m_t/dict/w": torch.ones(1)},
    "a list for a dict": {"m_t/list/0": ONE},
    "a record for a dict": {"m_t/record/w": ONE},
    "bfloat16": {"v_t/dict/w": ONE.bfloat16()},
    "complex": {"v_t/dict/w": ONE.to(torch.complex64)},
    "one of two": {"v_t/dict/w": ONE, "summary/dict/a": ONE},
    "control codes": {"m\nt/dict/a": ONE},
}


@pytest.mark.parametrize("tensors", PLACES.values(), ids=PLACES)
def test_a_checkpoint_never_sets_what_no_strategy_would_have_kept(tensors):
    strategy = full_adam()
    before = dict(vars(strategy))
    with pytest.raises(ConfigError, match="checkpoint") as caught:
        put_arrays(strategy, tensors)
    assert "\n" not in str(caught.value)
    assert all(vars(strategy)[name] is value for name, value in before.items())
    assert vars(strategy).keys() == before.keys()
    assert type(strategy) is FedAdam


class Other(FedAvg):
    """A strategy of a user's."""

    def __init__(self):
        super().__init__()
        self.by_node = {7: np.ones(2)}
        self.losses = {"a": np.float32(1.0)}
        self.bytes = ArrayRecord({"a": Array("float32", (2,), "mine", b"12345678")})
        self.long = [np.ones(2, np.longdouble)]
        self.swapped = [np.ones(2, ">f4")]
        self.words = ["a"]
        self.empty: dict[str, np.ndarray] = {}


def test_what_would_not_come_back_as_it_is_is_not_kept():
    assert set(arrays_in(Other())) == {"losses/dict/a"}


def test_a_given_up_round_leaves_a_strategys_arrays_as_they_were():
    strategy = Other()
    strategy.in_place = [np.ones(2)]
    strategy.record = ArrayRecord({"a": Array(np.ones(2))})
    strategy.none = None
    memory = StrategyMemory(strategy)
    strategy.in_place[0][:] = np.nan
    strategy.record.clear()
    strategy.losses.clear()
    strategy.empty["a"] = np.zeros(1)
    strategy.none = [np.zeros(1)]
    strategy.new = [np.zeros(1)]
    strategy.rounds = 3
    memory.put_back()
    assert np.array_equal(strategy.in_place[0], np.ones(2))
    assert list(strategy.record) == ["a"]
    assert strategy.losses == {"a": 1.0}
    assert strategy.empty == {}
    assert strategy.none is None
    assert not hasattr(strategy, "new")
    assert strategy.rounds == 3  # no array


def test_arrays_that_become_non_finite_are_found():
    strategy = full_adam()
    strategy.v_t = {"w": np.array([np.inf])}
    strategy.seen = {"loss": np.float64(1.0)}
    memory = StrategyMemory(strategy)
    assert memory.spoilt(arrays_in(strategy)) == []
    strategy.m_t["w"][0] = np.nan
    strategy.seen["loss"] = np.float64(np.nan)
    assert memory.spoilt(arrays_in(strategy)) == ["m_t/dict/w"]
