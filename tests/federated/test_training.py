"""What a client trains, against plain PyTorch loops; and that what is the client's stays the client's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from fedkl import data, rng
from fedkl.data import Dirichlet
from fedkl.defenses import KeyLock, NoDefense, PrivateLayers, PrivateNorm, PublicNorm
from fedkl.errors import ConfigError, DataError, SecretError
from fedkl.federated import Client, Execution, ServerAdam, StepSchedule
from fedkl.federated.optimizer_state import put_state
from fedkl.locking import Split
from tests.federated.setting import (
    TwoNorms,
    differences,
    everything,
    fedavg_by_hand,
    federation,
    lenet,
    one_update,
    seeded,
    trained,
)
from tests.locking.leaks import patterns

DEFENSES = [NoDefense(), KeyLock(), KeyLock(layers="all"), PublicNorm(), PrivateNorm(), PrivateLayers()]
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, **SGD)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, weight_decay=5e-4)


def assert_same(run, state):
    assert set(run.server.state) == set(state)
    for name, tensor in run.server.state.items():
        torch.testing.assert_close(tensor, state[name], msg=name)


def test_centralized_training_is_a_plain_loop(dataset):
    """Oracle: one client and no defense equal an ordinary PyTorch loop, momentum across rounds included."""
    schedule = StepSchedule(milestones=(0.6,))  # from 1.8, so in round 2
    run = trained(federation(dataset, NoDefense(), clients=1, rounds=3, schedule=schedule))
    model = lenet()
    optimizer = sgd(model.parameters())
    part = data.IID().split(dataset.train_labels, clients=1, generator=rng.generator(0, "partition"))[0]
    images, labels = dataset.train_images[part], dataset.train_labels[part]
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.01 if epoch < 2 else 0.002
        order = torch.randperm(192, generator=rng.generator(0, "batches", "client-0", epoch, 0))
        for batch in order.split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    assert_same(run, model.state_dict())


@pytest.mark.parametrize(
    ("local", "by_hand"),
    [
        ({}, {}),
        ({"epochs": 2, "batch_size": 40}, {"epochs": 2, "batch_size": 40}),
        ({"keep_optimizer": False}, {"keep": False}),
        ({"optimizer": "adam"}, {"optimizer": adam}),
        ({"optimizer": "adam", "keep_optimizer": False}, {"optimizer": adam, "keep": False}),
        ({"proximal": 5.0, "batch_size": 16}, {"pull": 5.0, "batch_size": 16}),
        ({"augmentation": "crop-flip"}, {"augmentation": "crop-flip"}),
        (
            {"momentum": 0.0, "weight_decay": 0.0},
            {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01)},
        ),
    ],
    ids=["plain", "epochs", "fresh-sgd", "adam", "fresh-adam", "fedprox", "augmented", "no-momentum"],
)
def test_fedavg_is_a_plain_loop(dataset, local, by_hand):
    """Oracle: a model and an optimizer for each of several unequal clients, averaged in float64."""
    uneven = data.Dataset(
        dataset.spec,
        train_images=dataset.train_images[:130],
        train_labels=dataset.train_labels[:130],
        test_images=dataset.test_images,
        test_labels=dataset.test_labels,
    )
    run = trained(
        federation(uneven, NoDefense(), rounds=3, schedule=StepSchedule(milestones=(0.3, 0.6)), local=local)
    )  # shares of 3 rounds: in rounds 1 and 2
    options = {"optimizer": sgd, "lr": lambda round: 0.01 * 0.2**round, **by_hand}
    assert_same(run, fedavg_by_hand(uneven, clients=3, rounds=3, **options))


def test_these_oracles_can_fail(dataset):
    """Each option changes the result by more than the oracles tolerate."""
    options = {"clients": 3, "rounds": 2, "optimizer": sgd, "lr": lambda round: 0.01}
    plain = fedavg_by_hand(dataset, batch_size=32, **options)
    others = ({"keep_optimizer": False}, {"proximal": 5.0}, {"augmentation": "flip"}, {"epochs": 2})
    for local in others:
        run = trained(federation(dataset, NoDefense(), local={"batch_size": 32, **local}))
        with pytest.raises(AssertionError):
            assert_same(run, plain)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("defense", DEFENSES, ids=lambda d: d.type)
def test_every_defense_trains(dataset, defense, algorithm):
    run = federation(dataset, defense, local={"algorithm": algorithm})
    before = run.server.state
    results = list(run.run())
    assert [r.round for r in results] == [0, 1]
    assert all(0 <= a <= 1 for a in results[-1].accuracies.values())
    assert any(not torch.equal(before[name], t) for name, t in run.server.state.items())


def test_the_lock_learns_from_real_images(dataset):
    run = federation(dataset, KeyLock(), rounds=15, local={"batch_size": 8})
    accuracies = [result.accuracy for result in run.run()]
    assert max(accuracies) > 0.5 > accuracies[0]


def test_half_precision_trains(dataset):
    local = {"batch_size": 16, "lr": 0.05}
    run = federation(dataset, NoDefense(), clients=1, local=local | {"precision": "bfloat16"})
    results = list(run.run())
    assert results[-1].loss < results[0].loss
    assert all(t.dtype == torch.float32 for t in run.server.state.values())
    full = trained(federation(dataset, NoDefense(), clients=1, local=local))
    assert differences(run.server.state, full.server.state)


class Spectral(torch.nn.Module):
    """It scales the images by complex numbers, those of a layer of frequencies, say."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.polar(torch.full((3072,), 0.5), torch.linspace(0, 1, 3072)))
        self.register_buffer("phase", torch.polar(torch.ones(4), torch.linspace(0.3, 1.2, 4)))
        self.head = torch.nn.Linear(3072, 10)

    def forward(self, x):
        return self.head((x.flatten(1) * self.scale * self.phase.prod()).real)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_complex_tensors_train(dataset, optimizer):
    """Oracle: the one client's own tensors come back, whole."""
    run = federation(dataset, NoDefense(), model=seeded(Spectral), clients=1, local={"optimizer": optimizer})
    before = run.server.state
    update = one_update(run, run.clients[0])
    assert not torch.equal(update.tensors["scale"].imag, before["scale"].imag)
    run = trained(
        federation(
            dataset, NoDefense(), model=seeded(Spectral), clients=1, rounds=1, local={"optimizer": optimizer}
        )
    )
    torch.testing.assert_close(run.server.state["scale"], update.tensors["scale"])
    torch.testing.assert_close(run.server.state["phase"], before["phase"])


