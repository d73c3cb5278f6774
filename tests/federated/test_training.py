"""Federated training in one process: oracles, persistence of what is the client's, and privacy of updates."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from fedkl import data, models, rng
from fedkl.defenses import KeyLock, NoDefense, PrivateNorm, PublicNorm
from fedkl.defenses.base import plain_copy
from fedkl.errors import ConfigError, DataError, SecretError
from fedkl.federated import Client, FederatedTraining, Federation, LocalTraining, server_fill_ins
from fedkl.federated.fill_in import _baked, _Filled
from fedkl.locking import Split

DEFENSES = [NoDefense(), KeyLock(), KeyLock(layers="all"), PublicNorm(), PrivateNorm()]


@pytest.fixture(scope="module")
def dataset():
    full = data.load("mnist-sample")
    return data.Dataset(
        full.spec,
        train_images=full.train_images[:192],
        train_labels=full.train_labels[:192],
        test_images=full.test_images[:100],
        test_labels=full.test_labels[:100],
    )


def lenet(seed=0):
    return models.build_model("lenet", channels=3, classes=10, seed=seed, initialization="uniform")


def federation(dataset, defense, *, rounds=2, clients=3, **local):
    training = FederatedTraining(clients=clients, rounds=rounds, local=LocalTraining(**local))
    return Federation(lenet(), defense=defense, dataset=dataset, training=training, seed=0)


def test_centralized_training_is_a_plain_loop(dataset):
    """Oracle: one client and no defense equal an ordinary PyTorch loop, momentum across epochs included."""
    run = federation(dataset, NoDefense(), clients=1, rounds=3, lr_milestones=(2,))
    list(run.run())
    model = lenet()
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, **options)
    part = data.partition_iid(192, clients=1, generator=rng.generator(0, "partition"))[0]
    images, labels = dataset.train_images[part], dataset.train_labels[part]
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.01 if epoch < 2 else 0.002
        order = torch.randperm(192, generator=rng.generator(0, "batches", "client-0", epoch, 0))
        for batch in order.split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(run.server.state[name], tensor, msg=name)


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda d: d.type)
@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_every_defense_trains(dataset, defense, algorithm):
    run = federation(dataset, defense, algorithm=algorithm)
    before = run.server.state
    results = list(run.run())
    assert [r.round for r in results] == [0, 1]
    assert all(0 <= a <= 1 for a in results[-1].accuracies.values())
    assert any(not torch.equal(before[name], t) for name, t in run.server.state.items())


def test_the_lock_learns_from_real_images(dataset):
    accuracies = [r.accuracy for r in federation(dataset, KeyLock(), rounds=15, batch_size=8).run()]
    assert max(accuracies) > 0.5 > accuracies[0]


def test_clients_differ_in_their_private_state_only(dataset):
    run = federation(dataset, KeyLock(), rounds=1)
    list(run.run())
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
    run = federation(dataset, KeyLock(), algorithm=algorithm)

    def lock_layers():
        state = run.clients[0]._private_state
        return {name: t.clone() for name, t in state.items() if "original" in name}

    start = lock_layers()
    run.run_round(0)
    after_one = lock_layers()
    run.run_round(1)
    after_two = lock_layers()
    for earlier, later in ((start, after_one), (after_one, after_two)):
        assert all(not torch.equal(earlier[name], later[name]) for name in earlier)


def test_a_clients_momentum_is_its_own(dataset):
    """Another client's training in between must not change what a client does."""
    alone, among = (federation(dataset, NoDefense()) for _ in range(2))
    state = alone.server.state
    first = alone.clients[0].update(alone.split, state, round=0)
    among_first = among.clients[0].update(among.split, state, round=0)
    among.clients[1].update(among.split, state, round=0)
    second = alone.clients[0].update(alone.split, first.tensors, round=1)
    among_second = among.clients[0].update(among.split, among_first.tensors, round=1)
    for name in second.tensors:
        assert torch.equal(second.tensors[name], among_second.tensors[name])


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("defense", [KeyLock(), KeyLock(layers="all"), PrivateNorm()], ids=lambda d: d.type)
def test_updates_carry_nothing_private(dataset, defense, algorithm):
    run = federation(dataset, defense, algorithm=algorithm)
    update = run.clients[0].update(run.split, run.server.state, round=0)
    sent = update.to_bytes()
    assert set(update.tensors) == {
        f"{layer}.{part}" for layer in ("conv1", "conv2", "conv3", "fc") for part in ("weight", "bias")
    }
    for name, tensor in run.split.private_state().items():
        assert name.encode() not in sent
        if tensor.numel() > 1:
            assert tensor.numpy().tobytes() not in sent


