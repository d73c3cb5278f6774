"""The ledger of a training: who spent what, when it ends, and what an interruption costs."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import pytest
from torch import nn

from fedkl import data, experiment_flags, experiments, report
from fedkl.defenses import NoDefense
from fedkl.defenses.client_dp import ClientDP
from fedkl.defenses.clipping import Clipping
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.defenses.keylock import KeyLock
from fedkl.errors import ConfigError, FedKLError
from fedkl.federated import FederatedTraining, Federation
from fedkl.federated.options import LocalTraining
from fedkl.privacy import (
    GaussianCost,
    Ledger,
    LedgerEntry,
    LedgerFile,
    PrivacyOptions,
    epsilon,
    ledgerfile,
)

COST = GaussianCost(noise_multiplier=2.0, protects="one image")


@pytest.fixture(scope="module")
def images():
    whole = data.load("mnist-sample")
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    return replace(whole, **{part: getattr(whole, part)[:64] for part in parts})


def net():
    return nn.Sequential(nn.Conv2d(3, 2, 5, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))


def federation(images, *, defense, **fields):
    local = LocalTraining(batch_size=16)
    training = FederatedTraining(**{"clients": 4, "local": local, **fields})
    return Federation(net(), defense=defense, dataset=images, training=training, seed=0)


def of(rounds, cost=COST, delta=1e-5):
    return epsilon(cost, rounds=rounds, delta=delta)


# In memory


def test_who_did_not_take_part_spent_nothing():
    ledger = Ledger({"a": COST, "b": COST, "c": COST}, options=PrivacyOptions())
    ledger.charge(0, ["a", "b"])
    ledger.charge(1, ["a"])
    assert ledger.spent == {"a": of(2), "b": of(1), "c": 0.0}


def test_a_budget_is_kept_to_the_digit():
    exact = Ledger({"a": COST}, options=PrivacyOptions(budget=of(3)))
    for round in range(3):
        exact.charge(round, ["a"])
    assert not exact.affords(["a"])
    with pytest.raises(ConfigError, match="budget"):
        exact.charge(3, ["a"])
    assert exact.spent == {"a": of(3)}


@pytest.mark.parametrize("fields", [{"delta": 0.0}, {"delta": 1.0}, {"budget": 0.0}, {"budget": 1e999}])
def test_impossible_options_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        PrivacyOptions(**fields)


# In a federation


@pytest.mark.parametrize("defense", [DPSGD(noise_multiplier=1.0), ClientDP(noise_multiplier=8.0)])
def test_sampled_clients_are_charged_and_no_others(images, defense):
    trained = federation(images, defense=defense, cohort=2, rounds=3)
    seen = []
    trained.ledger.on_charge = seen.append
    list(trained.run())
    assert [entry.round for entry in seen] == [0, 1, 2]
    assert all(len(entry.epsilon) == 2 for entry in seen)
    taken = [client for entry in seen for client in entry.epsilon]
    cost = next(iter(trained.ledger.costs.values()))
    assert trained.ledger.spent == {
        f"client-{number}": of(taken.count(f"client-{number}"), cost) for number in range(4)
    }


def test_clients_that_were_gone_are_not_charged(images):
    trained = federation(images, defense=ClientDP(noise_multiplier=8.0), dropout=0.5, rounds=4)
    seen = []
    trained.ledger.on_charge = seen.append
    results = list(trained.run())
    assert sum(len(result.dropped) for result in results) > 0
    for entry, result in zip(seen, results, strict=True):
        assert not set(entry.epsilon).intersection(result.dropped)
        assert len(entry.epsilon) + len(result.dropped) == 4


def test_a_training_ends_before_the_round_that_would_exceed_the_budget(images):
    defense = ClientDP(noise_multiplier=8.0)
    cost = defense.privacy(LocalTraining(), samples=16)
    privacy = PrivacyOptions(budget=(of(2, cost) + of(3, cost)) / 2)
    trained = federation(images, defense=defense, rounds=9, eval_every=9, privacy=privacy)
    results = list(trained.run())
    assert [result.round for result in results] == [0, 1]
    assert results[-1].accuracies  # the last round is evaluated, whichever it is
    assert max(trained.ledger.spent.values()) <= privacy.budget
    with pytest.raises(ConfigError, match="budget"):
        trained.run_round(2)


def test_a_budget_below_one_round_is_refused(images):
    trained = federation(images, defense=ClientDP(), rounds=2, privacy=PrivacyOptions(budget=0.1))
    with pytest.raises(ConfigError, match="Round 0: the budget"):
        list(trained.run())


@pytest.mark.parametrize("defense", [NoDefense(), Clipping(), KeyLock(), DPSGD(noise_multiplier=0.0)])
def test_a_budget_needs_a_guarantee(images, defense):
    with pytest.raises(ConfigError, match=r"no guarantee.*client-dp, dp-sgd"):
        federation(images, defense=defense, rounds=1, privacy=PrivacyOptions(budget=8.0))


# On disk


def test_entries_come_back(tmp_path):
    file = LedgerFile(tmp_path / "ledger.jsonl", delta=1e-5)
    entries = [
        LedgerEntry(round=0, epsilon={"a": of(1)}),
        LedgerEntry(round=1, epsilon={"a": of(2), "b": of(1)}),
    ]
    for entry in entries:
        file.append(entry)
    assert file.entries(rounds=2) == entries
    ledger = Ledger({"a": COST, "b": COST}, options=PrivacyOptions())
    ledger.restore(file.entries(rounds=2))
    assert ledger.spent == {"a": of(2), "b": of(1)}


@pytest.mark.parametrize(
    ("costs", "problem"),
    [
        (
            {"a": replace(COST, noise_multiplier=8.0), "b": COST},
            "'a': .* 2 rounds, which cost 0.634",
        ),
        ({"client-0": COST, "b": COST}, "'a', who is not among them"),
    ],
    ids=["other noise", "other names"],
)
def test_what_was_spent_is_not_reckoned_anew(tmp_path, costs, problem):
    path = tmp_path / "ledger.jsonl"
    first = Ledger({"a": COST, "b": COST}, options=PrivacyOptions())
    LedgerFile(path, delta=1e-5).keep(first)
    first.charge(0, ["a", "b"])
    first.charge(1, ["a"])
    later = Ledger(costs, options=PrivacyOptions(budget=4.0))
    with pytest.raises(ConfigError, match=problem):
        LedgerFile(path, delta=1e-5).keep(later, rounds=2)
    assert set(later.spent.values()) == {0.0}
    assert later.on_charge is None
    again = Ledger(first.costs, options=PrivacyOptions())
    LedgerFile(path, delta=1e-5).keep(again, rounds=2)
    assert again.spent == first.spent


def test_a_file_of_another_delta_is_refused(tmp_path):
    """Its lines would say a smaller δ than their ε is of."""
    ledger = Ledger({"a": COST}, options=PrivacyOptions())
    with pytest.raises(ConfigError, match=r"expected a ledger of δ = 1e-09, got one of 1e-05"):
        LedgerFile(tmp_path / "ledger.jsonl", delta=1e-9).keep(ledger)
    assert ledger.on_charge is None


def test_a_line_that_could_not_be_written_is_taken_back(tmp_path, monkeypatch):
    """Else the same process would continue it with the next, and no one could read either."""
    path = tmp_path / "ledger.jsonl"
    file = LedgerFile(path, delta=1e-5)
    file.append(LedgerEntry(round=0, epsilon={"a": of(1)}))
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="No space left"):
            file.append(LedgerEntry(round=1, epsilon={"a": of(2)}))
    assert path.read_bytes() == before
    file.append(LedgerEntry(round=1, epsilon={"a": of(2)}))
    assert [entry.round for entry in file.entries(rounds=2)] == [0, 1]


def test_a_new_ledger_survives_a_power_failure(tmp_path, monkeypatch):
    """A missing file says that nothing was spent."""
    synced = []
    monkeypatch.setattr(ledgerfile, "sync_folder", synced.append)
    file = LedgerFile(tmp_path / "ledger.jsonl", delta=1e-5)
    for round in range(2):
        file.append(LedgerEntry(round=round, epsilon={"a": 0.5}))
    assert synced == [tmp_path]


def test_half_a_line_is_a_round_that_was_not_begun(tmp_path):
    path = tmp_path / "ledger.jsonl"
    file = LedgerFile(path, delta=1e-5)
    file.append(LedgerEntry(round=0, epsilon={"a": 0.5}))
    path.write_bytes(path.read_bytes() + b'{"version": 1, "rou')
    assert [entry.round for entry in file.entries(rounds=1)] == [0]
    file.append(LedgerEntry(round=1, epsilon={"a": 0.75}))
    assert [entry.round for entry in file.entries(rounds=2)] == [0, 1]


@pytest.mark.parametrize(
    "line",
    [
        {"version": 0, "round": 0, "delta": 1e-5, "epsilon": {"a": 1.0}},
        {"version": 1, "round": 0, "delta": 1e-6, "epsilon": {"a": 1.0}},
        {"version": 1, "round": -1, "delta": 1e-5, "epsilon": {"a": 1.0}},
        {"version": 1, "round": 0, "delta": 1e-5, "epsilon": {"a": -1.0}},
        {"version": 1, "round": 0, "delta": 1e-5, "epsilon": ["a"]},
        {"version": 1, "delta": 1e-5, "epsilon": {"a": 1.0}},
    ],
)
def test_damaged_ledgers_are_refused(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=r"ledger\.jsonl"):
        LedgerFile(path, delta=1e-5).entries(rounds=0)


def test_a_round_that_is_not_in_the_ledger_is_refused(tmp_path):
    file = LedgerFile(tmp_path / "ledger.jsonl", delta=1e-5)
    file.append(LedgerEntry(round=0, epsilon={"a": 0.5}))
    with pytest.raises(ConfigError, match="none of round 1"):
        file.entries(rounds=2)


def small(**fields):
    settings = {
        "data.name": "mnist-sample",
        "training.clients": 2,
        "training.rounds": 4,
        "training.local.batch_size": 250,
        "training.local.steps": 1,
        "checkpoints.seconds": 0.0,
    }
    return experiment_flags.from_flags(
        "train",
        file=None,
        fields=settings | fields,
        defense="client-dp",
        settings=["defense.noise_multiplier=20.0", "defense.clip=0.1"],
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_a_run_keeps_its_ledger_and_reports_it(tmp_path):
    run = experiments.run(small(), out=tmp_path / "run")
    kept = lines(run.path)
    assert [line["round"] for line in kept] == [0, 1, 2, 3]
    assert run.summary["privacy"]["epsilon"] == kept[-1]["epsilon"]
    report.build(run.path)
    text = (run.path / "report.md").read_text()
    spent = max(kept[-1]["epsilon"].values())
    assert f"ε = {spent:.2f}" in text
    assert "at δ = 1e-05" in text
    assert "all images of a client" in text


def test_an_interrupted_run_goes_on_with_what_was_spent(tmp_path):
    def stop(done, total, note):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiments.run(small(), out=tmp_path / "run", progress=stop)
    before = lines(tmp_path / "run")
    assert [line["round"] for line in before] == [0, 1]
    run = experiments.run(small(), out=tmp_path / "run")
    assert lines(run.path)[:2] == before
    assert [line["round"] for line in lines(run.path)] == [0, 1, 2, 3]
    whole = experiments.run(small(), out=tmp_path / "whole")
    assert run.summary["privacy"] == whole.summary["privacy"]


def test_rounds_that_are_done_again_are_charged_again(tmp_path):
    """Their noise is another: what was sent the first time is out."""

    def stop(done, total, note):
        if done == 2:
            raise KeyboardInterrupt

    slow = {"checkpoints.seconds": 1e6}
    with pytest.raises(KeyboardInterrupt):
        experiments.run(small(**slow), out=tmp_path / "run", progress=stop)
    run = experiments.run(small(**slow), out=tmp_path / "run")
    assert [line["round"] for line in lines(run.path)] == [0, 1, 0, 1, 2, 3]
    cost = ClientDP(clip=0.1, noise_multiplier=20.0).privacy(LocalTraining(), samples=1)
    assert set(run.summary["privacy"]["epsilon"].values()) == {of(6, cost)}


def test_without_its_ledger_a_run_does_not_go_on(tmp_path):
    def stop(done, total, note):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiments.run(small(), out=tmp_path / "run", progress=stop)
    (tmp_path / "run" / "ledger.jsonl").unlink()
    with pytest.raises(FedKLError, match="none of round 0"):
        experiments.run(small(), out=tmp_path / "run")


def test_a_budget_ends_a_run_and_its_last_round_is_evaluated(tmp_path):
    cost = ClientDP(clip=0.1, noise_multiplier=20.0).privacy(LocalTraining(), samples=1)
    fields = {"training.privacy.budget": (of(2, cost) + of(3, cost)) / 2, "training.eval_every": 4}
    run = experiments.run(small(**fields), out=tmp_path / "run")
    assert run.summary["rounds"] == 2
    assert run.summary["accuracy"] is not None
    report.build(run.path)
    assert "budget" in (run.path / "report.md").read_text()


def test_a_delta_at_which_nothing_can_be_computed_is_refused():
    cost = GaussianCost(noise_multiplier=0.5, sampling_rate=0.5, releases=10, protects="one image")
    with pytest.raises(ConfigError, match=r"privacy\.delta: no finite ε"):
        Ledger({"client-0": cost}, options=PrivacyOptions(delta=1e-40))


def test_a_training_in_python_does_not_go_on_without_what_it_spent(images, tmp_path):
    """Checkpoints hold no ledger: the budget would be spent again."""
    fields = {"defense": ClientDP(noise_multiplier=2.0), "rounds": 4, "privacy": PrivacyOptions()}

    def kept(rounds):
        new = federation(images, **fields)
        LedgerFile(tmp_path / "ledger.jsonl", delta=1e-5).keep(new.ledger, rounds=rounds)
        return new

    first = kept(0)
    for _ in zip(range(2), first.run(), strict=False):
        pass
    with pytest.raises(ConfigError, match="the ledger does not know what round 0 spent"):
        list(federation(images, **fields).run(start=2))
    again = kept(2)
    assert again.ledger.spent == first.ledger.spent
    list(again.run(start=2))
    cost = next(iter(again.ledger.costs.values()))
    assert again.ledger.spent == dict.fromkeys(again.ledger.spent, of(4, cost=cost))
