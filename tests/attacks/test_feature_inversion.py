from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkl.attacking import attack_arms, observe, trials_of
from fedkl.attacks import FeatureInversion, Knowledge, Procedure
from fedkl.attacks.algebraic.convolution import reads_of
from fedkl.attacks.algebraic.feature_inversion import _agreeing, _World
from fedkl.attacks.algebraic.features import read_features, readable_convolutions
from fedkl.attacks.algebraic.structure import read_structure
from fedkl.attacks.algebraic.subspace import blind_inputs
from fedkl.defenses import Arm, KeyLock, NoDefense
from fedkl.errors import AttackError, ConfigError

QUICK = FeatureInversion(simulations=800, components=200, iterations=100)
PUBLISHED = KeyLock(key_distribution="uniform", activation="relu")


class Residual(nn.Module):
    """ReLU, shortcuts and norms: nothing that the closed form could go through."""

    def __init__(self, activation=F.relu, width=16):
        super().__init__()
        self.activation = activation
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv4, self.bn4 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        y = self.activation(self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x))))))
        for conv, norm in ((self.conv3, self.bn3), (self.conv4, self.bn4)):
            y = self.activation(norm(conv(y)) + y)
        return self.fc(y.mean((2, 3)))


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return Residual()


def inputs_of(victim, trial, names, *, train=True):
    noted = {}
    for name in names:
        module = victim.model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: noted.update({name: args[0][0].detach()}))
    victim.model.train(train)(trial.images)
    return noted


@pytest.mark.parametrize("defense", [NoDefense(), KeyLock(), PUBLISHED, KeyLock(layers="all")])
def test_a_gradient_tells_what_a_convolution_got(observed, residual, defense):
    seen, victim, trial = observed(defense, model=residual)
    assert [one.name for one in readable_convolutions(seen)] == ["conv3", "conv4"]
    found = read_features(seen, most=2)
    for name, truth in inputs_of(victim, trial, found).items():
        assert float(F.cosine_similarity(found[name][0], truth.flatten(), dim=0)) > 1 - 1e-6


def test_so_it_does_in_eval_mode(images, residual):
    (trial,) = trials_of(images, trials=1)
    arm = Arm(name="seen", description="", defense=NoDefense(), knowledge=Knowledge(labels=False))
    victim = arm.defense.prepare(residual)
    seen = observe(victim, arm=arm, model=residual, trial=trial, classes=10, train_mode=False)
    (found,) = read_features(seen, most=1)["conv3"]
    truth = inputs_of(victim, trial, ["conv3"], train=False)["conv3"]
    assert float(F.cosine_similarity(found, truth.flatten(), dim=0)) > 1 - 1e-6


def test_too_little_rank_is_not_taken_for_an_answer(observed, residual):
    pair, _, _ = observed(model=residual, batch_size=2)  # two images have twice as many patches
    assert not read_features(pair, most=2)
    seen, _, _ = observed(model=residual)
    one = readable_convolutions(seen)[0]
    gradient = seen.gradient["conv3.weight"].double().flatten(2)
    dead = gradient * (torch.arange(16) < 8)[:, None, None]
    assert blind_inputs(dead, reads=one.reads, places=one.places) is None
    noise = blind_inputs(torch.randn(16, 16, 9).double(), reads=one.reads, places=one.places)
    assert noise.gap > 0.1
    assert blind_inputs(0 * gradient, reads=one.reads, places=one.places) is None


def convolved(kernel=(3, 3), *, side=4, padding=(1, 1), dilation=(1, 1), outputs=64, inputs=16):
    """A float32 gradient of random factors, with the input and which places it reads."""
    generator = torch.Generator().manual_seed(0)
    places = side * side
    reads = reads_of(kernel, places=(side, side), stride=(1, 1), padding=padding, dilation=dilation)
    reads = torch.where(reads < 0, places, reads)
    h = torch.randn(inputs, places, generator=generator).relu()
    patches = torch.cat([h, torch.zeros(inputs, 1)], 1)[:, reads]
    slopes = torch.randn(outputs, reads.shape[1], generator=generator)
    return torch.einsum("op,ikp->oik", slopes, patches).double(), h, {"reads": reads, "places": places}


