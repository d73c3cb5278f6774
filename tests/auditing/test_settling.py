"""Clients that took part before keep what was trained, and a server fits its own; nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkl import Procedure
from fedkl.auditing import settling
from fedkl.auditing.plan import plan
from fedkl.auditing.recognition import recognize
from fedkl.defenses import KeyLock, NoDefense, PrivateLayers, PrivateNorm
from fedkl.defenses.combined import Combined
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.defenses.masked import MaskedUpload
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.pruning import Pruning
from fedkl.enrollment.fitting import fit_private_
from tests.auditing.subjects import EPOCH, convnet, images, labels, mlp, subject, trained, trains, transferred
from tests.auditing.test_clients import alike, batch, clients_of, same
from tests.auditing.test_recognition import clients_like, pools_of

STEM, HEAD = PrivateLayers(layers="stem"), PrivateLayers(layers="head")
OWN = images(), labels(200)
OTHERS = images(200, seed=30), labels(200)
HELD_OUT = images(200, seed=40), labels(200)


def settled(*build, **fields):
    return clients_of(*build, **fields).after_rounds(own=OWN, others=OTHERS)


def loss_of(network):
    x, y = HELD_OUT
    with torch.no_grad():
        return float(F.cross_entropy(network.eval()(x), y))


def split_of(clients, private):
    split = clients.defense.prepare(clients.network)
    private.put(split)
    return split


@pytest.mark.parametrize("procedure", [EPOCH, trains], ids=["epoch", "loop"])
@pytest.mark.parametrize(
    ("build", "defense"),
    [(mlp, STEM), (mlp, HEAD), (convnet, STEM), (mlp, KeyLock(layers=["1"]))],
    ids=["stem", "head", "stem and norms", "lock"],
)
def test_all_sides_fit_the_public_tensors(build, defense, procedure):
    """Better than what is drawn; the public tensors stay, and no two are the same."""
    clients = settled(build, defense=defense, procedure=procedure)
    fresh = sum(loss_of(clients.defense.prepare(clients.network).model) for _ in range(8)) / 8
    found = clients.settled
    assert (len(found.played), len(found.real)) == (settling.PLAYED, settling.REAL)
    everyone = [split_of(clients, each) for each in (found.view, *found.played, *found.real)]
    given = clients.defense.prepare(clients.network).public_state()
    for split in everyone:
        assert loss_of(split.model) < 0.85 * fresh
        assert same(split.public_state(), given)
    own = [torch.cat([p.flatten() for p in each.private_parameters().values()]) for each in everyone]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(own) for b in own[:i])
    assert loss_of(clients.view()) < 0.85 * fresh


def test_each_side_fits_to_its_own_images(monkeypatch):
    given = []

    def told(split, *, images, labels, fitting):
        given.append(images)
        return fit_private_(split, images=images, labels=labels, fitting=fitting)

    monkeypatch.setattr(settling, "fit_private_", told)
    clients = settled(mlp, defense=STEM)
    servers, real = given[: 1 + settling.PLAYED], given[1 + settling.PLAYED :]
    assert len(real) == settling.REAL
    for pool, mine in ((OWN, servers), (OTHERS, real)):
        known = {tuple(image.flatten().tolist()) for image in pool[0]}
        assert all(tuple(image.flatten().tolist()) in known for each in mine for image in each)
    assert clients.settled is not None


def test_the_servers_repeat_from_the_seed_and_real_ones_do_not():
    one, again, other = (settled(mlp, defense=STEM, seed=seed) for seed in (0, 0, 1))
    for mine, repeated, another in zip(
        (one.settled.view, *one.settled.played),
        (again.settled.view, *again.settled.played),
        (other.settled.view, *other.settled.played),
        strict=True,
    ):
        assert same(mine.state, repeated.state)
        assert not alike(mine.state, another.state)
    for mine, repeated in zip(one.settled.real, again.settled.real, strict=True):
        assert not alike(mine.state, repeated.state)


@pytest.mark.parametrize("procedure", [Procedure(), EPOCH, trains], ids=["gradient", "epoch", "loop"])
@pytest.mark.parametrize("defense", [STEM, KeyLock(layers=["1"])], ids=["stem", "lock"])
def test_clients_send_what_theirs_makes_of_the_images(defense, procedure):
    """The next client has the next one; played clients have the server's own."""
    if procedure is trains:

        def procedure(network, x, y):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(5)
                trains(network, x, y)

    clients = settled(mlp, defense=defense, procedure=procedure)
    alone = replace(clients, settled=None)
    for seen, states in ((clients.update, clients.settled.real), (clients.played, clients.settled.played)):
        for number in (0, 1, len(states)):
            client = split_of(clients, states[number % len(states)])
            wanted = alone._real(client, *batch(), number=f"{number}-0")
            assert alike(seen(*batch(), number=number), wanted)


@pytest.mark.parametrize("procedure", [Procedure(), trains], ids=["gradient", "loop"])
def test_clients_of_a_cohort_take_turns(procedure):
    """Of as many clients as there are states, each has another, and the next cohort begins with the next."""
    if procedure is trains:

        def procedure(network, x, y):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(5)
                trains(network, x, y)

    two = settled(mlp, defense=STEM, procedure=procedure, clients=2)
    one = replace(two, exposure=two.exposure.model_copy(update={"clients": 1}))
    x, y = batch()
    for seen, alone in ((two.update, one.update), (two.played, one.played)):
        for number in (0, 1):
            found = seen(torch.cat([x, x]), torch.cat([y, y]), number=number)
            parts = [alone(x, y, number=2 * number + member) for member in (0, 1)]
            for name, tensor in found.items():
                wanted = torch.stack([part[name] for part in parts]).mean(0)
                torch.testing.assert_close(tensor, wanted, atol=1e-6, rtol=1e-4)


