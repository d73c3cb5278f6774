"""How many images are recognized, and that nothing is where an update says nothing."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch

from fedkl import Procedure
from fedkl.attacking.updates import local_update
from fedkl.auditing.clients import Clients
from fedkl.auditing.recognition import (
    KeptBack,
    Pool,
    Pools,
    _area,
    _figures,
    check_enough,
    clients_of,
    recognize,
)
from fedkl.auditing.results import Exposure
from fedkl.defenses import KeyLock, NoDefense, changing
from fedkl.defenses.combined import Combined
from fedkl.defenses.local_dp import LocalDpMod
from fedkl.defenses.masked import MaskedUpload
from fedkl.defenses.noise import GaussianNoise, LaplaceNoise
from fedkl.defenses.pruning import Pruning
from fedkl.defenses.sparse_vector import SparseVector
from fedkl.errors import DataError
from fedkl.keys import imitated_uniform
from fedkl.metrics import mean_interval
from tests.auditing.subjects import (
    EPOCH,
    Words,
    convnet,
    images,
    labels,
    mlp,
    subject,
    tokens,
    trained,
    trains,
    transferred,
)

SIZE = 12


def pools_of(audited, seed=0):
    return Pools.of(audited.images, audited.labels, seed=seed)


def clients_like(kind=Clients, *, defense=None, clients=1, size=SIZE, **fields):
    audited = subject(**{"images_per_client": size, **fields})
    exposure = Exposure(
        name="your-client", title="a client", headline=True, images=size, steps=1, clients=clients,
        norm_mode=audited.norm_mode,
    )  # fmt: skip
    found = Clients.of(
        audited, exposure=exposure, procedure=audited.procedure, defense=defense or NoDefense(), seed=0
    )
    return kind(**vars(found))


class Unaware(Clients):
    """The server plays clients without the defense."""

    def played(self, images, labels, *, number):
        return Clients.played(self.open(), images, labels, number=number)


class Noise(Clients):
    """Real clients send noise."""

    def update(self, images, labels, *, number):
        generator = torch.Generator().manual_seed(number)
        found = super().update(images, labels, number=number)
        return {
            name: tensor.std() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in found.items()
        }


class Others(Clients):
    """Real clients train on images that are in no pool."""

    def update(self, images, labels, *, number):
        x, y = other_images()
        places = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))[: len(images)]
        return super().update(x[places], y[places], number=number)


def other_images():
    return images(200, seed=20), labels(200)


def says_nothing(found):
    assert found.at_threshold.low <= max(found.false_alarms.high, found.swapped.high)
    assert abs(found.auc - 0.5) < 0.08
    assert found.auc_low - 0.03 < 0.5 < found.auc_high + 0.03


@pytest.mark.parametrize(
    ("fields", "auc"),
    [
        ({}, 0.95),
        ({"build": convnet, "procedure": Procedure()}, 0.65),
        ({"build": convnet, "procedure": Procedure(), "norm_mode": "eval"}, 0.65),
        ({"procedure": trains}, 0.9),
        ({"build": Words, "inputs": tokens, "procedure": Procedure()}, 0.85),
        ({"build": transferred, "procedure": Procedure()}, 0.65),
        ({"build": transferred, "procedure": trains}, 0.65),
    ],
    ids=[
        "an epoch",
        "batch norm",
        "batch norm in eval mode",
        "own loop",
        "tokens",
        "frozen",
        "frozen, own loop",
    ],
)
def test_members_are_recognized(fields, auc):
    found = recognize(clients_like(**fields), pools=pools_of(subject(**fields)))
    assert found.at_threshold.low > max(found.false_alarms.high, found.swapped.high)
    assert auc < found.auc_low <= found.auc <= found.auc_high <= 1
    assert abs(found.swapped_auc - 0.5) < 0.06
    assert found.clients == clients_of(SIZE)
    assert found.share.n == SIZE * found.clients
    assert found.false_alarms.rate < 0.08


@pytest.mark.parametrize("kind", [Noise, Others])
@pytest.mark.parametrize("build", [mlp, convnet])
def test_an_update_of_something_else_recognizes_nobody(kind, build):
    says_nothing(recognize(clients_like(kind, build=build), pools=pools_of(subject(build))))


@pytest.mark.parametrize("procedure", [EPOCH, trains], ids=["procedure", "own loop"])
def test_a_masked_update_recognizes_nobody(procedure):
    clients = clients_like(defense=MaskedUpload(), procedure=procedure)
    found = recognize(clients, pools=pools_of(clients.subject))
    assert found.at_threshold.low <= max(found.false_alarms.high, found.swapped.high)
    assert found.auc_surely <= 0.5  # masks are of the operating system: no two runs are the same
    opened = recognize(clients.open(), pools=pools_of(clients.subject))
    assert opened.at_threshold.low > max(opened.false_alarms.high, opened.swapped.high)


@pytest.mark.parametrize(
    "defense",
    [
        GaussianNoise(deviation=0.02), LaplaceNoise(scale=0.02), Pruning(keep=0.1),
        LocalDpMod(clipping_norm=0.1, epsilon=1000.0),
        SparseVector(fraction=0.3, epsilon=1e9, noise_var=1e3, gamma=0.01, tau=0.0),
        Combined(parts=(GaussianNoise(deviation=0.01), Pruning(keep=0.1))),
    ],
    ids=lambda defense: defense.type,
)  # fmt: skip
def test_who_plays_defended_clients_recognizes_more(defense, monkeypatch):
    """And the defense hides something: fewer are recognized than without it."""

    def found(kind, defense=defense):
        uniform = imitated_uniform(torch.Generator().manual_seed(0))  # real clients' draws repeat
        monkeypatch.setattr(changing, "secure_uniform", uniform)
        return recognize(clients_like(kind, defense=defense), pools=pools_of(subject()))

    informed = found(Clients)
    assert found(Unaware).auc + 0.03 < informed.auc < found(Clients, NoDefense()).auc - 0.2
    assert informed.auc_low > 0.5


def test_a_lock_hides_no_presence():
    clients = clients_like(defense=KeyLock(), build=convnet, procedure=Procedure())
    found = recognize(clients, pools=pools_of(clients.subject))
    assert found.auc_low > 0.6


def test_the_mean_of_clients_hides_presence_less_and_less():
    """Who is one of three clients is harder to tell, and still told."""
    three = recognize(clients_like(clients=3, size=4), pools=pools_of(subject()))
    assert three.auc_low > 0.6
    assert three.share.n == 12 * three.clients


def test_it_repeats_from_the_seed():
    clients = clients_like(build=convnet)
    pools = pools_of(clients.subject)
    one = recognize(clients, pools=pools)
    torch.rand(3)
    assert recognize(clients, pools=pools) == one
    assert recognize(replace(clients, seed=1), pools=pools) != one


def test_progress_goes_up_to_1():
    told = []
    recognize(clients_like(), pools=pools_of(subject()), progress=told.append)
    assert told == sorted(told)
    assert (told[-1], 0 < told[0] < 0.1) == (1.0, True)


class Watched(Clients):
    """Notes which images are played and which are audited."""

    def update(self, images, labels, *, number):
        self.subject.seen["audited"].append((images, labels))
        return super().update(images, labels, number=number)

    def played(self, images, labels, *, number):
        self.subject.seen["played"].append((images, labels))
        return super().played(images, labels, number=number)


def test_clients_are_of_their_own_pools():
    clients = clients_like(Watched)
    object.__setattr__(clients.subject, "seen", {"audited": [], "played": []})
    pools = pools_of(clients.subject)
    recognize(clients, pools=pools)
    for purpose, pool in (("audited", pools.audited), ("played", pools.own)):
        seen = clients.subject.seen[purpose]
        assert len(seen) == clients_of(SIZE)
        own = {image.numpy().tobytes(): int(y) for image, y in zip(*pool, strict=True)}
        for x, y in seen:
            assert [own[image.numpy().tobytes()] for image in x] == y.tolist()
            assert len(torch.unique(x.flatten(1), dim=0)) == SIZE
        assert not torch.equal(seen[0][0], seen[1][0])


def test_pools_share_no_image():
    x = torch.arange(200.0).view(200, 1, 1, 1).expand(-1, 1, 8, 8)
    pools = Pools.of(x, torch.arange(200), seed=3)
    parts = [pool.images[:, 0, 0, 0].int().tolist() for pool in pools]
    assert [len(part) for part in parts] == [80, 40, 80]
    assert sorted(itertools.chain(*parts)) == list(range(200))
    assert all(pool.labels.tolist() == part for pool, part in zip(pools, parts, strict=True))
    assert pools.server.labels.tolist() == parts[0] + parts[1]
    assert Pools.of(x, torch.arange(200), seed=3).own.labels.tolist() == parts[0]
    assert Pools.of(x, torch.arange(200), seed=4).own.labels.tolist() != parts[0]


def test_copies_are_left_out():
    """A member's copy among what sets the threshold would be recognized as well, and hide it."""
    x = torch.arange(200.0).view(200, 1, 1, 1).expand(-1, 1, 8, 8)
    places = torch.arange(600) % 200
    pools = Pools.of(x[places], torch.arange(600), seed=3)
    parts = [pool.images[:, 0, 0, 0].int().tolist() for pool in pools]
    assert sorted(itertools.chain(*parts)) == list(range(200))
    assert all(pool.labels.tolist() == part for pool, part in zip(pools, parts, strict=True))  # of the first