@pytest.mark.parametrize(
    "shape",
    [{}, {"side": 6, "padding": (0, 1)}, {"side": 13, "outputs": 169, "inputs": 40}],
    ids=["padded", "padded on two sides", "needs more channels"],
)
def test_inputs_from_gradients_of_random_factors(shape):
    gradient, h, where = convolved(**shape)
    found = blind_inputs(gradient, **where)
    assert found.gap < 1e-6
    assert float((found.inputs * h).sum() / h.norm()) > 1 - 1e-6


PLACES = 16
READS = reads_of((3, 3), places=(4, 4), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
READS = torch.where(READS < 0, PLACES, READS)


def of_a_batch(images, *, activation=torch.relu, shift=0.0):
    """A float32 gradient behind a norm with statistics of the batch, and the inputs."""
    generator = torch.Generator().manual_seed(1)
    h = activation(torch.randn(images, 32, PLACES, generator=generator) + shift)
    patches = torch.cat([torch.cat([one, torch.zeros(32, 1)], 1)[:, READS] for one in h], 2)
    slopes = torch.randn(images * PLACES + 8, images * PLACES, generator=generator)
    slopes -= slopes.mean(1, keepdim=True)
    return torch.einsum("op,ikp->oik", slopes, patches).double(), F.normalize(h.flatten(1), dim=1)


@pytest.mark.parametrize("images", [2, 8, 12])
def test_inputs_of_a_batch_are_told_apart(images):
    gradient, h = of_a_batch(images)
    found = blind_inputs(gradient, reads=READS, places=PLACES, images=images)
    assert found.gap < 1e-6
    alike = found.inputs.flatten(1).float() @ h.T
    assert sorted(alike.argmax(1).tolist()) == list(range(images))
    assert float(alike.amax(1).min()) > 1 - 1e-5


@pytest.mark.parametrize("changes", [{"activation": torch.tanh}, {"shift": 3.0}], ids=["signs", "no zeros"])
def test_inputs_that_are_not_told_apart(changes):
    gradient, _ = of_a_batch(4, **changes)
    assert blind_inputs(gradient, reads=READS, places=PLACES, images=4) is None


@pytest.mark.parametrize(
    "shape", [{"kernel": (1, 3), "padding": (0, 1)}, {"dilation": (2, 2), "padding": (2, 2)}]
)
def test_several_solutions_are_none(shape):
    gradient, h, where = convolved(**shape)
    found = blind_inputs(gradient, **where)
    assert float((found.inputs * h).sum() / h.norm()) < 0.9
    assert found.gap == 1


@pytest.mark.parametrize(
    "shape", [{"side": 6, "padding": (0, 0)}, {"inputs": 2}, {"side": 40, "outputs": 1600, "inputs": 1}]
)
def test_shapes_that_cannot_be_read(shape):
    gradient, _, where = convolved(**shape)
    assert blind_inputs(gradient, **where) is None


def run(images, model, arm, *, attack=QUICK, trials=4, batch_size=1):
    found = []
    attack_arms(
        [arm],
        attack=attack,
        build=lambda _: model,
        dataset=images,
        trials=trials_of(images, trials=trials, batch_size=batch_size),
        seed=0,
        on_result=found.append,
    )
    return found


@pytest.mark.parametrize("defense", [NoDefense(), KeyLock(), PUBLISHED])
def test_identifies_images_behind_relus_shortcuts_and_locks(images, residual, defense):
    arm = Arm(name="seen", description="", defense=defense, knowledge=Knowledge(labels=False, auxiliary=800))
    trials = 2 if defense is PUBLISHED else 4  # a regression for each
    found = run(images, residual, arm, trials=trials)
    assert sum(score.identified for one in found for score in one.scores) == trials
    start = run(images, residual, arm, attack=replace(QUICK, iterations=0), trials=trials)
    before, after = (sum(one.reconstruction.loss for one in each) for each in (start, found))
    assert after < before  # the descent is worth something


def test_one_bad_update_does_not_stop_the_others(images, residual, observed):
    seen, _, _ = observed(model=residual, auxiliary=0)
    own = _own(images, residual)
    noise = {name: torch.randn_like(tensor) for name, tensor in seen.gradient.items()}
    both = [replace(seen, auxiliary=own, gradient=noise), replace(seen, auxiliary=own)]
    bad, good = QUICK.reconstruct_many(both, generators=[torch.Generator()] * 2)
    assert not bad.images.isfinite().any()
    assert bad.loss == float("inf")
    assert good.images.isfinite().all()


@pytest.mark.parametrize("defense", [NoDefense(), KeyLock()])
def test_identifies_the_images_of_batches(images, defense):
    torch.manual_seed(0)
    arm = Arm(name="seen", description="", defense=defense, knowledge=Knowledge(labels=False, auxiliary=800))
    found = run(images, Residual(width=64), arm, trials=2, batch_size=3)
    assert sum(score.identified for one in found for score in one.scores) >= 5
    assert all(score.label_correct is None for one in found for score in one.scores)


def test_a_sign_that_is_not_known(images):
    torch.manual_seed(0)
    model = Residual(torch.tanh)
    arm = Arm(
        name="seen", description="", defense=NoDefense(), knowledge=Knowledge(labels=False, auxiliary=800)
    )
    found = run(images, model, arm, trials=10)
    assert sum(score.identified for one in found for score in one.scores) == 10


def test_dropout_behind_the_features(images, residual):
    residual.fc = nn.Sequential(nn.Dropout(0.5), residual.fc)
    arm = Arm(
        name="seen", description="", defense=NoDefense(), knowledge=Knowledge(labels=False, auxiliary=800)
    )
    (found,) = run(images, residual, arm, trials=1)
    assert found.scores[0].identified


def test_simulations_are_checked_on_images_of_their_own(images, residual):
    own = _own(images, residual)
    world = _World.of(own, replace(QUICK, simulations=450), batch=1)
    fitted, probes = (
        set(map(bytes, part.numpy())) for part in world.examples.split([world.fitted, 450 - world.fitted])
    )
    assert (len(fitted), len(probes)) == (170, 30)
    assert not fitted & probes


def test_only_a_gamma_that_can_be_zero_is_taken_for_it(images, observed, residual):
    model = copy.deepcopy(residual)
    with torch.no_grad():
        model.bn1.bias[0] = -20.0  # the ReLU behind cuts the channel off
    seen = observed(model=model)[0]
    assert not read_structure(seen).support["bn1.weight"].all()
    world = _World.of(_own(images, residual), replace(QUICK, simulations=200), batch=1)
    ones = replace(world, secrets={"bn1.weight": torch.ones(50, 8)})
    assert not ones.supports(seen)
    zeros = replace(world, secrets={"bn1.weight": torch.zeros(50, 8)})
    assert set(zeros.supports(seen)) == {"bn1.weight"}


def test_drawn_channels_are_dead_where_the_clients_are():
    drawn = torch.relu(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    live = torch.tensor([True, False] * 4)
    agreed = _agreeing(drawn, live, torch.Generator().manual_seed(0))
    assert torch.equal(agreed > 0, live.expand(50, 8))
    kept = live & (drawn > 0)
    assert torch.equal(agreed[kept], drawn[kept])


def test_what_it_cannot_read_it_refuses(images, observed, residual, small):
    seen = replace(observed(model=residual)[0], auxiliary=_own(images, residual))
    plain = replace(observed(model=small())[0], auxiliary=seen.auxiliary)
    cases = {
        "of all 2 images": replace(observed(model=residual, batch_size=2)[0], auxiliary=seen.auxiliary),
        "3 steps": replace(seen, local=Procedure(steps=3)),
        "at least 100 auxiliary images": replace(seen, auxiliary=None),
        "clients that the server can imitate": replace(seen, auxiliary=replace(seen.auxiliary, draw=None)),
        "none to be free": replace(seen, free=("bn1.weight",)),
        "got none whose gradient is observed": plain,
    }
    for message, observation in cases.items():
        with pytest.raises(AttackError, match=message):
            QUICK.reconstruct(observation, generator=torch.Generator())
    with pytest.raises(
        ConfigError, match=r"layers ≥ 1, got 0; simulations ≥ 100, got 5; a finite lr > 0, got 0.0"
    ):
        FeatureInversion(layers=0, lr=0.0, simulations=5)


def _own(images, model):
    """The server's own data, as the audit gives them."""
    kept = []

    class Keeping(FeatureInversion):
        def _run(self, observations, generators, on_evaluation):
            kept.extend(observations)
            return super()._run(observations, generators, on_evaluation)

    arm = Arm(name="a", description="", defense=NoDefense(), knowledge=Knowledge(labels=False, auxiliary=200))
    quick = Keeping(simulations=200, components=10, iterations=0)
    run(images, model, arm, attack=quick, trials=1)
    return kept[0].auxiliary
