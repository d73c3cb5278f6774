"""Real clients do what training does, and clients that the server plays know nothing of them."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fedkl import Procedure, rng
from fedkl.attacking.updates import local_update
from fedkl.auditing.clients import Clients
from fedkl.auditing.results import Exposure
from fedkl.defenses import DEFENSES, PUBLISHED_LOCK, KeyLock, NoDefense
from fedkl.defenses.combined import Combined
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.defenses.masked import MaskedUpload
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.pruning import Pruning
from fedkl.errors import ConfigError, TrainingError
from fedkl.locking import is_private
from fedkl.protocol import Knowledge, PerExample
from tests.auditing.subjects import (
    CLASSES,
    EPOCH,
    Silent,
    convnet,
    images,
    labels,
    mlp,
    subject,
    trained,
    trains,
    transferred,
)

SIZE = 8


def clients_of(build=convnet, *, defense=None, clients=1, norm_mode="train", seed=0, trained=True, **fields):
    audited = subject(build, norm_mode=norm_mode, **fields)
    exposure = Exposure(
        name="your-client", title="a client", headline=True, images=SIZE, steps=1, clients=clients,
        norm_mode=norm_mode, trained=trained,
    )  # fmt: skip
    return Clients.of(
        audited, exposure=exposure, procedure=audited.procedure, defense=defense or NoDefense(), seed=seed
    )


def batch(count=SIZE):
    return images()[:count], labels(count)


def alike(one, other):
    """But for rounding, which depends on where in memory tensors lie."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], atol=1e-6, rtol=1e-4) for name in one
    )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


PROCEDURES = {
    "gradient": Procedure(),
    "steps": Procedure(steps=2, batch_size=4, lr=0.1),
    "epoch": EPOCH,
    "momentum": Procedure(algorithm="fedavg", batch_size=3, epochs=2, lr=0.1, momentum=0.9),
    "adam": Procedure(algorithm="fedavg", batch_size=4, lr=0.01, optimizer="adam"),
}


@pytest.mark.parametrize("norm_mode", ["train", "eval"])
@pytest.mark.parametrize("procedure", PROCEDURES.values(), ids=PROCEDURES)
def test_a_client_does_what_training_does_to_the_last_bit(procedure, norm_mode):
    clients = clients_of(procedure=procedure, norm_mode=norm_mode)
    wanted = local_update(clients.network, *batch(), train_mode=norm_mode == "train", local=procedure)
    assert same(clients.update(*batch(), number=3), wanted)
    assert alike(clients.played(*batch(), number=3), wanted)  # nothing is hidden: the server plays the same


def test_the_network_and_the_images_stay_as_they_are():
    for procedure in (EPOCH, trains):
        clients = clients_of(procedure=procedure)
        before = {name: tensor.clone() for name, tensor in clients.network.state_dict().items()}
        x, y = (each.clone() for each in batch())
        clients.update(x, y, number=0)
        clients.played(x, y, number=0)
        clients.view()
        assert same(clients.network.state_dict(), before)
        assert torch.equal(x, batch()[0])


@pytest.mark.parametrize("procedure", [EPOCH, trains, Procedure(augmentation="none")])
def test_nothing_that_is_sent_hangs_on_a_graph(procedure):
    clients = clients_of(procedure=procedure)
    for found in (clients.update(*batch(), number=0), clients.played(*batch(), number=0)):
        assert not any(tensor.requires_grad for tensor in found.values())


def loop(network, x, y, *, seed=None):
    """What a client does, at a seed."""
    if seed is not None:
        torch.default_generator.manual_seed(seed)
    trains(network, x, y)


@pytest.mark.parametrize("normalization", [None, ((0.4,), (0.2,))])
def test_a_loop_of_ones_own_is_called_as_its_owner_calls_it(normalization):
    clients = clients_of(procedure=partial(loop, seed=5), normalization=normalization)
    network = convnet()
    network.load_state_dict(trained(convnet))
    x, y = batch()
    with torch.random.fork_rng(devices=[]):
        loop(network.train(), x if normalization is None else (x - 0.4) / 0.2, y, seed=5)
    before, after = trained(convnet), dict(network.named_parameters())
    found = clients.update(x, y, number=0)
    assert set(found) == set(after)
    for name, parameter in after.items():
        torch.testing.assert_close(found[name], before[name] - parameter.detach(), atol=1e-6, rtol=1e-5)
    assert same(found, clients.played(x, y, number=0))