def test_no_images_have_no_copies():
    x = torch.zeros(0, 1, 2, 2)
    assert [len(pool.images) for pool in Pools.of(x, torch.zeros(0), seed=0)] == [0, 0, 0]


def test_too_few_images_are_refused_with_numbers():
    clients = clients_like(count=100, size=21)
    with pytest.raises(
        DataError,
        match=r"at least 105 images.*five times the 21 of an update, got 100\. The .*Give more "
        r"images, or set images_per_client to at most 20\.",
    ):
        recognize(clients, pools=pools_of(clients.subject))
    check_enough(20, pools_of(clients.subject))


@pytest.mark.parametrize("count", range(40, 60))
def test_as_many_to_a_client_as_the_refusal_names_are_enough_and_one_more_is_not(count):
    single = torch.arange(float(count)).view(-1, 1, 1, 1)
    pools = Pools.of(single, torch.zeros(count, dtype=torch.int64), seed=0)
    with pytest.raises(DataError) as refused:
        check_enough(3 * 30, pools, clients=3)
    named = int(re.search(r"images_per_client to at most (\d+)\.", str(refused.value))[1])
    check_enough(3 * named, pools, clients=3)
    with pytest.raises(DataError, match=r"Give more images\.$"):
        check_enough(3 * (named + 1), pools, lower=None)