def test_augmentation_is_repeated_exactly(dataset):
    runs = [
        trained(federation(dataset, NoDefense(), local={"augmentation": kind}))
        for kind in ("crop-flip", "crop-flip", "none")
    ]
    assert not differences(runs[0].server.state, runs[1].server.state)
    assert differences(runs[0].server.state, runs[2].server.state)


def test_clients_differ_in_their_private_state_only(dataset):
    run = trained(federation(dataset, KeyLock(), rounds=1))
    states = []
    for client in run.clients:
        client.enter(run.split, run.server.state)
        states.append((run.split.public_state(), run.split.private_state(), run.split.key))
    for name in states[0][0]:
        assert all(torch.equal(states[0][0][name], other[0][name]) for other in states[1:])
    weights = [name for name in states[0][1] if name.endswith("original0")]
    assert all(not torch.equal(states[0][1][n], other[1][n]) for n in weights for other in states[1:])
    assert len({id(state[2]) for state in states}) == 3


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_private_tensors_train_and_persist(dataset, algorithm):
    run = federation(dataset, KeyLock(), local={"algorithm": algorithm})

    def lock_layers():
        state = run.clients[0].private_state
        return {name: t.clone() for name, t in state.items() if "original" in name}

    start = lock_layers()
    run.run_round(0)
    after_one = lock_layers()
    run.run_round(1)
    after_two = lock_layers()
    for earlier, later in ((start, after_one), (after_one, after_two)):
        assert all(not torch.equal(earlier[name], later[name]) for name in earlier)


@pytest.mark.parametrize("frozen", [["fc.bias"], ["fc.weight", "fc.bias"]], ids=["one", "all"])
def test_frozen_private_parameters_stay_where_gradients_are_sent(dataset, frozen):
    model = lenet()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    with pytest.warns(UserWarning, match=r"'fc\.bias'.*frozen"):
        run = federation(dataset, PrivateLayers(), model=model, local={"algorithm": "fedsgd"})
    private, before = run.clients[0].private_state, run.server.state
    trained(run)
    for name in ("fc.weight", "fc.bias"):
        assert torch.equal(run.clients[0].private_state[name], private[name]) == (name in frozen), name
        assert torch.equal(private[name], model.get_parameter(name)) == (name in frozen), name
    assert differences(before, run.server.state) == list(before)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("defense", [NoDefense(), PrivateNorm()], ids=lambda d: d.type)
def test_a_clients_optimizer_is_its_own(dataset, defense, optimizer):
    """Another client's training in between must not change what a client does."""
    alone, among = (
        federation(dataset, defense, model=lenet(), local={"optimizer": optimizer}) for _ in range(2)
    )
    first = one_update(alone, alone.clients[0])
    among_first = one_update(among, among.clients[0])
    one_update(among, among.clients[1])
    second = one_update(alone, alone.clients[0], round=1, state=first.tensors)
    among_second = one_update(among, among.clients[0], round=1, state=among_first.tensors)
    assert not differences(second.tensors, among_second.tensors)
    kept = [dict(run.clients[0].optimizer_state) for run in (alone, among)]
    assert set(kept[0]) == set(alone._pool.workers[0]._trainer.named)
    for name, slots in kept[0].items():
        assert not differences(slots, kept[1][name])