def test_a_view_is_called_with_images_in_0_1():
    """Of a function that trains, too, whose network takes normalized ones; and normalizes them once."""
    x, _ = batch()
    for procedure in (trains, EPOCH):
        clients = clients_of(procedure=procedure, normalization=((0.4,), (0.2,)), norm_mode="eval")
        network = convnet()
        network.load_state_dict(trained(convnet))
        for _ in range(2):
            view = clients.view().eval()
            torch.testing.assert_close(view(x), network.eval()((x - 0.4) / 0.2))


@pytest.mark.parametrize("procedure", [EPOCH, trains], ids=["epoch", "loop"])
@pytest.mark.parametrize("weights", ["given", "of the model"])
def test_a_server_knows_the_scale_that_a_trained_models_clients_start_at(procedure, weights):
    """The lock starts there, whoever loads the weights; a scale that is drawn is 1 to a server."""
    network = convnet()
    network.load_state_dict(trained(convnet))
    for norm in (network[1], network[4]):
        nn.init.uniform_(norm.weight, 0.3, 2.0, generator=torch.Generator().manual_seed(0))
    lock = KeyLock(layers="all", activation="identity")
    for defense, known in ((lock, True), (replace(lock, start="drawn"), False)):
        given = {"weights": network.state_dict()} if weights == "given" else {"weights": None}
        build = convnet if weights == "given" else lambda: network
        clients = clients_of(build, defense=defense, procedure=procedure, trained=weights == "given", **given)
        torch.testing.assert_close(clients.network[1].weight, network[1].weight)
        expected = network[1].weight if known else torch.ones(6)
        torch.testing.assert_close(clients.view()[1].weight, expected, rtol=1e-3, atol=1e-3)
        own = clients.defense.prepare(clients.network).bake()
        same_scale = torch.allclose(own[1].weight, network[1].weight, rtol=1e-3)
        assert same_scale == known


class Silence(GaussianNoise):
    """Sends no change, and of servers names none that has no images."""

    def transform(self, update, *, client):
        sent = client.received if update.kind == "weights" else {}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in update.tensors.items()}
        return replace(update, tensors={name: sent.get(name, tensor) for name, tensor in zeros.items()})

    def imitate_transform(self, changes, *, clients, generator):
        return {name: torch.zeros_like(tensor) for name, tensor in changes.items()}

    def guesses(self):
        (known,) = super().guesses()
        return (replace(known, knowledge=Knowledge(auxiliary=100)),)


@pytest.mark.parametrize("procedure", [Procedure(), trains], ids=["gradient", "loop"])
def test_a_defense_of_unusual_guesses_is_applied(procedure):
    clients = clients_of(defense=Silence(), procedure=procedure)
    for found in (clients.update(*batch(), number=0), clients.played(*batch(), number=0)):
        assert found
        assert all(not tensor.any() for tensor in found.values())


def test_a_control_of_a_lock_is_audited_as_itself():
    """It changes the network: clients of it send tensors that the plain network does not have."""
    clients = clients_of(mlp, defense=DEFENSES["public-norm"](like=KeyLock(layers=["1"])))
    assert set(clients.update(*batch(), number=0)) == set(clients.played(*batch(), number=0))
    assert clients.arm.defense == clients.defense