@pytest.mark.parametrize(("size", "count"), [(1, 100), (2, 100), (3, 80), (7, 35), (240, 6), (1000, 6)])
def test_there_are_enough_clients_for_240_members(size, count):
    assert clients_of(size) == count


@pytest.mark.parametrize("seed", range(3))
def test_the_area_is_that_of_all_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    members = torch.randint(0, 6, (13,), generator=generator).float()
    others = torch.randint(-2, 4, (21,), generator=generator).float()
    pairs = [(m > o) + 0.5 * (m == o) for m in members.tolist() for o in others.tolist()]
    assert _area(members, others) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@pytest.mark.parametrize(
    ("members", "others", "area"), [([2.0], [1.0], 1), ([1.0], [2.0], 0), ([1.0], [1.0], 0.5)]
)
def test_the_area_of_two(members, others, area):
    assert _area(torch.tensor(members), torch.tensor(others)) == area


def drawn(shift=2.0, *, clients=8, count=2000, size=10):
    generator = torch.Generator().manual_seed(0)
    members = torch.zeros(clients, count, dtype=torch.bool)
    for client in range(clients):
        members[client, torch.randperm(count, generator=generator)[:size]] = True
    null = torch.randn(clients, 4000, generator=generator)
    return null, torch.randn(clients, count, generator=generator) + shift * members, members


