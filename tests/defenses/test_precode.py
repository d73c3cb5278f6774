"""PRECODE: what the bottleneck does where, and that a server which knows it reads its noise off it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fedkl import data
from fedkl.attacking import SimulatedClients
from fedkl.attacking.gradients import full_gradient
from fedkl.attacking.observing import observe, trials_of
from fedkl.attacks import DLG, LinearRows
from fedkl.defenses import KeyLock, own_arms
from fedkl.defenses.combined import Combined
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.precode import PRECODE, with_bottleneck
from fedkl.errors import ConfigError
from fedkl.federated import FederatedTraining, Federation, LocalTraining
from fedkl.federated.pool import draws_random_numbers
from fedkl.protocol import Procedure
from tests.defenses.attacked import errors, seen

FEATURES = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([1, 0, 3, 2])


def net(size=5, beta=1e-3):
    torch.manual_seed(0)
    return with_bottleneck(nn.Sequential(nn.Tanh(), nn.Linear(12, 10)), size=size, beta=beta)


def test_names_and_values_of_the_model_stay_and_everything_is_public():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Tanh(), nn.Linear(12, 10))
    split = PRECODE(size=5).prepare(plain)
    state = split.public_state()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    added = {
        name.removeprefix("1.bottleneck."): tuple(state[name].shape)
        for name in state
        if name not in plain.state_dict()
    }
    assert added == {
        "encoder.weight": (10, 12),
        "encoder.bias": (10,),
        "decoder.weight": (12, 5),
        "decoder.bias": (12,),
    }
    assert not split.private_names
    again = PRECODE(size=5).prepare(plain).public_state()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert len(list(plain.modules())) == 3  # not changed


def test_clients_draw_and_evaluations_do_not():
    network = net()
    for mode in (True, False):
        network.train(mode)
        assert not torch.equal(network(FEATURES), network(FEATURES))
    assert draws_random_numbers(network, FEATURES)
    with torch.no_grad():
        network.eval()
        assert torch.equal(network(FEATURES), network(FEATURES))
        head, hidden = network[1], FEATURES.tanh()
        mean = head.bottleneck.encoder(hidden)[:, :5]
        expected = F.linear(head.bottleneck.decoder(mean), head.weight, head.bias)
        assert torch.allclose(network(FEATURES), expected, atol=1e-6)


def written_out(network, noise, beta):
    """The loss with its KL term, as the paper has it."""
    head = network[1]
    mean, raw = head.bottleneck.encoder(FEATURES.tanh()).chunk(2, 1)
    deviation = F.softplus(raw)
    z = mean + deviation * noise
    logits = F.linear(head.bottleneck.decoder(z), head.weight, head.bias)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, deviation), normal(0.0, 1.0)).sum(1).mean()
    return F.cross_entropy(logits, LABELS) + beta * kl / math.log(2)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_gradient_is_that_of_the_loss_with_the_kl_term(beta):
    network = net(beta=beta)
    torch.manual_seed(3)
    found = full_gradient(network, FEATURES, LABELS)
    torch.manual_seed(3)
    loss = written_out(network, torch.randn(4, 5), beta)
    expected = torch.autograd.grad(loss, list(network.parameters()))
    for tensor, (name, _) in zip(expected, network.named_parameters(), strict=True):
        assert torch.allclose(found[name], tensor, atol=1e-6), name


def test_stacked_clients_draw_noise_of_their_own():
    network, parameters = net(), dict(net().named_parameters())

    def loss(parameters, x):
        return F.cross_entropy(functional_call(network, parameters, (x,)), LABELS)

    stacked = vmap(grad(loss), in_dims=(None, 0), randomness="different")(
        parameters, FEATURES.expand(3, 4, 12)
    )
    each = stacked["1.bottleneck.decoder.weight"]
    assert not torch.allclose(each[0], each[1])
    assert not torch.allclose(each[1], each[2])


def test_the_noise_of_one_image_is_read_off_the_update():
    network, defense = net(), PRECODE(size=5)
    torch.manual_seed(3)
    gradient = full_gradient(network, FEATURES[:1], LABELS[:1])
    torch.manual_seed(3)
    noise = torch.randn(1, 5)
    read = defense.informed(net(), gradient)
    assert torch.allclose(read[1].bottleneck.noise, noise[0], atol=1e-4)
    repeated = full_gradient(read, FEATURES[:1], LABELS[:1])
    assert all(torch.allclose(repeated[name], gradient[name], atol=1e-5) for name in gradient)
    for hidden in ({}, full_gradient(network, FEATURES[:2], LABELS[:2])):
        assert defense.informed(net(), hidden)[1].bottleneck.noise is None


def test_the_noise_is_read_through_the_rounding_of_weights():
    """Of a step so small that a thousandth of what it changes is lost in their digits."""
    parameters, lr = dict(net().named_parameters()), 3e-5
    gradient = full_gradient(net(), FEATURES[:1], LABELS[:1])
    seen = {name: (p - (p - lr * gradient[name])).detach() / lr for name, p in parameters.items()}
    off = torch.dist(*(each["1.bottleneck.encoder.weight"] for each in (seen, gradient)))
    assert float(off) > 1e-3 * float(gradient["1.bottleneck.encoder.weight"].norm())
    exact, rounded = (PRECODE(size=5).informed(net(), each)[1].bottleneck.noise for each in (gradient, seen))
    assert torch.allclose(rounded, exact, atol=0.1)


def test_the_noise_is_read_off_weights_that_decay(images):
    """What decay takes from a weight, which has nothing to do with the image, is put back first."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    local = Procedure(algorithm="fedavg", steps=1, lr=0.05, weight_decay=0.05)
    defense, (trial,) = PRECODE(size=8), trials_of(images, trials=1)
    arm, victim = own_arms(defense)["precode"], defense.prepare(network)
    found = observe(victim, arm=arm, model=network, trial=trial, classes=10, local=local)
    repeated = full_gradient(copy.deepcopy(found.model), trial.images, trial.labels)
    for name, tensor in found.as_gradient().gradient.items():
        assert torch.allclose(repeated[name], tensor, rtol=1e-2, atol=1e-4), name