@pytest.mark.parametrize("procedure", [EPOCH, trains])
def test_the_global_generator_is_left_alone(procedure):
    clients = clients_of(procedure=procedure)
    before = torch.get_rng_state()
    clients.update(*batch(), number=0)
    clients.played(*batch(), number=0)
    clients.view()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generators_of_other_devices_are_left_alone(monkeypatch):
    """`torch.manual_seed` seeds those too, and nobody puts them back."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every device"))
    clients_of(procedure=trains).update(*batch(), number=0)


def test_loops_repeat_by_client_and_seed():
    found = clients_of(procedure=trains).update(*batch(), number=1)
    assert same(found, clients_of(procedure=trains).update(*batch(), number=1))
    assert not same(found, clients_of(procedure=trains).update(*batch(), number=2))
    assert not same(found, clients_of(procedure=trains, seed=1).update(*batch(), number=1))


def shifts(network, x, y):
    """What augmentations of other libraries draw from."""
    trains(network, x + random.random() + float(np.random.rand()), y)  # noqa: NPY002


def test_what_a_loop_draws_elsewhere_repeats_too():
    found = clients_of(procedure=shifts).update(*batch(), number=1)
    for elsewhere in (random.random, np.random.rand):
        elsewhere()
        assert same(found, clients_of(procedure=shifts).update(*batch(), number=1))
    before = random.getstate(), repr(np.random.get_state(legacy=False))  # noqa: NPY002
    assert not same(found, clients_of(procedure=shifts).update(*batch(), number=2))
    assert (random.getstate(), repr(np.random.get_state(legacy=False))) == before  # noqa: NPY002


def raises(network, x, y):
    raise KeyError("no such\x1b[31m thing")


def exits(network, x, y):
    sys.exit(0)


def refuses(network, x, y):
    raise ConfigError("an error of fedkl's own")


def trains_nothing(network, x, y):
    network(x)  # train mode: buffers change


def trains_a_copy(network, x, y):
    other = mlp()
    other.load_state_dict(network.state_dict())
    trains(other, x, y)


def replaces_a_layer(network, x, y):
    network[1] = nn.Sequential(network[1])
    trains(network, x, y)


def parametrizes(network, x, y):
    torch.nn.utils.parametrizations.weight_norm(network[1])
    trains(network, x, y)


def widens(network, x, y):
    trains(network, x, y)
    network[1] = nn.Linear(64, 33)


@pytest.mark.parametrize("seen", ["update", "played"])
@pytest.mark.parametrize(
    ("procedure", "error", "message"),
    [
        (raises, TrainingError, r"subject: the function that trains raised KeyError \(.*\) on 8 images.*"
         r"procedure\(network, inputs, labels\), on the CPU"),
        (exits, TrainingError, r"subject: the function that trains raised SystemExit \(0\) on 8 images"),
        (refuses, ConfigError, "^an error of fedkl's own$"),
        (trains_nothing, TrainingError, "subject: .* changed no weight .* in place, not a copy"),
        (trains_a_copy, TrainingError, "subject: .* changed no weight .* in place, not a copy"),
        (replaces_a_layer, TrainingError, r"subject: .* left no '1.weight' of shape \(32, 64\) in .* undo"),
        (parametrizes, TrainingError, r"left no '1.weight' of shape \(32, 64\) .* parametrizations and pru"),
        (widens, TrainingError, r"left no '1.weight' of shape \(32, 64\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_loops_that_do_not_train_are_refused(procedure, error, message, seen):
    clients = clients_of(mlp, procedure=procedure)
    before = torch.get_rng_state()
    with pytest.raises(error, match=message) as caught:
        getattr(clients, seen)(*batch(), number=0)
    assert "\x1b" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loop_that_changes_buffers_only_trains_nothing():
    with pytest.raises(TrainingError, match="changed no weight"):
        clients_of(convnet, procedure=trains_nothing).update(*batch(), number=0)


PRIVATE = replace(EPOCH, per_example=PerExample(clip=1.0, noise_multiplier=0.1))
KINDS = ["gradient", "epoch", "per example", "loop"]


@pytest.mark.parametrize("procedure", [Procedure(), EPOCH, PRIVATE, trains], ids=KINDS)
def test_a_network_whose_train_returns_nothing(procedure):
    """What it does in it is done."""
    clients = clients_of(Silent, procedure=procedure)
    before = copy.deepcopy(clients.network.state_dict())
    for update in (clients.update(*batch(), number=0), clients.played(*batch(), number=0)):
        assert all(tensor.isfinite().all() for tensor in update.values())
        assert update["0.weight"].any()
    assert same(before, clients.network.state_dict())


def trains_one(network, x, y):
    with torch.no_grad():
        network[3].bias.add_(0.5)


def test_a_loop_may_train_one_layer():
    found = clients_of(mlp, procedure=trains_one).update(*batch(), number=0)
    torch.testing.assert_close(found["3.bias"], torch.full((CLASSES,), -0.5))
    assert found["1.weight"].abs().max() == 0


@pytest.mark.parametrize("defense", [None, GaussianNoise(deviation=0.1), KeyLock(activation="identity")])
@pytest.mark.parametrize("procedure", [*PROCEDURES.values(), trains], ids=[*PROCEDURES, "loop"])
def test_frozen_layers_are_in_no_update(procedure, defense):
    clients = clients_of(transferred, procedure=procedure, defense=defense)
    learned = {f"{layer}.{kind}" for layer in (3, 4, 7) for kind in ("weight", "bias")}
    found = clients.update(*batch(), number=0)
    assert set(found) <= learned
    assert {"7.weight", "7.bias"} <= set(found)
    assert set(clients.played(*batch(), number=0)) == set(found)


def trains_with_norm(network, x, y):
    """As `trains`, but a frozen layer is unfrozen: what was frozen before says too little."""
    network[1].requires_grad_(True)
    trains(network, x, y)


@pytest.mark.parametrize(
    ("procedure", "unfrozen"),
    [(EPOCH, set()), (trains, set()), (trains_with_norm, {"1.weight", "1.bias"})],
    ids=["epoch", "loop", "unfreezing"],
)
def test_a_defense_does_not_count_frozen_layers(procedure, unfrozen, monkeypatch):
    """A filter that keeps a share of all entries would keep more of those that matter: another defense."""
    counted, changed = [], Pruning.changed

    def counts(self, change, **others):
        counted.append(set(change))
        return changed(self, change, **others)

    monkeypatch.setattr(Pruning, "changed", counts)
    clients = clients_of(transferred, procedure=procedure, defense=Pruning(keep=0.5))
    split = clients.defense.prepare(clients.network)
    frozen = split.frozen_parameters()
    assert {"0.weight", "1.weight"} <= frozen
    clients.update(*batch(), number=0)
    clients.played(*batch(), number=0)
    real, played = counted
    assert real & split.public_parameters().keys() == split.trained_parameters().keys() | unfrozen
    assert played & split.public_parameters().keys() == real & split.public_parameters().keys()


class Tied(nn.Module):
    """One weight under two names, and a frozen one too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, CLASSES), nn.Linear(64, CLASSES)
        self.second.weight = self.first.weight
        self.still, self.stiller = nn.Linear(64, CLASSES), nn.Linear(64, CLASSES, bias=False)
        self.stiller.weight = self.still.weight
        self.still.requires_grad_(False)

    def forward(self, x):
        return sum(layer(x.flatten(1)) for layer in self.children())


