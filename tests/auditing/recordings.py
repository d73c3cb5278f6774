"""A small trained subject with clients, and what they sent; for tests of recorded updates."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from fedkl import Procedure, data
from fedkl.attacking.updates import local_update
from fedkl.auditing import RecordedClient, RecordedUpdate, Subject

SIZE = 4
GRADIENT = Procedure()


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))


def loop(network, inputs, labels):
    """What a client's own function does: two steps."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()


@cache
def weights():
    """Trained on images that no subject has."""
    dataset = data.load("mnist-sample", size=16, channels=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = net()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for batch in torch.arange(1000).repeat(5).split(50):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                network(dataset.train_images[batch]), dataset.train_labels[batch]
            )
            loss.backward()
            optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def subject(**fields):
    dataset = data.load("mnist-sample", size=16, channels=1)
    given = {
        "model": net,
        "weights": weights(),
        "images": dataset.train_images[1000:1400].clone(),
        "labels": dataset.train_labels[1000:1400],
        "procedure": GRADIENT,
        "images_per_client": SIZE,
        "name": "digits",
    }
    return Subject(**(given | fields))


def members(count, size=SIZE):
    """Of so many clients, spread over the subject's images."""
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    return [part.tolist() for part in order.split(size)[:count]]


def sent(audited, chosen):
    """What a client of these images sends, as a recording has it."""
    images, labels = audited.images[chosen], audited.labels[chosen]
    if audited.has_own_loop:
        network = audited.build()
        audited.procedure(network, audited.inputs(images), labels)
        return RecordedUpdate(tensors=network.state_dict(), kind="weights", received=weights(), source="node")
    tensors = local_update(audited.build(), images, labels, train_mode=True, local=audited.procedure)
    return RecordedUpdate(tensors=tensors, source="node")


def clients(audited, count):
    return [
        RecordedClient(update=sent(audited, chosen), members=chosen)
        for chosen in members(count, audited.images_per_client)
    ]
