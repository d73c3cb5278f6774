"""What an audit will do: which exposures, which attackers on them, and why not the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl import Procedure
from fedkl.attacks import ATTACKS
from fedkl.auditing import attackers, plan
from fedkl.auditing.attackers import ATTACKERS, available
from fedkl.auditing.clients import Clients
from fedkl.auditing.defended import defense_of, text_of
from fedkl.auditing.plan import CONTROL, exposures_of
from fedkl.auditing.rebuilding import work
from fedkl.auditing.recognition import LOOKED_AT, Pools
from fedkl.defenses import DEFENSES, Defense, KeyLock, NoDefense, PrivateLayers, PrivateNorm
from fedkl.defenses.combined import Combined
from fedkl.defenses.masked import MaskedUpload
from fedkl.defenses.pruning import Pruning
from fedkl.errors import ConfigError, TrainingError
from tests.auditing.subjects import (
    CLASSES,
    EPOCH,
    Casting,
    Silent,
    Words,
    convnet,
    mlp,
    subject,
    tokens,
    trains,
)

GRADIENT = Procedure()


def exposed(audited, *, batch_sizes=(1, 16), masking="none", defense=None):
    return exposures_of(
        audited, defense=defense or NoDefense(), masking=masking, batch_sizes=batch_sizes, seed=0
    )


def planned(audited, **options):
    return plan.plan(exposed(audited, **options), pools=Pools.of(audited.images, audited.labels, seed=0))


def attacker(name):
    return next(each for each in ATTACKERS if each.name == name)


def runs(entries, exposure):
    return {each.name for each in entries if each.exposure.name == exposure and each.obstacle is None}


def reason(entries, attacker, exposure):
    (found,) = [each for each in entries if (each.name, each.exposure.name) == (attacker, exposure)]
    return found.obstacle.reason


@pytest.mark.parametrize(
    ("fields", "options", "expected"),
    [
        ({}, {}, [("your-client", "2 local steps on 8 images", 2, True),
                  ("gradient-of-1", "one step on one image", 1, True),
                  ("gradient-of-16", "one step on 16 images", 1, True),
                  ("untrained", "one step on one image, untrained network", 1, False)]),
        ({"weights": None}, {"batch_sizes": (4, 4)}, [
            ("your-client", "2 local steps on 8 images", 2, False),
            ("gradient-of-4", "one step on 4 images", 1, False)]),
        ({"procedure": GRADIENT}, {"batch_sizes": (8, 2)}, [
            ("your-client", "one gradient of 8 images", 1, True),
            ("gradient-of-2", "one gradient of 2 images", 1, True),
            ("untrained", "one gradient of one image, untrained network", 1, False)]),
        ({"procedure": replace(EPOCH, batch_size=8)}, {"batch_sizes": ()}, [
            ("your-client", "1 local step on 8 images", 1, True),
            ("untrained", "one step on one image, untrained network", 1, False)]),
        ({"procedure": trains, "images_per_client": 1}, {"batch_sizes": ()}, [
            ("your-client", "your training loop on one image", 0, True),
            ("untrained", "one gradient of one image, untrained network", 1, False)]),
        ({}, {"masking": "pairwise", "batch_sizes": ()}, [
            ("your-client", "2 local steps on 8 images", 2, True),
            ("sum-of-3", "the sum of 3 clients, 2 local steps on 8 images", 2, True),
            ("untrained", "one step on one image, untrained network", 1, False)]),
    ],
    ids=["epoch", "untrained", "gradient", "one step", "loop", "pairwise"],
)  # fmt: skip
def test_exposures(fields, options, expected):
    found = [each.exposure for each in exposed(subject(**fields), **options)]
    assert [(each.name, each.title, each.steps, each.trained) for each in found] == expected
    assert [each.headline for each in found] == [each.name in ("your-client", "sum-of-3") for each in found]
    assert {each.clients for each in found if each.name != "sum-of-3"} == {1}


def test_masks_hide_single_updates_and_no_sums():
    found = {each.exposure.name: each for each in exposed(subject(), masking="pairwise")}
    assert {name: each.defense.type for name, each in found.items()} == {
        "your-client": "masked", "sum-of-3": "none", "gradient-of-1": "masked", "gradient-of-16": "masked",
        "untrained": "masked",
    }  # fmt: skip
    assert found["sum-of-3"].exposure.clients == 3
    assert found["gradient-of-1"].procedure == replace(EPOCH, steps=1, batch_size=None)
    blind = exposed(subject(), masking="blind", batch_sizes=())
    assert [each.defense.describe() for each in blind] == ["masked (blind)"] * 2


def test_upper_bounds_keep_the_norm_mode():
    assert {each.exposure.norm_mode for each in exposed(subject(norm_mode="eval"))} == {"eval"}


def sigmoid():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Sigmoid(), nn.Linear(16, CLASSES))


def test_attackers_of_an_mlp():
    entries = planned(subject())
    assert runs(entries, "gradient-of-1") == {
        "presence", "linear-rows", "disaggregation", "matching", "learned", "gauss-newton",
    }  # fmt: skip
    assert runs(entries, "your-client") == {"presence", "linear-rows", "matching", "learned", "gauss-newton"}
    assert "vision transformer" in reason(entries, "positions", "gradient-of-1")
    assert "relu after '1' cannot be inverted" in reason(entries, "closed-form", "gradient-of-1")
    assert "one image, got a batch of 16" in reason(entries, "closed-form", "gradient-of-16")
    assert "expected one step" in reason(entries, "disaggregation", "your-client")


def test_attackers_of_a_sigmoid_network():
    entries = planned(subject(sigmoid, weights=None, procedure=GRADIENT), batch_sizes=(1,))
    assert "closed-form" in runs(entries, "gradient-of-1")
    assert "closed-form" not in runs(entries, "your-client")


def test_attackers_of_a_convnet_with_batch_norm():
    entries = planned(subject(convnet, procedure=GRADIENT), batch_sizes=(1,))
    assert {"presence", "matching", "learned"} <= runs(entries, "gradient-of-1")
    assert {"presence", "matching", "learned"} <= runs(entries, "your-client")


def test_of_tokens_only_presence_is_tested():
    entries = planned(subject(Words, inputs=tokens))
    for exposure in ("your-client", "gradient-of-1", "gradient-of-16"):
        assert runs(entries, exposure) == {"presence"}
    assert reason(entries, "matching", "your-client").startswith("There are no pictures to rebuild")


def test_of_a_function_that_trains_only_presence_is_tested():
    """And upper bounds say what attackers of pictures could do."""
    entries = planned(subject(procedure=trains), batch_sizes=(1,))
    assert runs(entries, "your-client") == {"presence"}
    assert "cannot be done with a function that trains" in reason(entries, "matching", "your-client")
    assert {"presence", "linear-rows", "matching"} <= runs(entries, "gradient-of-1")


def test_real_clients_presence_is_first_and_that_of_other_upper_bounds_last():
    """Else those would take a large network's minutes before any picture is tried."""
    entries = planned(subject(), batch_sizes=(16, 1))
    places = [(each.name, each.exposure.name) for each in entries]
    assert places[:2] == [("presence", CONTROL), ("presence", "your-client")]
    assert places[-2:] == [("presence", "gradient-of-16"), ("presence", "untrained")]
    pictures = entries[2:-2]
    assert len(pictures) == 4 * len(available())
    applies = [each.name for each in pictures if each.exposure.name == "your-client" and not each.obstacle]
    assert {"matching"} < set(applies)  # and not all do
    of_real, bounds = pictures[: len(available()) + len(applies)], pictures[len(available()) + len(applies) :]
    for some in (of_real, bounds):
        names = [each.name for each in some]
        assert names == sorted(names, key=[each.name for each in ATTACKERS].index)
    for name in (each.name for each in available()):
        exposures = [each.exposure.name for each in of_real if each.name == name]
        assert exposures == ([CONTROL, "your-client"] if name in applies else ["your-client"])
    assert {each.exposure.name for each in bounds} == {CONTROL, "gradient-of-16", "untrained"}