def figures(null, scores, members, *, owners=None, seed=0):
    kept_back = KeptBack(null, torch.ones_like(null, dtype=torch.bool))
    owners = torch.arange(len(scores)) if owners is None else owners
    return _figures(kept_back, scores, members, ~members, owners=owners, seed=seed)


def test_the_interval_knows_how_little_few_images_say_of_the_threshold():
    """Some images look trained on to any update: which of them were kept back moves the threshold for all."""
    clients, kept, count, size, shift = 6, 120, 240, 120, 2.0
    threshold = 1.25**0.5 * 2.3263  # 99 % of what the sum of the two normals below gives
    truth = 0.5 * math.erfc((threshold - shift) / 1.25**0.5 / 2**0.5)
    wide = narrow = 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        members = torch.zeros(clients, count, dtype=torch.bool)
        for client in range(clients):
            members[client, torch.randperm(count, generator=generator)[:size]] = True
        null, scores = (
            torch.randn(1, images, generator=generator)
            + 0.5 * torch.randn(clients, images, generator=generator)
            for images in (kept, count)
        )
        found = figures(null, scores + shift * members, members, seed=seed)
        wide += found.share.low <= truth <= found.share.high
        narrow += found.at_threshold.low <= truth <= found.at_threshold.high
        assert found.share.low <= found.at_threshold.low <= found.share.rate
        assert found.share.rate <= found.at_threshold.high <= found.share.high
    assert wide >= 27
    assert narrow <= 12


def test_clients_with_the_same_secrets_are_one_for_intervals():
    """Sixty updates of six states of a private layer: how well each was fitted decides what is recognized."""
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(60) % 6
    members = (torch.arange(40) < 4).expand(60, -1)
    shifts = torch.tensor([0.0, 0.5, 1.0, 3.0, 4.0, 5.0])[owners]
    null, scores = (torch.randn(60, images, generator=generator) for images in (100, 40))
    scores = scores + shifts[:, None] * members
    alone, together = (figures(null, scores, members, owners=each) for each in (None, owners))
    assert (alone.share.rate, alone.auc, alone.clients) == (
        together.share.rate,
        together.auc,
        together.clients,
    )
    wide = [each.share.high - each.share.low for each in (together, alone)]
    assert wide[0] > 1.8 * wide[1]
    assert together.auc_high - together.auc_low > 1.8 * (alone.auc_high - alone.auc_low)


def test_the_interval_of_one_client_knows_that_its_images_are_a_draw_too():
    members = (torch.arange(900) < 300)[None]
    truth = 0.5 * math.erfc((2.3263 - 2.3) / 2**0.5)  # of standard normals shifted by 2.3
    held = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        null, scores = (torch.randn(1, images, generator=generator) for images in (300, 900))
        found = figures(null, scores + 2.3 * members, members, seed=seed)
        held += found.share.low <= truth <= found.share.high
    assert held >= 37  # 35 if only the threshold were drawn again


def test_one_percent_of_what_was_kept_back_reaches_the_threshold():
    null, scores, members = drawn()
    found = figures(null, scores, members)
    threshold = null.flatten().sort().values[-320]  # the 320th of 32,000
    assert found.share.rate == pytest.approx(float((scores[members] >= threshold).float().mean()), abs=0.02)
    assert found.false_alarms.rate == pytest.approx(
        float((scores[~members] >= threshold).float().mean()), abs=1e-3
    )
    assert 0.006 < found.false_alarms.rate < 0.014
    assert (found.share.n, found.false_alarms.n, found.clients) == (80, 8 * 1990, 8)


def test_figures_are_those_of_slow_counts():
    null, scores, members = drawn()
    found = figures(null, scores, members)
    areas, swapped = [], []
    for client in range(8):
        own, before = members[client], members[client - 1] & ~members[client]
        areas.append(_area(scores[client][own], scores[client][~own]))
        swapped.append(_area(scores[client][before], scores[client][~own & ~before]))
    assert found.auc == pytest.approx(sum(areas) / 8)
    assert found.swapped_auc == pytest.approx(sum(swapped) / 8)
    assert found.auc_surely < found.auc_low < found.auc < found.auc_high
    assert found.auc_surely == pytest.approx(mean_interval(areas, confidence=0.999)[0])
    assert found.swapped.n == sum(int((members[n - 1] & ~members[n]).sum()) for n in range(8))
    assert found.swapped.rate < 0.05 < found.share.rate