@pytest.mark.parametrize("procedure", [*PROCEDURES.values(), trains], ids=[*PROCEDURES, "loop"])
def test_a_defense_counts_tied_weights_once(procedure, monkeypatch):
    counted, changed = [], Pruning.changed

    def counts(self, change, **others):
        counted.append(set(change))
        return changed(self, change, **others)

    monkeypatch.setattr(Pruning, "changed", counts)
    clients = clients_of(Tied, procedure=procedure, defense=Pruning(keep=0.5))
    clients.update(*batch(), number=0)
    clients.played(*batch(), number=0)
    assert counted == [{"first.weight", "first.bias", "second.bias"}] * 2


@pytest.mark.parametrize("procedure", [*PROCEDURES.values(), trains], ids=[*PROCEDURES, "loop"])
def test_complex_weights_that_a_defense_would_not_change_are_refused(procedure):
    def build():
        network = mlp()
        network.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        return network

    assert clients_of(build, procedure=procedure)
    with pytest.raises(ConfigError, match=r"(?s)GaussianNoise: .*'phase' is torch\.complex64"):
        clients_of(build, procedure=procedure, defense=GaussianNoise(deviation=0.1))


def test_what_a_loop_unfreezes_is_in_the_update():
    def unfreezes(network, x, y):
        network[0].requires_grad_(True)
        trains(network, x, y)

    found = clients_of(transferred, procedure=unfreezes).update(*batch(), number=0)
    assert "0.weight" in found
    assert "1.weight" not in found