def test_without_keep_optimizer_nothing_of_it_is_kept(dataset):
    run = trained(federation(dataset, NoDefense(), local={"keep_optimizer": False}))
    assert [dict(client.optimizer_state) for client in run.clients] == [{}, {}, {}]


def test_fedprox_leaves_private_parameters_alone(dataset):
    """Oracle: one client with private γ and β, which start at 1 and 0; only what is public is pulled."""

    def build():
        split = PrivateNorm().prepare(lenet())
        return split.model

    private = set(PrivateNorm().prepare(lenet()).private_parameters())
    run = federation(dataset, PrivateNorm(), clients=1, rounds=1, local={"proximal": 20.0, "batch_size": 16})
    run.run_round(0)
    options = {"clients": 1, "rounds": 1, "optimizer": sgd, "lr": lambda round: 0.01, "batch_size": 16}

    def private_by_hand(pulled):
        """The server of one client is that client, but state_dict() withholds what is private."""
        models = []

        def remembered():
            models.append(build())
            return models[-1]

        fedavg_by_hand(dataset, model=remembered, pull=20.0, pulled=pulled, **options)
        return {name: p.detach() for name, p in models[1].named_parameters() if name in private}

    got = {name: run.clients[0].private_state[name] for name in private}
    expected = private_by_hand(lambda name: name not in private)
    for name in private:
        torch.testing.assert_close(got[name], expected[name], msg=name)
    pulled_too = private_by_hand(lambda name: True)
    assert any(not torch.allclose(got[name], pulled_too[name], rtol=1e-3) for name in private)


def test_lock_weight_decay_is_its_own_choice(dataset):
    def decays(**local):
        run = federation(dataset, KeyLock(), local={"weight_decay": 0.1, **local})
        return [group["weight_decay"] for group in run._pool.workers[0]._trainer.optimizer.param_groups]

    assert decays(lock_weight_decay=0.0) == [0.1, 0.0]
    assert decays() == [0.1, 0.1]


def test_the_groups_of_an_optimizer_hold_what_they_say(dataset):
    run = federation(dataset, KeyLock(), local={"lock_weight_decay": 0.0})
    worker = run._pool.workers[0]
    for group, named in zip(
        worker._trainer.optimizer.param_groups,
        (worker.split.public_parameters(), worker.split.private_parameters()),
        strict=True,
    ):
        assert {id(p) for p in group["params"]} == {id(p) for p in named.values()}


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("defense", [KeyLock(), KeyLock(layers="all"), PrivateNorm()], ids=lambda d: d.type)
def test_updates_carry_nothing_private(dataset, defense, algorithm):
    run = federation(dataset, defense, local={"algorithm": algorithm})
    client = run.clients[0]
    update = one_update(run, client)
    sent = update.to_bytes()
    assert set(update.tensors) == {
        f"{layer}.{part}" for layer in ("conv1", "conv2", "conv3", "fc") for part in ("weight", "bias")
    }
    secrets = dict(client.private_state)
    assert secrets
    if client.key is not None:
        secrets["key"] = client.key.reveal()
    for name, slots in client.optimizer_state.items():
        secrets |= {f"{name}/{slot}": tensor for slot, tensor in slots.items()}
    for name, tensor in secrets.items():
        assert name.encode() not in sent
        assert not any(form in sent for form in patterns(tensor)), name


def test_this_check_can_fail(dataset, monkeypatch):
    """With the split broken on purpose, the update does carry private tensors."""
    monkeypatch.setattr("fedkl.locking.surgery.withhold", lambda module, names: None)
    run = federation(dataset, KeyLock())
    update = one_update(run, run.clients[0])
    assert any("parametrizations" in name for name in update.tensors)