def test_too_few_images_for_a_batch_are_an_obstacle():
    entries = planned(subject(count=60, images_per_client=4), batch_sizes=(16, 30))
    assert runs(entries, "gradient-of-30") == set()
    assert reason(entries, "matching", "gradient-of-30") == (
        "There are only 24 images of clients, 30 are in an update."
    )
    assert "at least 150 images" in reason(entries, "presence", "gradient-of-30")
    assert "at least 80 images" in reason(entries, "presence", "gradient-of-16")
    assert "matching" in runs(entries, "gradient-of-16")


def test_a_plan_says_what_too_few_images_cost_real_clients_and_the_remedy():
    pictures, none = (
        planned(subject(count=100, images_per_client=size), batch_sizes=(30,)) for size in (21, 50)
    )
    needs = (
        "Presence: expected at least {} images, five times the {} of an update, got 100. The server and the "
    )
    needs += "audited clients get two fifths each. Give more images, or set images_per_client to at most 20."
    title = "for what your clients really send, {} local steps on {} images. "
    assert plan.shortfalls(pictures) == [
        f"Presence will not be tested {title.format(6, 21)}{needs.format(105, 21)}"
    ]
    assert plan.shortfalls(none) == [f"There will be no result {title.format(13, 50)}{needs.format(250, 50)}"]
    assert not plan.shortfalls(planned(subject(count=100, images_per_client=20), batch_sizes=(30,)))
    assert "set batch_sizes to at most 20." in reason(none, "presence", "gradient-of-30")