def test_this_check_can_fail(dataset, monkeypatch):
    """With the split broken on purpose, the update does carry private tensors."""
    monkeypatch.setattr("fedkl.locking.surgery.withhold", lambda module, names: None)
    run = federation(dataset, KeyLock())
    update = run.clients[0].update(run.split, run.server.state, round=0)
    assert any("parametrizations" in name for name in update.tensors)


def test_fedsgd_of_full_batches_is_centralized_descent(dataset):
    """Oracle: equal shares, full batches, no momentum: the average is the gradient of all samples."""
    options = {"algorithm": "fedsgd", "batch_size": 192, "momentum": 0.0, "weight_decay": 0.0}
    run = federation(dataset, NoDefense(), rounds=1, **options)
    list(run.run())
    model = lenet()
    loss = F.cross_entropy(model(dataset.train_images), dataset.train_labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(run.server.state[name], parameter.detach() - 0.01 * gradient)


def test_lock_weight_decay_is_its_own_choice(dataset):
    run = federation(dataset, KeyLock(), weight_decay=0.1, lock_weight_decay=0.0)
    run.run_round(0)
    decays = [group["weight_decay"] for group in run.clients[0]._optimizer.param_groups]
    assert decays == [0.1, 0.0]


def test_fill_ins_of_an_untrained_federation(dataset):
    run = federation(dataset, KeyLock(), rounds=1)
    list(run.run())
    arms = server_fill_ins(
        defense=run.defense,
        model=lenet(),
        state=run.server.state,
        split=run.split,
        clients=run.clients,
        auxiliary=(dataset.test_images[:20], dataset.test_labels[:20]),
        test=(dataset.test_images[20:], dataset.test_labels[20:]),
        refit_steps=5,
    )
    places = [(arm.arm, arm.statistics) for arm in arms]
    assert len(places) == len(set(places)) == 7
    assert {arm.arm for arm in arms} == {"neutral", "random-key", "mean-affine", "refit"}
    assert all(0 <= arm.accuracy <= 1 for arm in arms)


class TwoNorms(torch.nn.Module):
    """One norm is locked, the other one is public."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 5, 4), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3),
            torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(100, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.body(x)


def filled_in(dataset, defense):
    run = Federation(
        TwoNorms(), defense=defense, dataset=dataset, training=FederatedTraining(rounds=2), seed=0
    )
    list(run.run())
    server = defense.prepare(TwoNorms())
    server.load_public_state(run.server.state)
    return run, _Filled(plain_copy(server), server)


def test_fill_ins_leave_everything_public_as_it_is(dataset):
    run, filled = filled_in(dataset, KeyLock())
    baked = [_baked(client, run.split, run.server.state) for client in run.clients]
    images, labels = dataset.test_images[:20], dataset.test_labels[:20]
    variants = [filled.neutral(), filled.averaged(baked), filled.refitted(images, labels, steps=3)]
    variants += [filled.neutral()._copy()]
    for variant in variants:
        for _, model, _ in variant.with_statistics(images):
            state = model.state_dict()
            for name, tensor in run.server.state.items():
                assert torch.equal(state[name], tensor), name
    neutral = variants[0].model
    assert torch.equal(neutral.body[1].weight, torch.ones(4))
    assert torch.equal(neutral.body[1].bias, torch.zeros(4))
    assert not torch.equal(variants[2].model.body[1].weight, filled.model.body[1].weight)


def test_fill_ins_keep_public_statistics(dataset):
    run, filled = filled_in(dataset, KeyLock(share_statistics=True))
    ((kind, model, used),) = filled.neutral().with_statistics(dataset.test_images[:20])
    assert (kind, used) == ("public", 0)
    assert torch.equal(model.body[1].running_mean, run.server.state["body.1.running_mean"])
    assert model.body[1].running_mean.any()


def test_re_estimated_statistics_are_those_of_the_auxiliary_images(dataset):
    _, filled = filled_in(dataset, KeyLock())
    images = dataset.test_images[:20]
    (_, initial, _), (_, estimated, used) = filled.neutral().with_statistics(images)
    assert used == 20
    assert torch.equal(initial.body[1].running_mean, torch.zeros(4))
    features = estimated.body[0](images)
    torch.testing.assert_close(estimated.body[1].running_mean, features.mean((0, 2, 3)))
    torch.testing.assert_close(estimated.body[1].running_var, features.var((0, 2, 3)))


def test_without_private_parameters_there_is_nothing_to_fill_in(dataset):
    run = federation(dataset, PublicNorm(), rounds=1)
    list(run.run())
    pair = (dataset.test_images[:20], dataset.test_labels[:20])
    options = {"defense": run.defense, "model": lenet(), "state": run.server.state, "split": run.split}
    assert server_fill_ins(**options, clients=run.clients, auxiliary=pair, test=pair) == []


def test_the_mean_oracle_of_one_client_is_its_own_model(dataset):
    """Oracle: with one client the mean γ and β give exactly the client's parameters."""
    run = federation(dataset, KeyLock(), clients=1, rounds=2)
    list(run.run())
    server = run.defense.prepare(lenet())
    server.load_public_state(run.server.state)
    baked = _baked(run.clients[0], run.split, run.server.state)
    mean = _Filled(plain_copy(server), server).averaged([baked]).model
    for name, parameter in baked.named_parameters():
        torch.testing.assert_close(mean.get_parameter(name), parameter)


def test_gradients_without_statistics_are_refused(dataset):
    """No gradient carries public running statistics, so nobody would learn them."""
    training = FederatedTraining(local=LocalTraining(algorithm="fedsgd"))
    options = {"dataset": dataset, "training": training, "seed": 0}
    with pytest.raises(ConfigError, match=r"body\.1\.running_mean"):
        Federation(TwoNorms(), defense=NoDefense(), **options)
    Federation(TwoNorms(), defense=KeyLock(), **options)


def test_public_statistics_of_unequal_clients_are_averaged(dataset):
    part = {"train_images": dataset.train_images[:130], "train_labels": dataset.train_labels[:130]}
    rest = {"test_images": dataset.test_images, "test_labels": dataset.test_labels}
    uneven = data.Dataset(dataset.spec, **part, **rest)
    training = FederatedTraining(clients=2, rounds=1, local=LocalTraining(batch_size=65))
    run = Federation(TwoNorms(), defense=NoDefense(), dataset=uneven, training=training, seed=0)
    run.run_round(0)
    assert run.server.state["body.1.num_batches_tracked"] >= 1


def test_a_client_cannot_be_pickled(dataset):
    run = federation(dataset, PrivateNorm(), rounds=1)
    with pytest.raises(SecretError, match="pickled"):
        pickle.dumps(run.clients[0])


def test_clients_without_data_are_refused(dataset):
    with pytest.raises(DataError, match="'c'"):
        Client(
            name="c",
            images=dataset.train_images[:0],
            labels=dataset.train_labels[:0],
            split=Split(lenet()),
            training=LocalTraining(),
            seed=0,
        )


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"lock_weight_decay": -1.0},
        {"lr_factor": float("nan")},
    ],
)
def test_unusable_training_options(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        LocalTraining(**bad)


def test_nothing_of_the_callers_is_changed(dataset):
    model = lenet()
    before = copy.deepcopy(model.state_dict())
    training = FederatedTraining(rounds=1)
    list(Federation(model, defense=KeyLock(), dataset=dataset, training=training, seed=0).run())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_client_shows_no_secret(dataset):
    run = federation(dataset, KeyLock(), rounds=1)
    assert repr(run.clients[0]) == (
        "Client('client-0', samples=64, key=Key(length=1024, distribution='normal', values=<secret>))"
    )
