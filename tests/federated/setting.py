"""Small federations, and what their tests share."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from fedkl import data, models, rng
from fedkl.data import AUGMENTATIONS
from fedkl.federated import ConstantSchedule, FederatedTraining, Federation, LocalTraining


def lenet(seed=0):
    return models.build_model("lenet", channels=3, classes=10, seed=seed, initialization="uniform")


class TwoNorms(nn.Module):
    """One norm is locked, the other one is public."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.body(x)


class WithDropout(nn.Module):
    """It draws random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(3072, 8), nn.Linear(8, 10)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.dropout(torch.relu(self.hidden(x.flatten(1)))))


def seeded(build, seed=0):
    """A model with the same initial weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def sample(train=192, test=100):
    full = data.load("mnist-sample")
    return data.Dataset(
        full.spec,
        train_images=full.train_images[:train],
        train_labels=full.train_labels[:train],
        test_images=full.test_images[:test],
        test_labels=full.test_labels[:test],
    )


def federation(dataset, defense, *, model=None, execution=None, seed=0, local=None, **training):
    """A federation; `training` are fields of `FederatedTraining`, `local` those of `LocalTraining`."""
    training = {"clients": 3, "rounds": 2, "schedule": ConstantSchedule(), **training}
    options = FederatedTraining(**training, local=LocalTraining(**(local or {})))
    return Federation(
        lenet() if model is None else model,
        defense=defense,
        dataset=dataset,
        training=options,
        seed=seed,
        execution=execution,
    )


def trained(run):
    """The federation after all its rounds."""
    list(run.run())
    return run


def one_update(run, client, *, round=0, state=None):
    """A client's round, without the server's."""
    return (
        run._pool.workers[0]
        .train(
            client,
            run.server.state if state is None else state,
            round=round,
            lr=run.training.lr_at(round),
            transform=run._transformed,
        )
        .update
    )


def copy_secrets(source, target):
    """Gives the clients of one federation the keys and private states of another one's."""
    for old, new in zip(source.clients, target.clients, strict=True):
        new.restore(
            key=old.key,
            private_state={name: tensor.clone() for name, tensor in old.private_state.items()},
            optimizer_state=copy.deepcopy(old.optimizer_state),
            rounds=old.rounds,
        )


def everything(run):
    """All that a federation keeps between rounds, by name."""
    tensors = dict(run.server.snapshot())
    for client in run.clients:
        place = client.name
        tensors[f"{place}/rounds"] = torch.tensor(client.rounds)
        if client.key is not None:
            tensors[f"{place}/key"] = client.key.reveal()
        tensors |= {f"{place}/private/{name}": t for name, t in client.private_state.items()}
        for name, slots in client.optimizer_state.items():
            tensors |= {f"{place}/optimizer/{name}/{slot}": t for slot, t in slots.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def differences(a, b):
    """Names at which two sets of tensors are not equal to the last bit."""
    missing = sorted(set(a) ^ set(b))
    return missing + [name for name in a if name in b and not torch.equal(a[name], b[name])]


def fedavg_by_hand(
    dataset,
    *,
    clients,
    rounds,
    optimizer,
    lr,
    model=lenet,
    epochs=1,
    batch_size=64,
    keep=True,
    pull=0.0,
    pulled=lambda name: True,
    augmentation="none",
):
    """FedAvg as one writes it in plain PyTorch: a model and an optimizer for each client, in a loop.

    Args:
        dataset: Divided as `IID` does it.
        clients: Number of clients.
        rounds: Number of rounds.
        optimizer: Makes an optimizer of parameters.
        lr: Learning rate by round.
        model: Makes a model with the initial weights.
        epochs: Local epochs.
        batch_size: Samples of a batch.
        keep: Whether a client's optimizer lives as long as the client.
        pull: μ of FedProx.
        pulled: Names that it concerns.
        augmentation: By name.
    """
    parts = data.IID().split(dataset.train_labels, clients=clients, generator=rng.generator(0, "partition"))
    server = model()
    locals_ = [model() for _ in range(clients)]
    optimizers = [optimizer(m.parameters()) for m in locals_]
    for round in range(rounds):
        start = {name: p.detach().clone() for name, p in server.named_parameters()}
        for index, local in enumerate(locals_):
            local.load_state_dict(server.state_dict())
            if not keep:
                optimizers[index] = optimizer(local.parameters())
            optimizers[index].param_groups[0]["lr"] = lr(round)
            for epoch in range(epochs):
                place = (f"client-{index}", round, epoch)
                order = torch.randperm(len(parts[index]), generator=rng.generator(0, "batches", *place))
                draws = rng.generator(0, "augmentation", *place)
                for batch in parts[index][order].split(batch_size):
                    optimizers[index].zero_grad()
                    images = AUGMENTATIONS[augmentation](dataset.train_images[batch], draws)
                    loss = F.cross_entropy(local(images), dataset.train_labels[batch])
                    distance = [
                        (p - start[name]).square().sum()
                        for name, p in local.named_parameters()
                        if pulled(name)
                    ]
                    (loss + pull / 2 * torch.stack(distance).sum()).backward()
                    optimizers[index].step()
        shares = [len(part) / len(dataset.train_labels) for part in parts]
        states = [local.state_dict() for local in locals_]
        server.load_state_dict(
            {
                name: sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
                for name in states[0]
            }
        )
    return server.state_dict()