def test_the_remedy_for_sums_counts_their_clients():
    entries = planned(subject(count=100, images_per_client=8), masking="pairwise", batch_sizes=())
    (said,) = plan.shortfalls(entries)
    assert "the sum of 3 clients" in said
    assert said.endswith("set images_per_client to at most 6.")


class Slow(Clients):
    """The first update takes long, as the first one of a process does."""

    def update(self, images, labels, *, number):
        calls = self.subject.calls
        calls.append(len(images))
        if len(calls) == 1:
            clock[0] += 100.0
        clock[0] += 2.0
        return super().update(images, labels, number=number)


clock = [0.0]


def test_estimates_are_of_later_updates(monkeypatch):
    monkeypatch.setattr(plan, "process_time", lambda: clock[0])
    audited = subject()
    object.__setattr__(audited, "calls", [])
    pools = Pools.of(audited.images, audited.labels, seed=0)
    (client, *_) = exposed(audited, batch_sizes=())
    entries = {each.name: each for each in plan.plan([Slow(**vars(client))], pools=pools)}
    assert set(audited.calls) == {8}
    matching, learned = attacker("matching"), attacker("learned")
    assert matching.images == 20
    assert entries["matching"].seconds == 2.0 * matching.each * 2  # two updates of eight
    assert entries["matching"].least == entries["matching"].seconds
    assert entries["learned"].seconds == entries["learned"].least == 2.0 * learned.once
    assert entries["presence"].seconds == 2 * 30 * 2.0 + 2 * LOOKED_AT * 2.0 / 8 + 5
    hidden = {each.name: each for each in plan.plan(
        exposed(audited, masking="blind", batch_sizes=()), pools=pools
    ) if each.exposure.headline}  # fmt: skip
    assert hidden["presence"].seconds == 10.0  # with its control; these clients take no time of this clock


def test_an_update_is_attacked_whole_and_its_control_too():
    audited = subject(count=200, images_per_client=30)
    pools = Pools.of(audited.images, audited.labels, seed=0)
    (open_client, *_), (hidden, *_) = (exposed(audited, masking=mode) for mode in ("none", "blind"))
    matching = attacker("matching")
    assert work(matching, open_client, pools) == (matching.each, matching.each)
    assert work(matching, hidden, pools) == (2 * matching.each, 2 * matching.each)


def test_an_attacker_without_time_for_real_clients_comes_later(monkeypatch):
    """Else its control takes the time of those who would find something."""
    monkeypatch.setattr(plan, "_seconds_of_update", lambda clients, pools: float(clients.exposure.images))
    audited = subject(count=200, images_per_client=30)
    pools = Pools.of(audited.images, audited.labels, seed=0)
    clients = exposed(audited, batch_sizes=(1,))
    matching = attacker("matching")

    def names(within):
        entries = plan.plan(clients, pools=pools, within=within)
        return [(e.name, e.exposure.name) for e in entries if e.obstacle is None]

    enough, short = (names(4 * 30 * matching.each - less) for less in (0, 1))
    assert sorted(enough) == sorted(short)
    mine = [("matching", "gradient-of-1"), ("matching", "your-client")]
    cheap = ("disaggregation", "gradient-of-1")
    assert [each for each in enough if each in (*mine, cheap)] == [*mine, cheap]
    assert [each for each in short if each in (*mine, cheap)] == [cheap, *mine]


def test_a_client_that_cannot_train_ends_the_plan():
    def raises(network, x, y):
        raise ValueError("no")

    with pytest.raises(TrainingError, match="raised ValueError"):
        planned(subject(procedure=raises))


def normed():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, CLASSES)
    )


@pytest.mark.parametrize("procedure", [GRADIENT, EPOCH, trains], ids=["gradient", "epoch", "loop"])
def test_an_upper_bound_that_no_client_can_send_ends_nothing(procedure):
    """Batch norm of one image has no variance."""
    entries = planned(subject(normed, procedure=procedure))
    assert "presence" in runs(entries, "your-client")
    assert "presence" in runs(entries, "gradient-of-16")
    for exposure in ("gradient-of-1", "untrained"):
        assert not runs(entries, exposure)
        assert "No client of this network can send that." in reason(entries, "presence", exposure)


class Several(nn.Sequential):
    """Raises what nobody foresees for an image alone."""

    def forward(self, x):
        if len(x) == 1:
            raise RuntimeError("not\nforeseen")
        return super().forward(x)


def test_an_attacker_that_breaks_where_it_is_planned_ends_neither_the_plan_nor_the_others():
    """Attackers look at a network with one image."""
    entries = planned(replace(subject(weights=None), model=lambda: Several(*mlp())))
    assert "presence" in runs(entries, "your-client")
    broken = [each for each in entries if each.obstacle is not None and each.obstacle.kind == "broke"]
    assert {each.name for each in broken if each.exposure.headline} >= {"linear-rows"}
    assert {each.obstacle.reason for each in broken} == {"RuntimeError: not\\nforeseen"}