@pytest.mark.parametrize(
    "procedure", [Procedure(), EPOCH, partial(loop, seed=5)], ids=["gradient", "epoch", "loop"]
)
def test_several_clients_are_seen_as_their_mean(procedure):
    alone, three = clients_of(procedure=procedure), clients_of(procedure=procedure, clients=3)
    x, y = batch(3 * SIZE)
    parts = [alone.update(*part, number=0) for part in zip(x.split(SIZE), y.split(SIZE), strict=True)]
    for found in (three.update(x, y, number=0), three.played(x, y, number=0)):
        for name, tensor in found.items():
            wanted = torch.stack([part[name] for part in parts]).mean(0)
            torch.testing.assert_close(tensor, wanted, atol=1e-6, rtol=1e-4)


def test_clients_of_a_cohort_draw_what_is_their_own():
    three = clients_of(procedure=trains, clients=3)
    x, y = images()[:SIZE], labels(SIZE)
    repeated = three.update(torch.cat([x] * 3), torch.cat([y] * 3), number=0)
    alone = clients_of(procedure=trains).update(x, y, number=0)
    assert not torch.allclose(repeated["0.weight"], alone["0.weight"], rtol=1e-4)  # they shuffle differently


@pytest.mark.parametrize("procedure", [Procedure(), EPOCH, trains], ids=["gradient", "epoch", "loop"])
def test_no_update_has_private_tensors_of_a_lock(procedure):
    clients = clients_of(defense=KeyLock(), procedure=procedure)
    split = clients.defense.prepare(clients.network)
    private = set(split.private_parameters())
    assert private
    for seen in (clients.update, clients.played):
        found = set(seen(*batch(), number=0))
        assert found == set(split.public_parameters())
        assert not found & private
        assert not any(name.startswith("1.") for name in found)  # the norm that is locked


@pytest.mark.parametrize("procedure", [Procedure(), EPOCH, trains], ids=["gradient", "epoch", "loop"])
def test_played_clients_draw_from_the_attacker(procedure):
    """The same from the seed, whatever secrets real clients have; and each with others."""
    locked = partial(clients_of, defense=KeyLock(), procedure=procedure, trained=False)
    clients = locked()
    one = clients.played(*batch(), number=0)
    assert alike(one, clients.played(*batch(), number=0))
    assert not alike(one, clients.played(*batch(), number=1))
    assert not alike(one, locked(seed=1).played(*batch(), number=0))


@pytest.mark.parametrize("procedure", [EPOCH, trains], ids=["epoch", "loop"])
def test_real_clients_draw_their_secrets_from_the_operating_system(procedure):
    clients = clients_of(defense=KeyLock(), procedure=procedure, trained=False)
    found = [clients.update(*batch(), number=0) for _ in range(2)]
    assert not alike(*found)


@pytest.mark.parametrize("procedure", [EPOCH, trains], ids=["epoch", "loop"])
def test_masks_cover_what_is_sent(procedure):
    clients = clients_of(defense=MaskedUpload(), procedure=procedure)
    sent, again = (clients.update(*batch(), number=0) for _ in range(2))
    opened = clients.open().update(*batch(), number=0)
    assert (clients.hides, clients.open().hides) == (True, False)
    assert sent.keys() == opened.keys()
    lr = 1.0 if procedure is trains else procedure.lr
    for name in trained(convnet):
        if name in sent:  # (before - after) / lr, of an `after` that is random numbers away
            one, other, plain = (lr * each[name] for each in (sent, again, opened))
            assert max(one.abs().max(), other.abs().max()) <= 0.0101
            assert not torch.allclose(one, other, atol=1e-4)
            assert not torch.allclose(one, plain, atol=1e-4)
    played = clients.played(*batch(), number=0)
    assert not alike(played, opened)


def test_an_untrained_network_is_what_its_owner_builds():
    clients = clients_of(trained=False)
    built = clients.subject.build(trained=False)
    assert same(dict(clients.network.state_dict()), dict(built.state_dict()))
    assert not same(dict(clients.network.state_dict()), dict(trained(convnet)))


def test_augmentation_is_a_clients_own():
    audited = subject(mlp, procedure=Procedure(augmentation="flip"))
    exposure = Exposure(name="your-client", title="a client", headline=True, images=SIZE, steps=1)
    clients = Clients.of(audited, exposure=exposure, procedure=audited.procedure, defense=NoDefense(), seed=0)
    wanted = local_update(
        clients.network, *batch(), train_mode=True, local=audited.procedure,
        generator=rng.generator(0, "audited-augmentation", "7-0"),
    )  # fmt: skip
    assert same(clients.update(*batch(), number=7), wanted)
    assert not same(clients.update(*batch(), number=8), wanted)


