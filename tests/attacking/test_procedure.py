"""One procedure: what federations train, what audits observe and what attacks differentiate are the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import nn

from fedkl import config as configs
from fedkl import data, models, rng
from fedkl.attacking import SimulatedClients, observe, trials_of
from fedkl.attacking.gradients import gradients
from fedkl.attacking.updates import difference, trained_tensors
from fedkl.attacks import DLG, InvertingGradients, Knowledge, Procedure
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.defenses import Arm, KeyLock, NoDefense, UpdateDefense, arms_of
from fedkl.errors import AttackError, ConfigError
from fedkl.federated import ConstantSchedule, FederatedTraining, Federation, LocalTraining
from fedkl.protocol.local_training import LocalTrainer
from tests.federated.setting import TwoNorms, one_update, seeded

IMAGES = 10
ONE_STEP = {"steps": 1}
FIVE_STEPS = {"steps": 5, "batch_size": 4}
MOMENTUM = {"epochs": 2, "batch_size": 4, "momentum": 0.9}
DECAY = {"steps": 4, "batch_size": 3, "weight_decay": 0.05, "lock_weight_decay": 0.2}
ALL = {**MOMENTUM, "weight_decay": 0.05, "proximal": 0.5}
DIFFERENTIABLE = [ONE_STEP, FIVE_STEPS, MOMENTUM, DECAY, ALL]


@pytest.fixture(scope="module")
def dataset():
    return data.load("mnist-sample")


def build():
    return models.build_model("lenet", channels=3, classes=10, seed=0, initialization="default")


def arm_of(name, **granted):
    arm = arms_of(KeyLock())[name]
    return replace(arm, knowledge=Knowledge(**granted)) if granted else arm


def seen(dataset, local, *, name="no-norm", images=IMAGES, model=None, **granted):
    (trial,) = trials_of(dataset, trials=1, batch_size=images)
    arm, model = arm_of(name, **granted), model or build()
    victim = arm.defense.prepare(model)
    return trial, observe(victim, arm=arm, model=model, trial=trial, classes=10, local=local)


@pytest.mark.parametrize("model", [build, lambda: seeded(TwoNorms)], ids=["lenet", "norms"])
@pytest.mark.parametrize("defense", [NoDefense(), KeyLock()], ids=lambda d: d.type)
@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 4, "momentum": 0.9, "weight_decay": 5e-4},
        {"batch_size": 64, "epochs": 3, "momentum": 0.9, "proximal": 0.1},
        {"steps": 2, "batch_size": 4, "lock_weight_decay": 0.1},
        {"batch_size": 4, "optimizer": "adam", "lr": 0.001},
        {"batch_size": 64, "precision": "bfloat16"},
    ],
    ids=["momentum", "epochs", "steps", "adam", "bfloat16"],
)
def test_an_audit_observes_what_training_sends_to_the_last_bit(dataset, model, defense, fields):
    """The federation's own worker, with its only client's images in the order in which it takes them."""
    local = Procedure(algorithm="fedavg", **fields)
    order = torch.randperm(IMAGES, generator=rng.generator(0, "batches", "client-0", 0, 0))
    images = torch.empty_like(dataset.train_images[torch.arange(IMAGES)])
    labels = torch.empty(IMAGES, dtype=torch.long)
    images[order], labels[order] = dataset.test_images[torch.arange(IMAGES)], dataset.test_labels[:IMAGES]
    federation = Federation(
        model(),
        defense=defense,
        dataset=replace(dataset, train_images=images, train_labels=labels),
        training=FederatedTraining(
            clients=1,
            rounds=1,
            schedule=ConstantSchedule(),
            local=LocalTraining(**{"momentum": 0.0, "weight_decay": 0.0, **fields}),
        ),
        seed=0,
    )
    client = federation.clients[0]
    client.samples = torch.arange(IMAGES)
    victim = federation.split
    client.enter(victim, federation.server.state)
    trial = trials_of(dataset, trials=1, batch_size=IMAGES)[0]
    same_order = fields.get("epochs", 1) == 1 or fields["batch_size"] >= IMAGES
    assert same_order  # of later epochs the shuffles differ
    given = {"train_mode": True, "local": local, "private": victim.private_parameters()}
    if fields.get("epochs", 1) > 1:  # each of its epochs has another order: sums round otherwise
        tolerance = {"rtol": 1e-4, "atol": 1e-6}
    else:
        tolerance = {"rtol": 0, "atol": 0}
    before = victim.public_state()
    audited = trained_tensors(victim.model, trial.images, trial.labels, **given)
    arm = replace(arms_of(KeyLock())["no-norm"], defense=defense)
    observed = observe(victim, arm=arm, model=model(), trial=trial, classes=10, local=local).gradient
    sent = one_update(federation, client).tensors
    for name, tensor in sent.items():
        torch.testing.assert_close(audited[name], tensor, **tolerance)
    for name, tensor in observed.items():
        expected = (before[name] - sent[name]) / local.lr
        torch.testing.assert_close(tensor, expected, rtol=tolerance["rtol"], atol=tolerance["rtol"])


@pytest.mark.parametrize("fields", DIFFERENTIABLE, ids=["one", "five", "nesterov", "decay", "all"])
@pytest.mark.parametrize("name", ["no-norm", "public-norm", "lock-known-both"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_what_attacks_differentiate_is_what_clients_do(dataset, name, fields, algorithm):
    """In double precision the two agree to 8 digits; of what is observed, weights have lost the rest."""
    if algorithm == "fedsgd":
        fields = {key: value for key, value in fields.items() if key in ("steps", "batch_size")}
    local = Procedure(algorithm=algorithm, lr=0.1, **fields)
    trial, observation = seen(dataset, local, name=name)
    found = differentiated(observation, trial)
    for tensor, expected in observation.gradient.items():
        torch.testing.assert_close(found[tensor].float(), expected, rtol=2e-3, atol=2e-5)
    if algorithm == "fedavg" and not observation.secrets:  # else the lock trains along, as observed above
        exact = executed(observation.model, trial, local)
        for tensor in observation.gradient:
            torch.testing.assert_close(found[tensor], exact[tensor], rtol=1e-8, atol=1e-10)


@dataclass(frozen=True, kw_only=True)
class Bending(UpdateDefense):
    """Changes what is sent in a way that no scaling of a gradient is."""

    type: Literal["test-bending"] = "test-bending"

    def changed(self, change, *, draws, client):
        return bent(change)

    @property
    def public_transform(self):
        return bent


def bent(tensors, seen=None):
    return {name: tensor + tensor**3 / (1e-30 + tensor.square().mean()) for name, tensor in tensors.items()}


def of_bent_weights(dataset, fields):
    local = Procedure(algorithm="fedavg", lr=0.1, **fields)
    (trial,) = trials_of(dataset, trials=1, batch_size=IMAGES)
    arm = Arm(name="bending", description="", defense=Bending())
    victim = arm.defense.prepare(build())
    return trial, arm, victim, observe(victim, arm=arm, model=build(), trial=trial, classes=10, local=local)


@pytest.mark.parametrize("fields", [ONE_STEP, ALL], ids=["one", "all"])
def test_attackers_change_weights_as_the_defense_does(dataset, fields):
    """Those who differentiate a client, and those who play one; each without the change is far off."""
    trial, arm, victim, observation = of_bent_weights(dataset, fields)
    found = differentiated(observation, trial)
    update = simulated(arm, victim, observation.local, trial)
    unchanged = differentiated(replace(observation, transform=None), trial)
    for tensor, expected in observation.gradient.items():
        torch.testing.assert_close(found[tensor].float(), expected, rtol=2e-3, atol=2e-5)
        torch.testing.assert_close(update[tensor], expected, rtol=2e-3, atol=2e-5)
        assert (unchanged[tensor] - expected).norm() > 0.01 * expected.norm()


def simulated(arm, victim, local, trial):
    clients = SimulatedClients.of(arm, victim, build(), local=local)
    updates = clients(trial.images[None], trial.labels[None])
    return {name: stacked[0] for name, stacked in updates.items()}


def test_an_image_is_found_behind_weights_that_a_defense_changed(dataset):
    local = Procedure(algorithm="fedavg", lr=0.1, **ONE_STEP)
    (trial,) = trials_of(dataset, trials=1)
    arm = Arm(name="bending", description="", defense=Bending())
    seen = observe(arm.defense.prepare(build()), arm=arm, model=build(), trial=trial, classes=10, local=local)
    generator = torch.Generator().manual_seed(0)
    attack = DLG(evaluations=300, weighting="sqrt")
    found = attack.reconstruct(seen, generator=generator).images
    begin = replace(attack, evaluations=1).reconstruct(seen, generator=generator.manual_seed(0)).images
    far, near = ((images.clamp(0, 1) - trial.images).square().mean() for images in (begin, found))
    assert near < 0.1 * far


def differentiated(observation, trial):
    matching = GradientMatching([observation], labels=[trial.labels])
    tensors, buffers = (
        {name: stacked[0] for name, stacked in part.items()} for part in (matching._known, matching._buffers)
    )
    observed = {name: matching._observed.first(name) for name in matching._observed}
    return matching._update(trial.images.double(), trial.labels, tensors, buffers, observed)


def executed(model, trial, local):
    model = copy.deepcopy(model).double().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = LocalTrainer(model, procedure=local, public=dict(model.named_parameters()), private={})
    images = trial.images.double()
    trainer.train([(images[part], trial.labels[part]) for part in local.batches(len(images))])
    return difference(before, dict(model.named_parameters()), lr=local.lr)


@pytest.mark.parametrize(
    "other", [{"momentum": 0.5}, {"weight_decay": 0.0}, {"epochs": 1}, {"proximal": 0.0}]
)
def test_these_comparisons_can_fail(dataset, other):
    local = Procedure(algorithm="fedavg", lr=0.1, **ALL)
    trial, observation = seen(dataset, local)
    matching = GradientMatching([replace(observation, local=replace(local, **other))], labels=[trial.labels])
    point = trial.images.double().flatten()[None]
    right = GradientMatching([observation], labels=[trial.labels])(point, torch.tensor([0]))[0]
    assert matching(point, torch.tensor([0]))[0] > 20 * right


@pytest.mark.parametrize(
    "fields", [{"optimizer": "adam"}, {"augmentation": "flip"}, {"precision": "bfloat16"}]
)
@pytest.mark.parametrize("attack", [DLG(evaluations=2), InvertingGradients(iterations=2)])
def test_matching_refuses_what_cannot_be_differentiated(dataset, attack, fields):
    local = Procedure(algorithm="fedavg", epochs=3, **fields)
    assert not local.differentiable
    _, observation = seen(dataset, local, images=1)
    (name,) = fields
    with pytest.raises(AttackError, match=f"can be differentiated, got {name} = "):
        attack.reconstruct(observation, generator=torch.Generator())


def test_a_gradient_of_a_client_with_momentum_is_a_gradient(dataset):
    """Nothing of the optimizer is in it."""
    assert Procedure(momentum=0.9, weight_decay=0.1).is_gradient
    assert not Procedure(algorithm="fedavg", steps=1).is_gradient
    assert Procedure(steps=1) == Procedure()
    assert Procedure(algorithm="fedavg", optimizer="adam").obstacle == "optimizer = 'adam'"


def test_batches():
    def sizes(**fields):
        return [len(batch) for batch in Procedure(**fields).batches(10)]

    assert sizes() == [10]
    assert sizes(batch_size=4) == [10]  # one gradient is of all that was given
    assert sizes(steps=3, batch_size=4) == [4, 4, 4]
    assert sizes(algorithm="fedavg", epochs=2, batch_size=4) == [4, 4, 2, 4, 4, 2]
    assert sizes(algorithm="fedavg", epochs=2) == [10, 10]
    taken = torch.cat(Procedure(algorithm="fedavg", epochs=2, batch_size=4).batches(10))
    assert torch.equal(taken[:10], torch.arange(10))
    assert not torch.equal(taken[10:], torch.arange(10))
    assert torch.equal(taken[10:].sort().values, torch.arange(10))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"epochs": 0}, {"lr": float("nan")}, {"momentum": 1.0}])
def test_procedures_out_of_range(wrong):
    with pytest.raises(ConfigError, match=f"Procedure is not usable.*\n.*{next(iter(wrong))}: expected"):
        Procedure(**wrong)


def test_a_federation_that_sends_gradients_takes_one_step():
    assert LocalTraining(algorithm="fedsgd", steps=1) == LocalTraining(algorithm="fedsgd")
    with pytest.raises(ConfigError, match="with algorithm='fedsgd' a client takes one, got 2"):
        LocalTraining(algorithm="fedsgd", steps=2)


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({"momentum": 0.9}, "local.momentum: without effect"),
        ({"epochs": 2, "optimizer": "adam"}, "local.epochs, local.optimizer: without effect"),
        ({"algorithm": "fedavg", "steps": 3, "epochs": 2}, "local.epochs: without effect"),
        ({"augmentation": "blur"}, "local.augmentation: expected one of none, flip"),
        ({"steps": 0}, "steps: expected at least 1"),
    ],
)
def test_attacks_of_procedures_that_say_too_much_are_refused(local, message):
    with pytest.raises(ConfigError, match=message):
        configs.parse({"type": "attack", "local": local}, source="test")


def test_a_procedure_stands_in_a_file_as_it_stood_before():
    old = configs.parse({"type": "attack", "local": {"steps": 1, "lr": 0.01}}, source="test")
    assert old == configs.parse({"type": "attack"}, source="test")
    epochs = {"algorithm": "fedavg", "epochs": 2, "batch_size": 4, "momentum": 0.9}
    experiment = configs.parse({"type": "attack", "local": epochs}, source="test")
    assert configs.parse(configs.values_of(experiment), source="test") == experiment


def test_momentum_makes_the_sum_larger():
    def share(**fields):
        return Procedure(**fields).summed_share(4)

    assert share() == 1
    assert share(steps=3) == 3
    assert share(algorithm="fedavg", steps=1, momentum=0.9) == pytest.approx(1.9)
    assert share(algorithm="fedavg", steps=2, momentum=0.9) == pytest.approx(1.9 + 1 + 0.9 * 1.9)


@pytest.mark.parametrize("name", ["no-norm", "public-norm", "lock-known-both"])
def test_simulated_clients_do_the_same(dataset, name):
    local = Procedure(algorithm="fedavg", lr=0.1, **ALL)
    arm, model = arm_of(name), build()
    victim = arm.defense.prepare(model)
    (trial,) = trials_of(dataset, trials=1, batch_size=IMAGES)
    sent = observe(victim, arm=arm, model=model, trial=trial, classes=10, local=local).gradient
    clients = SimulatedClients.of(arm, victim, model, local=local)
    twice = clients(torch.stack([trial.images] * 2), torch.stack([trial.labels] * 2))
    assert set(twice) == set(sent)
    for tensor, expected in sent.items():
        for update in twice[tensor]:  # the second starts from the same weights, and no momentum
            torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-4)


def test_each_simulated_client_augments_on_its_own(dataset):
    local = Procedure(algorithm="fedavg", augmentation="crop-flip")
    arm, model = arm_of("no-norm"), build()
    clients = SimulatedClients.of(arm, arm.defense.prepare(model), model, local=local)
    (trial,) = trials_of(dataset, trials=1, batch_size=2)
    one, other = (clients(trial.images[None], trial.labels[None])["conv1.weight"] for _ in range(2))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: you tried")]
)
def test_what_fails_for_lack_of_memory_is_not_tried_again(dataset, error):
    class Large(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = build(), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 1:
                raise error
            return self.net(x)

    images, labels = dataset.test_images[torch.arange(3)][:, None], dataset.test_labels[:3][:, None]
    with pytest.raises(RuntimeError, match="memory"):
        gradients(Large(), images, labels, names=["net.conv1.weight"], train_mode=True)


class Attentive(nn.Module):
    """Rows of an image attend to each other, as patches do in a vision transformer."""

    def __init__(self):
        super().__init__()
        self.own = nn.Linear(32, 3 * 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        q, k, v = self.own(x.mean(1)[:, None]).chunk(3, -1)
        return self.fc(nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2)))


def test_clients_with_attention_are_played_at_once(dataset, recwarn):
    """The fused attention is called client by client, with PyTorch's warning of a performance drop."""
    network, images, labels = Attentive(), dataset.test_images[:4, None], dataset.test_labels[:4, None]
    found = gradients(network, images, labels, names=["own.weight"], train_mode=True)["own.weight"]
    assert [str(warning.message)[:60] for warning in recwarn] == []
    for index in range(4):
        network.zero_grad()
        nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
        torch.testing.assert_close(found[index], network.own.weight.grad, rtol=1e-4, atol=1e-6)