def test_networks_of_another_precision_and_with_frozen_norms_are_planned_as_any():
    usual, casting = (planned(subject(build, weights=None)) for build in (mlp, Casting))
    other = {"gauss-newton"}  # it computes in a precision of its own, and says that it cannot
    for exposure in ("your-client", "gradient-of-1"):
        assert runs(casting, exposure) == runs(usual, exposure) - other >= {"presence", "linear-rows"}
    assert "must have the same dtype" in reason(casting, "gauss-newton", "your-client")
    usual, silent = (planned(subject(build, weights=None)) for build in (convnet, Silent))
    assert runs(silent, "gradient-of-1") == runs(usual, "gradient-of-1") >= {"presence", "matching"}


class Spectral(nn.Module):
    """A filter of complex numbers, and a layer of real ones."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(8, 5, dtype=torch.cfloat))
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.fc(torch.fft.irfft2(torch.fft.rfft2(x[:, 0]) * self.filter, s=(8, 8)).flatten(1))


def test_on_a_network_of_complex_numbers_there_is_presence_only():
    entries = planned(subject(Spectral, weights=None))
    assert {each.name for each in entries if each.obstacle is None} == {"presence"}
    assert "has complex parameters" in reason(entries, "linear-rows", "gradient-of-1")


def test_a_client_that_cannot_train_on_its_images_is_told_so():
    with pytest.raises(TrainingError, match="images_per_client"):
        planned(subject(normed, procedure=GRADIENT, images_per_client=1))


def test_what_is_looked_at_is_told():
    told = []
    audited = subject(Words, inputs=tokens)
    plan.plan(exposed(audited), pools=Pools.of(audited.images, audited.labels, seed=0), told=told.append)
    assert told == [each.exposure.title for each in exposed(audited)]


@pytest.mark.parametrize("name", [name for name in DEFENSES.names() if name != "masked"])
def test_defenses_by_name(name):
    assert defense_of(name) == DEFENSES[name]()


@pytest.mark.parametrize(
    ("defense", "text"),
    [
        (Pruning(), "pruning"),
        (Pruning(keep=0.25), "pruning:keep=0.25"),
        (KeyLock(layers=("0", "é"), share_statistics=True), 'keylock:layers=["0","é"],share_statistics=true'),
        (PrivateNorm(like=KeyLock(key_length=9)), "private-norm:like="),
        (Combined(parts=(Pruning(keep=1e-5), KeyLock())), 'combined:parts=[{type="pruning",keep=1e-05},'),
    ],
)
def test_defenses_with_options_are_one_text(defense, text):
    assert text_of(defense).startswith(text)
    assert defense_of(text_of(defense)) == defense_of(defense) == defense


def test_a_single_word_needs_no_quotes():
    """A shell takes them away."""
    assert defense_of("private-layers:layers=stem") == PrivateLayers(layers="stem")
    words = defense_of("keylock:layers=all,chained=false,activation=identity")
    assert words == KeyLock(layers="all", chained=False, activation="identity")


@pytest.mark.parametrize(
    ("name", "message"),
    [("masked", "masks are `masking`"), ("nose", "defense: expected one of .*keylock.*, got 'nose'"),
     ("", "got ''"), (MaskedUpload(), "masks are `masking`"), (Defense(), "got 'undefended'"),
     ("pruning:kep=0.1", "- kep: 'pruning' has no such field; expected one of keep"),
     ("pruning:keep=2", "expected keep above 0 and at most 1, got 2.0"),
     ("pruning:keep", "expected pruning:NAME=VALUE,…, got 'pruning:keep'"),
     ("pruning:keep=0.1}\nseed = {", "- seed: 'pruning' has no such field")],
)  # fmt: skip
def test_wrong_defenses_are_refused(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        defense_of(name)
    assert "one of" not in message or "masked" not in str(caught.value)


def test_attackers_are_attacks_with_their_options():
    assert [each.attack().type for each in available()] == [each.type for each in ATTACKERS]
    assert ATTACKERS[5].attack().iterations == 500


def test_an_attack_that_is_not_registered_is_left_out(monkeypatch):
    unknown = replace(ATTACKERS[0], name="unknown", type="unknown")
    monkeypatch.setattr(attackers, "ATTACKERS", (unknown, ATTACKERS[1]))
    assert available() == (ATTACKERS[1],)
    assert "unknown" not in ATTACKS.names()


def test_planning_leaves_the_generator_alone():
    audited = subject(procedure=trains)
    before = torch.get_rng_state()
    planned(audited, batch_sizes=(1,))
    assert torch.equal(torch.get_rng_state(), before)
