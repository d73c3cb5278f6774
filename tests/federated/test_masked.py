"""Federations whose server adds up what it cannot read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from fedkl import rng
from fedkl.aggregation import MaskedAggregation, PlainAggregation, SeenSum, SeenUpdate, SeenUpload
from fedkl.aggregation.base import FederationPlan, RoundPlan
from fedkl.config import TrainConfig
from fedkl.defenses import KeyLock, NoDefense
from fedkl.errors import ConfigError, MaskingError, RoundLostError
from fedkl.experiment_flags import aggregation_fields
from fedkl.federated import Checkpoints, FederatedTraining, Federation, LocalTraining, ServerSGD
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec
from tests.federated.setting import TwoNorms, copy_secrets, seeded

MODES = ("blind", "pairwise", "both")
BOUND = 2.0**-21 + 2.0**-23  # of words with few samples, then float32's rounding below 2


def federation(dataset, aggregation, *, defense=None, clients=4, rounds=3, **options):
    return Federation(
        seeded(TwoNorms),
        defense=defense or NoDefense(),
        dataset=dataset,
        training=FederatedTraining(clients=clients, rounds=rounds, eval_every=rounds, **options),
        seed=0,
        aggregation=aggregation,
    )


def distance(one, other):
    a, b = one.server.state, other.server.state
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("defense", [NoDefense(), KeyLock(layers="all")], ids=["plain", "keylock"])
def test_a_masked_round_gives_the_plain_average(dataset, mode, defense):
    plain = federation(dataset, PlainAggregation(), defense=defense)
    masked = federation(dataset, MaskedAggregation(mode=mode), defense=defense)
    copy_secrets(plain, masked)
    for number in range(2):
        a, b = plain.run_round(number), masked.run_round(number)
        assert b.aggregated
        assert b.updates == a.updates
        assert distance(plain, masked) < (BOUND if number == 0 else 1e-4)  # training makes it larger


@pytest.mark.parametrize("mode", MODES)
def test_the_server_sees_words(dataset, mode):
    seen = []
    masked = federation(dataset, MaskedAggregation(mode=mode))
    masked.run_round(0, on_seen=lambda plan, shown: seen.extend(shown))
    uploads = [each for each in seen if isinstance(each, SeenUpload)]
    assert len(uploads) == 4
    assert not any(type(each) is SeenUpdate for each in seen)
    numbers = torch.cat([t.flatten() for each in uploads for t in each.as_numbers().values()])
    counts = torch.histc(numbers, bins=16, min=-1, max=1)
    expected = len(numbers) / 16
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 100  # 15 degrees of freedom: by chance once in 10¹⁴
    sums = [each for each in seen if isinstance(each, SeenSum)]
    assert len(sums) == (mode == "pairwise")
    for each in sums:
        assert each.update.num_samples == 192
        assert all(torch.equal(each.update.tensors[name], t) for name, t in masked.server.state.items())


def test_unmasked_words_would_be_found(dataset):
    """The control of the test above: what the chi-square says of words without a mask."""
    words = (torch.randn(6000) * 0.1 * 2**20 * 48 + 48 * 2**30) / 2.0**63
    counts = torch.histc(words, bins=16, min=-1, max=1)
    assert float(((counts - 375) ** 2 / 375).sum()) > 10_000


@pytest.mark.parametrize("mode", ["blind", "both"])
@pytest.mark.parametrize(
    "options", [{"server": ServerSGD()}, {"local": LocalTraining(algorithm="fedsgd")}], ids=["sgd", "fedsgd"]
)
def test_a_server_that_reads_nothing_has_no_optimizer(dataset, mode, options):
    with pytest.raises(ConfigError, match="'masked' shows the server no average"):
        federation(dataset, MaskedAggregation(mode=mode), defense=KeyLock(layers="all"), **options)


@pytest.mark.parametrize(
    "options", [{"server": ServerSGD()}, {"local": LocalTraining(algorithm="fedsgd")}], ids=["sgd", "fedsgd"]
)
def test_a_server_that_reads_the_sum_may_step(dataset, options):
    defense = KeyLock(layers="all")
    plain = federation(dataset, PlainAggregation(), defense=defense, **options)
    masked = federation(dataset, MaskedAggregation(mode="pairwise"), defense=defense, **options)
    copy_secrets(plain, masked)
    for number in range(2):
        plain.run_round(number)
        assert masked.run_round(number).aggregated
    assert distance(plain, masked) < 1e-4


def test_sampled_cohorts_and_drop_outs(dataset):
    masked = federation(dataset, MaskedAggregation(mode="both"), clients=8, cohort=6, dropout=0.5, rounds=6)
    results = list(masked.run())
    assert {result.aggregated for result in results} == {True, False}
    for result in results:
        assert result.aggregated == (result.updates >= 3)  # the minimum: a cohort of their own


def test_clients_that_go_before_they_reveal_lose_a_round_at_worst(dataset):
    masked = federation(dataset, MaskedAggregation(mode="pairwise", lost=0.3), clients=8, rounds=8)
    results = list(masked.run())
    lost = [result for result in results if result.lost]
    assert lost
    assert all("cannot be opened" in result.lost or "Refused" in result.lost for result in lost)
    assert not any(result.aggregated for result in lost)
    assert any(result.aggregated for result in results)


LOST = MaskingError("Round 0: lost.")
NAMES = [f"client-{number}" for number in range(10)]
SCHEMA = PublicSchema(kind="weights", specs={"w": TensorSpec(shape=(3,), dtype=torch.float32)})


class Rounds:
    """Rounds of ten clients without a network, which are given an update each."""

    def __init__(self, *, mode, clients=10, lost=0.0):
        self.names = NAMES[:clients]
        plan = FederationPlan(clients=dict.fromkeys(self.names, 10), sampled=False, steps=False, seed=0)
        self.federation = MaskedAggregation(mode=mode, lost=lost).for_federation(plan)
        self.state = {"w": torch.zeros(3)}

    def begun(self, number, *, gone=()):
        """A round in which some drop out before they send."""
        plan = RoundPlan(round=number, clients=dict.fromkeys(self.names, 10), schema=SCHEMA, state=self.state)
        collected = self.federation.begin(plan)
        for place, name in enumerate(self.names):
            if name in gone:
                collected.drop(name)
                continue
            tensors = {"w": torch.full((3,), 0.1 * place + number)}
            update = PublicUpdate(schema=SCHEMA, tensors=tensors, num_samples=10, round=number)
            collected.offer(name, update)
        return collected

    def revealed(self):
        """Who has revealed on any model."""
        return [name for name in self.names if self.federation.member(name).memory.sets]


@pytest.mark.parametrize("mode", ["pairwise", "both"])
def test_drop_outs_before_uploads_and_reveals_do_not_end_a_training(mode):
    """Reveals for a sum that could not be opened bound members to names that never came together again."""
    rounds, opened = Rounds(mode=mode, lost=0.1), []
    for number in range(30):
        chances = torch.rand(10, generator=rng.generator(0, "dropout", number)).tolist()
        gone = [name for name, chance in zip(NAMES, chances, strict=True) if chance < 0.1]
        collected = rounds.begun(number, gone=gone)
        assert collected.enough == (len(gone) <= 7)
        if collected.enough:
            with suppress(RoundLostError):
                rounds.state = collected.result()
                opened.append(number)
    assert len(opened) > 25
    assert opened[-1] > 26


def test_nobody_reveals_for_a_round_that_cannot_be_opened(monkeypatch):
    rounds = Rounds(mode="both", clients=5, lost=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(rounds.federation, "lost", lambda *_: ["client-2", "client-3"])
        collected = rounds.begun(0, gone=["client-4"])
        with pytest.raises(RoundLostError, match="nobody was asked to reveal"):
            collected.result()
    assert not rounds.revealed()
    monkeypatch.setattr(rounds.federation, "lost", lambda *_: [])
    assert float(rounds.begun(1).result()["w"][0]) == pytest.approx(1.2, abs=1e-5)


def test_one_client_that_refuses_to_reveal_does_not_lose_the_round(monkeypatch):
    rounds = Rounds(mode="pairwise")
    collected = rounds.begun(0)

    def refuses(message):
        raise MaskingError("Refused: the roster has expired.")

    for name in NAMES[:3]:
        monkeypatch.setattr(rounds.federation.member(name), "reveal", refuses)
    assert float(collected.result()["w"][0]) == pytest.approx(0.45, abs=1e-5)
    collected = rounds.begun(1)
    monkeypatch.setattr(rounds.federation.member(NAMES[3]), "reveal", refuses)
    with pytest.raises(RoundLostError, match=r"members refuse to reveal.\n  - client-0: Refused: the roster"):
        collected.result()


def test_whom_clients_were_asked_to_reveal_for_is_kept_between_rounds_and_runs(monkeypatch):
    """A round is lost although all have revealed; the next one is of the same, whoever else is there."""
    rounds = Rounds(mode="pairwise", clients=5)
    collected = rounds.begun(0, gone=["client-4"])
    with monkeypatch.context() as patch:
        patch.setattr("fedkl.masking.server.MaskedSum.sealed", lambda self: (_ for _ in ()).throw(LOST))
        with pytest.raises(RoundLostError, match="lost"):
            collected.result()
    assert len(rounds.revealed()) == 4
    again = Rounds(mode="pairwise", clients=5)
    again.federation.restore(rounds.federation.secrets)
    with pytest.raises(RoundLostError, match="not here: client-3"):
        again.begun(1, gone=["client-3"]).result()
    assert float(again.begun(2).result()["w"][0]) == pytest.approx(2.15, abs=1e-5)  # without client-4
    assert float(again.begun(3).result()["w"][0]) == pytest.approx(3.2, abs=1e-5)
    damaged = {**rounds.federation.secrets, "reveals": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(ConfigError, match="masks are damaged"):
        again.federation.restore(damaged)


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_training_goes_on_as_if_nothing_had_been(dataset, mode, tmp_path):
    whole = federation(dataset, MaskedAggregation(mode=mode), rounds=4)
    first = federation(dataset, MaskedAggregation(mode=mode), rounds=4)
    list(whole.run())
    for number in range(2):
        first.run_round(number)
    Checkpoints(tmp_path, passphrase="x").save(first, round=2)
    again = federation(dataset, MaskedAggregation(mode=mode), rounds=4)
    assert Checkpoints(tmp_path, passphrase="x").restore(again) == 2
    results = list(again.run(start=2))
    assert all(result.aggregated for result in results)
    assert distance(whole, again) == 0
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert first.aggregation.secrets["key"].numpy().tobytes() not in held


def test_a_checkpoint_with_masks_does_not_fit_one_without(dataset, tmp_path):
    masked = federation(dataset, MaskedAggregation())
    masked.run_round(0)
    Checkpoints(tmp_path, passphrase="x").save(masked, round=1)
    plain = federation(dataset, PlainAggregation())
    with pytest.raises(ConfigError, match="has secrets of one"):
        Checkpoints(tmp_path, passphrase="x").restore(plain)
    other = federation(dataset, MaskedAggregation(), clients=5)
    with pytest.raises(ConfigError, match="4 clients, expected 5"):
        Checkpoints(tmp_path, passphrase="x").restore(other)


def test_too_few_clients_are_refused(dataset):
    with pytest.raises(ConfigError, match=r"clients: expected 3 .* got 2"):
        federation(dataset, MaskedAggregation(), clients=2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"minimum": 2}, "minimum: expected at least 3"),
        ({"lost": 1.0}, "lost: expected a probability"),
        ({"lost": -0.1}, "lost: expected a probability"),
    ],
)
def test_options_that_protect_nothing_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        MaskedAggregation(**options)


def test_the_command_line_names_the_modes():
    for mode in MODES:
        config = TrainConfig.model_validate({"training": {"aggregation": aggregation_fields(mode)}})
        assert config.training.aggregation == MaskedAggregation(mode=mode)
    assert aggregation_fields("none") == {"type": "plain"}
    with pytest.raises(ConfigError, match=r"--masking 'secret': expected one of blind, pairwise, both, none"):
        aggregation_fields("secret")


def test_updates_out_of_range_are_one_clients_failure(dataset):
    masked = federation(dataset, MaskedAggregation(), clients=4)
    broken = dict(masked.server.state)
    name = next(iter(broken))
    original = masked._transformed
    masked._transformed = lambda update, client: (
        replace(update, tensors={**update.tensors, name: update.tensors[name] + 2000})
        if update.num_samples and not masked.clients[0].trained
        else original(update, client)
    )
    masked._pool.workers[0].train(
        masked.clients[3], masked.server.state, round=0, lr=0.01, transform=original
    )
    result = masked.run_round(0)
    assert any("beyond ±1024" in reason for reason in result.failed.values())