def test_updates_with_the_same_secrets_are_of_one_owner():
    clients = settled(mlp, defense=STEM)
    again = [tuple(clients.settled.real).index(state) for state in (*clients.settled.real,) * 2]
    assert clients.owners(12) == again
    assert replace(clients, settled=None).owners(12) == list(range(12))
    assert settled(mlp, defense=STEM, clients=2).owners(12) == list(range(12))  # a sum has several


TRAINED_SCALE = KeyLock(layers="all", activation="identity")


def scaled():
    """A network whose norms have learned."""
    network = convnet()
    network.load_state_dict(trained(convnet))
    for norm in (network[1], network[4]):
        nn.init.uniform_(norm.weight, 0.3, 2.0, generator=torch.Generator().manual_seed(0))
    return network


@pytest.mark.filterwarnings("ignore:.*Nothing is drawn for what never trains")
@pytest.mark.parametrize(
    ("build", "defense"),
    [
        (convnet, NoDefense()),
        (convnet, GaussianNoise(deviation=0.1)),
        (convnet, Pruning()),
        (mlp, DPSGD()),
        (convnet, MaskedUpload()),
        (convnet, Combined(parts=(Pruning(), GaussianNoise()))),
        (convnet, TRAINED_SCALE),
        (convnet, PrivateNorm(like=TRAINED_SCALE)),
        (transferred, PrivateLayers(layers=["0"])),
    ],
    ids=["none", "noise", "pruning", "dp-sgd", "masks", "combined", "kept lock", "kept norm", "frozen"],
)
def test_nothing_is_fitted_where_nothing_drawn_is_kept(build, defense):
    """γ and β that a lock keeps of a trained model were trained with the rest; a frozen layer never is."""
    weights = {"weights": scaled().state_dict()} if build is convnet else {}
    clients = clients_of(build, defense=defense, **weights)
    assert clients.after_rounds(own=OWN, others=OTHERS) is clients


def test_an_untrained_network_has_clients_of_the_first_round():
    clients = clients_of(mlp, defense=STEM, trained=False)
    assert clients.after_rounds(own=OWN, others=OTHERS) is clients


def test_too_few_images_fit_nothing():
    few = OWN[0][:19], OWN[1][:19]
    clients = clients_of(mlp, defense=STEM)
    assert clients.after_rounds(own=few, others=OTHERS).settled is None
    assert clients.after_rounds(own=OWN, others=few).settled is None


def test_a_defense_that_is_part_of_another_is_fitted_too():
    assert settled(mlp, defense=Combined(parts=(STEM, GaussianNoise(deviation=1e-3)))).settled is not None


@pytest.mark.parametrize("defense", [STEM, KeyLock(layers=["1"])], ids=["stem", "lock"])
def test_with_nothing_hidden_nothing_is_fitted(defense):
    opened = settled(mlp, defense=defense).open()
    assert opened.settled is None
    assert set(opened.update(*batch(), number=0)) == set(opened.view().state_dict())


@pytest.mark.parametrize("procedure", [EPOCH, trains], ids=["epoch", "loop"])
def test_network_images_and_generator_stay_as_they_are(procedure):
    clients = clients_of(mlp, defense=STEM, procedure=procedure, normalization=((0.4,), (0.2,)))
    before = {name: tensor.clone() for name, tensor in clients.network.state_dict().items()}
    hooks, state = len(clients.network._forward_hooks), torch.get_rng_state()
    x, y = OWN[0].clone(), OWN[1].clone()
    found = clients.after_rounds(own=(x, y), others=OTHERS)
    assert same(clients.network.state_dict(), before)
    assert len(clients.network._forward_hooks) == hooks
    assert not any(parameter.grad is not None for parameter in clients.network.parameters())
    assert torch.equal(x, OWN[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert loss_of(found.view()) < 1.0  # fitted to what the network is called with: normalized once


def test_no_repr_shows_what_is_kept():
    kept = settling.Private(key=None, state={"gamma": torch.full((2,), 7.0)})
    assert repr(kept) == "Private()"


def test_a_private_stem_hides_a_first_round_only(monkeypatch):
    """Members are recognized where clients and server have trained ones, and hardly behind fresh ones."""
    clients = clients_like(defense=STEM, build=convnet, size=4, count=800)
    found = recognize(clients, pools=pools_of(clients.subject))
    assert found.at_threshold.low > found.false_alarms.high
    assert abs(found.swapped_auc - 0.5) < 0.06
    monkeypatch.setattr(type(clients), "after_rounds", lambda self, **given: self)
    fresh = recognize(clients, pools=pools_of(clients.subject))
    assert found.auc_low > fresh.auc_high


@pytest.mark.parametrize(("defense", "takes"), [(STEM, True), (NoDefense(), False)], ids=["stem", "none"])
def test_a_plan_counts_the_time_of_it(defense, takes, monkeypatch):
    monkeypatch.setattr(settling, "process_time", iter(range(1000)).__next__)
    clients = clients_of(mlp, defense=defense, norm_mode="eval")
    steps = (
        settling.FITTING.epochs * 2 * (1 + settling.PLAYED + settling.REAL)
    )  # 80 images of the server, two batches
    assert clients.seconds_of_rounds((OWN[0][:80], OWN[1][:80])) == (steps if takes else 0)
    (entry,) = (
        each
        for each in plan([clients], pools=pools_of(subject(mlp)))
        if each.attacker is None and each.obstacle is None
    )
    assert (entry.seconds > steps) == takes