def test_networks_are_classifiers_only_where_fedkl_trains():
    own, theirs = clients_of(procedure=trains), clients_of(procedure=EPOCH)
    assert isinstance(own.network, nn.Module)
    assert len(own.network._forward_hooks) == 0
    assert len(theirs.network._forward_hooks) == 1


@pytest.mark.parametrize("name", [name for name in DEFENSES.names() if name != "public-norm"])
def test_the_server_knows_the_defense_and_no_secrets(name):
    clients = clients_of(defense=DEFENSES[name](), trained=False)
    for guess in clients.guesses:
        assert guess.knowledge == Knowledge()
        assert not guess.open or not clients.hides
        assert guess.defense == clients.defense
    assert clients.arm == clients.guesses[0]


def test_played_clients_augment_each_in_its_own_way():
    audited = subject(mlp, procedure=Procedure(augmentation="flip", algorithm="fedavg", batch_size=8))
    exposure = Exposure(name="your-client", title="a client", headline=True, images=SIZE, steps=1)
    clients = Clients.of(audited, exposure=exposure, procedure=audited.procedure, defense=NoDefense(), seed=0)
    one = clients.played(*batch(), number=0)
    assert same(one, clients.played(*batch(), number=0))
    assert not alike(one, clients.played(*batch(), number=1))


def test_the_control_of_clients_that_train_privately_trains_as_the_owner_does():
    """Nothing is hidden there: no image is clipped, and there is no noise."""
    clients = clients_of(mlp, defense=DPSGD(clip=1e-3, noise_multiplier=1.0), norm_mode="eval")
    plain = clients_of(mlp, norm_mode="eval").update(*batch(), number=0)
    opened = clients.open()
    assert opened.procedure.per_example is None
    assert alike(opened.update(*batch(), number=0), plain)
    for found in (clients.update(*batch(), number=0), clients.played(*batch(), number=0)):
        assert all(not torch.allclose(found[name], plain[name], rtol=0.1) for name in plain)
    silent = clients_of(mlp, defense=DPSGD(clip=1e-3, noise_multiplier=0.0), norm_mode="eval")
    for found in (silent.update(*batch(), number=0), silent.played(*batch(), number=0)):
        norms = torch.stack([tensor.norm() for tensor in found.values()])
        most = 2 * SIZE / EPOCH.batch_size * 1e-3  # two steps, of all images at most
        assert 0 < float(norms.norm()) <= most * 1.0001


def test_parts_that_change_no_training_are_taken_with_a_function_that_trains():
    looped = {"procedure": lambda network, x, y: trains(network, x, y)}
    clients = clients_of(mlp, defense=Combined(parts=(Pruning(), GaussianNoise())), **looped)
    assert all(tensor.isfinite().all() for tensor in clients.update(*batch(), number=0).values())
    with pytest.raises(ConfigError, match="changes how clients train"):
        clients_of(mlp, defense=Combined(parts=(DPSGD(), GaussianNoise())), **looped)


@pytest.mark.parametrize("procedure", [EPOCH, trains], ids=["epoch", "loop"])
@pytest.mark.parametrize("defense", [KeyLock(), PUBLISHED_LOCK], ids=["default", "published"])
def test_the_control_of_a_lock_is_its_own_network(defense, procedure):
    """With the norms that it makes, known to the server: they, and no secret, may be what stops an attack."""
    clients = clients_of(mlp, defense=defense, procedure=procedure, trained=False)
    opened = clients.open()
    assert (clients.hides, opened.hides, opened.defense) == (True, False, NoDefense())
    own, theirs = (len([*each.network.parameters()]) for each in (clients, opened))
    assert theirs == own + 2  # γ and β
    assert len(opened.update(*batch(), number=0)) == theirs
    assert len(clients.update(*batch(), number=0)) == own
    assert not is_private(opened.network)
    masked = clients_of(mlp, defense=MaskedUpload(), procedure=procedure)
    assert masked.open().network is masked.network