def test_intervals_are_by_client():
    """A client is recognized as a whole, or not at all: that are 8 trials, not 80."""
    null, scores, members = drawn(shift=0.0)
    scores = torch.where(members & (torch.arange(8) % 2 == 0)[:, None], 9.0, scores)
    found = figures(null, scores, members)
    assert found.share.low < 0.25 < 0.75 < found.share.high


def test_equal_scores_are_no_leak():
    null, scores, members = (torch.ones(3, 50), torch.ones(3, 40), torch.zeros(3, 40, dtype=torch.bool))
    members[[0, 1, 2], [0, 1, 2]] = True
    found = figures(null, scores, members)
    assert (found.share.rate, found.false_alarms.rate, found.auc, found.swapped_auc) == (1, 1, 0.5, 0.5)


def test_more_clients_can_be_asked_for_than_a_pool_has_images():
    pool = Pool(images=images(20), labels=labels(20)).first(8)
    assert (len(pool.images), pool.labels.tolist()) == (8, labels(8).tolist())
    x, y = pool.of(torch.tensor([3, 1]))
    assert torch.equal(x, images(20)[[3, 1]])
    assert y.tolist() == [3, 1]


def test_presence_reads_nothing_but_what_is_sent():
    """The view is γ = 1, β = 0 behind a drawn lock: another client's secrets change nothing of the test."""
    clients = clients_like(defense=KeyLock(start="drawn"), build=convnet, procedure=Procedure())
    norm, public = clients.view()[1], clients.view()[4]
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
    assert torch.equal(public.weight, trained(convnet)["4.weight"])
    one, other = clients.view().state_dict(), clients.view().state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_an_epoch_differs_from_a_gradient():
    """The audited procedure is the subject's own."""
    clients = clients_like(procedure=EPOCH)
    x, y = images(200)[:SIZE], labels(200)[:SIZE]
    gradient = local_update(clients.network, x, y, train_mode=True, local=Procedure())
    assert not torch.allclose(clients.update(x, y, number=0)["1.weight"], gradient["1.weight"], rtol=1e-3)


@pytest.mark.parametrize(("clients", "members", "images", "shift"), [(1, 300, 700, 0.5), (6, 40, 240, 0.45)])
def test_more_than_chance_is_no_all_clear_however_few_clients_there_are(clients, members, images, shift):
    """By client there is no interval of one, and of six hardly any. By image there is."""
    generator = torch.Generator().manual_seed(0)
    surely = []
    for shifted in (shift, 0.0):
        for _ in range(20):
            scores = torch.randn(clients, images, generator=generator)
            mine = torch.zeros(clients, images, dtype=torch.bool)
            mine[:, :members] = True
            scores += shifted * mine
            found = figures(torch.randn(clients, 6000 // clients, generator=generator), scores, mine)
            surely.append(found.auc_surely > 0.5)
            assert found.auc_low < found.auc < found.auc_high
    assert sum(surely[:20]) >= 18
    assert sum(surely[20:]) <= 1


@pytest.mark.parametrize(("most", "clients"), [(1, 6), (8, 8), (1000, clients_of(SIZE))])
def test_as_many_updates_as_fit_into_the_memory_and_six_at_least(monkeypatch, most, clients):
    asked = []
    monkeypatch.setattr("fedkl.auditing.recognition.at_once", lambda each: (asked.append(each), most)[1])
    found = recognize(clients_like(), pools=pools_of(subject()))
    assert (found.clients, found.share.n) == (clients, SIZE * clients)
    sent = sum(parameter.nbytes for parameter in mlp().parameters())
    assert len(asked) == 2  # played ones and audited ones
    assert all(each >= 4 * sent for each in asked)