def test_fedsgd_of_full_batches_is_centralized_descent(dataset):
    """Oracle: equal shares, full batches, no momentum: the average is the gradient of all samples."""
    local = {"algorithm": "fedsgd", "batch_size": 192, "momentum": 0.0, "weight_decay": 0.0}
    run = trained(federation(dataset, NoDefense(), rounds=1, local=local))
    model = lenet()
    loss = F.cross_entropy(model(dataset.train_images), dataset.train_labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(run.server.state[name], parameter.detach() - 0.01 * gradient)


@pytest.mark.parametrize(
    ("server", "optimizer"),
    [
        ({}, sgd),
        (
            {"server": ServerAdam(lr=0.02)},
            lambda parameters: torch.optim.Adam(parameters, lr=0.02, betas=(0.9, 0.99), eps=1e-3),
        ),
    ],
    ids=["client's step", "ServerAdam"],
)
def test_fedsgd_steps_on_the_server_with_the_schedule(dataset, server, optimizer):
    """Oracle: full batches of unequal clients make the gradient of all samples, for one optimizer."""
    part = Dirichlet(alpha=5.0)
    local = {"algorithm": "fedsgd", "batch_size": 192}
    schedule = StepSchedule(milestones=(0.5,))
    run = federation(dataset, NoDefense(), rounds=4, partition=part, schedule=schedule, local=local, **server)
    assert len({client.num_samples for client in run.clients}) > 1
    list(run.run())
    model = lenet()
    oracle = optimizer(model.parameters())
    lr = oracle.param_groups[0]["lr"]
    for round in range(4):
        oracle.param_groups[0]["lr"] = lr if round < 2 else 0.2 * lr
        oracle.zero_grad()
        F.cross_entropy(model(dataset.train_images), dataset.train_labels).backward()
        oracle.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(run.server.state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_gradients_without_statistics_are_refused(dataset):
    """No gradient carries public running statistics, so nobody would learn them."""
    options = {"model": TwoNorms(), "local": {"algorithm": "fedsgd"}}
    with pytest.raises(ConfigError, match=r"body\.1\.running_mean"):
        federation(dataset, NoDefense(), **options)
    federation(dataset, KeyLock(), **options)


def test_public_statistics_of_unequal_clients_are_averaged(dataset):
    """Oracle: norm statistics after one batch each, weighted by samples."""
    part = {"train_images": dataset.train_images[:131], "train_labels": dataset.train_labels[:131]}
    rest = {"test_images": dataset.test_images, "test_labels": dataset.test_labels}
    uneven = data.Dataset(dataset.spec, **part, **rest)
    model = seeded(TwoNorms)
    run = federation(uneven, NoDefense(), model=model, clients=2, local={"batch_size": 66})
    run.run_round(0)
    expected = 0
    for client in run.clients:
        features = model.body[0](uneven.train_images[client.samples])
        expected = expected + 0.1 * features.mean((0, 2, 3)).detach() * client.num_samples / 131
    torch.testing.assert_close(run.server.state["body.1.running_mean"], expected)
    assert run.server.state["body.1.num_batches_tracked"] == 1


def test_a_restored_state_goes_where_its_parameter_is():
    """After a checkpoint everything is on the CPU; parameters may not be. Adam's steps stay there."""
    parameters = {
        "w": torch.nn.Parameter(torch.empty(3, device="meta")),
        "scale": torch.nn.Parameter(torch.empty((), device="meta")),
    }
    optimizer = torch.optim.Adam(list(parameters.values()))
    slots = {"step": torch.tensor(4.0), "exp_avg": torch.ones(3)}
    put_state(optimizer, parameters, {"w": slots, "scale": {"exp_avg": torch.ones(())}})
    got = optimizer.state[parameters["w"]]
    assert got["exp_avg"].device.type == "meta"
    assert got["step"].device.type == "cpu"
    assert optimizer.state[parameters["scale"]]["exp_avg"].device.type == "meta"


def test_a_client_cannot_be_pickled(dataset):
    run = federation(dataset, PrivateNorm())
    with pytest.raises(SecretError, match="pickled"):
        pickle.dumps(run.clients[0])


def test_clients_without_data_are_refused():
    with pytest.raises(DataError, match="'c'"):
        Client(name="c", samples=torch.arange(0), split=Split(lenet()))


def test_more_clients_than_samples_are_refused(dataset):
    with pytest.raises(DataError, match="192 samples"):
        federation(dataset, NoDefense(), clients=193)


def test_a_missing_gpu_is_named(dataset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: 'cuda'"):
        federation(dataset, NoDefense(), execution=Execution(device="cuda"))


def test_nothing_of_the_callers_is_changed(dataset):
    model = lenet()
    before = copy.deepcopy(model.state_dict())
    trained(federation(dataset, KeyLock(), model=model, rounds=1))
    assert not differences(before, model.state_dict())


def test_a_client_shows_no_secret(dataset):
    run = federation(dataset, KeyLock())
    assert repr(run.clients[0]) == (
        "Client('client-0', samples=64, key=Key(length=1024, distribution='normal', values=<secret>))"
    )


def test_the_memory_format_changes_the_last_bits_only(dataset):
    runs = [
        trained(federation(dataset, NoDefense(), execution=Execution(channels_last=last)))
        for last in (False, True)
    ]
    states = [everything(run) for run in runs]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