def test_it_changes_the_network_and_hides_nothing():
    defense = PRECODE()
    assert (defense.keeps_tensors, defense.changes_network, defense.changes_updates) == (False, True, False)
    with pytest.raises(ConfigError, match=r"at most one that keeps tensors or changes.*precode, keylock"):
        Combined(parts=(defense, KeyLock()))


def test_a_combination_is_attacked_as_the_part_that_changes_the_network(images):
    """The noise is read where the others leave the update so, and left out where they do not."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    trials = trials_of(images, trials=1)

    def noise(deviation, name):
        parts = (PRECODE(size=8), GaussianNoise(deviation=deviation))
        ((observation,),) = [
            each for arm, each in seen(Combined(parts=parts), network, trials).items() if arm == name
        ]
        return observation.model[1].bottleneck.noise

    assert noise(1e-7, "combined-precode").count_nonzero() == 8
    assert noise(10.0, "combined-precode").count_nonzero() == 0
    assert noise(1e-7, "combined-precode-naive") is None


@pytest.fixture(scope="module")
def images():
    return data.load("mnist-sample")


def test_a_server_that_reads_the_noise_beats_one_that_draws_its_own(images):
    pooled = F.avg_pool2d(images.test_images[:4].mean(1, keepdim=True), 2)[:, :, 1:15, 1:15]
    trials = [
        replace(trial, images=image[None])
        for trial, image in zip(trials_of(images, trials=4), pooled, strict=True)
    ]
    torch.manual_seed(0)
    body = nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten()
    network = nn.Sequential(*body, nn.Linear(8 * 49, 10))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-0.5, 0.5)
    by_arm = seen(PRECODE(size=16), network, trials)
    attack = DLG(evaluations=120)
    found = {name: errors(attack, observations, trials) for name, observations in by_arm.items()}
    assert set(found) == {"no-norm", "precode", "precode-naive"}
    assert bool((found["precode"] < 0.01 * found["precode-naive"]).all()), found


def test_rows_of_the_first_layer_are_read_as_ever(images):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
    trials = trials_of(images, trials=4)
    by_arm = seen(PRECODE(), mlp, trials)
    for name in ("precode", "precode-naive"):
        assert float(errors(LinearRows(), by_arm[name], trials).max()) < 1e-8


def test_clients_that_the_server_plays_draw_too(images):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    batch = images.test_images[:3][:, None], images.test_labels[:3][:, None]
    for procedure in (Procedure(), Procedure(algorithm="fedavg", steps=2)):
        defense = PRECODE(size=8)
        arm = own_arms(defense)["precode"]
        clients = SimulatedClients.of(arm, defense.prepare(network), network, local=procedure)
        once, again = clients(*batch), clients(*batch)
        assert not torch.equal(once["1.weight"], again["1.weight"])
        assert all(tensor.isfinite().all() for tensor in once.values())


@pytest.mark.parametrize("procedure", [Procedure(), Procedure(algorithm="fedavg", steps=2)])
def test_what_played_clients_draw_repeats(images, procedure):
    """From the attacker's seed, anew in every call, and without a trace in the global generator."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    batch = images.test_images[:3][:, None], images.test_labels[:3][:, None]
    defense = PRECODE(size=8)

    def played(seed):
        clients = SimulatedClients.of(
            own_arms(defense)["precode"],
            defense.prepare(network),
            network,
            local=procedure,
            generator=torch.Generator().manual_seed(seed),
        )
        return [clients(*batch)["1.weight"] for _ in range(2)]

    state = torch.get_rng_state()
    (first, second), again, (other, _) = played(0), played(0), played(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_training_goes_on(images):
    part = ("train_images", "train_labels", "test_images", "test_labels")
    few = replace(images, **{name: getattr(images, name)[:400] for name in part})
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))

    def trained():
        training = FederatedTraining(clients=2, rounds=8, local=LocalTraining(lr=0.05))
        federation = Federation(network, defense=PRECODE(size=32), dataset=few, training=training, seed=0)
        assert federation.workers == 1  # the noise comes from one generator
        accuracy = [each.accuracy for each in federation.run()]
        return accuracy, federation.server.state

    accuracy, state = trained()
    assert accuracy[-1] > 0.5, accuracy
    again, repeated = trained()
    assert again == accuracy
    assert all(torch.equal(state[name], repeated[name]) for name in state)


def test_what_it_cannot_extend_is_refused():
    for model in (nn.Conv2d(3, 4, 3), net()):
        with pytest.raises(ConfigError, match="plain model with a linear layer"):
            with_bottleneck(model)
    for wrong in ({"size": 0}, {"beta": math.inf}, {"beta": -1.0}):
        with pytest.raises(ConfigError, match="size ≥ 1"):
            PRECODE(**wrong)
