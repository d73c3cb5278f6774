"""What differential privacy a combination has, and what its parts may look at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch

from fedkl.defenses import KeyLock, NoDefense
from fedkl.defenses.changing import UpdateDefense
from fedkl.defenses.client_dp import ClientDP
from fedkl.defenses.combined import Combined
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.pruning import Pruning
from fedkl.defenses.soteria import Soteria
from fedkl.errors import UpdateError
from fedkl.protocol import Procedure, Sending
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec

LOCAL = Procedure(algorithm="fedavg", epochs=2, batch_size=10)
IMAGES, CLIENTS = DPSGD(noise_multiplier=2.0), ClientDP(noise_multiplier=3.0)
LOOKING = Soteria()


@pytest.mark.parametrize(
    ("parts", "guarantees"),
    [
        ((IMAGES, Pruning()), IMAGES),
        ((Pruning(), IMAGES), IMAGES),
        ((KeyLock(), IMAGES, GaussianNoise()), IMAGES),
        ((IMAGES, LOOKING), None),
        ((LOOKING, IMAGES), None),  # training comes first
        ((CLIENTS, Pruning()), CLIENTS),
        ((Pruning(), CLIENTS), CLIENTS),
        ((LOOKING, CLIENTS), CLIENTS),  # any change is clipped, whatever it is
        ((CLIENTS, LOOKING), None),
        ((IMAGES, CLIENTS), CLIENTS),
        ((CLIENTS, IMAGES), IMAGES),
        ((IMAGES, replace(IMAGES, noise_multiplier=0.0)), None),  # that one trains
        ((replace(IMAGES, noise_multiplier=0.0), IMAGES), IMAGES),
        ((Combined(parts=(IMAGES, Pruning())), GaussianNoise()), IMAGES),
        ((Combined(parts=(IMAGES, Pruning())), LOOKING), None),
        ((Pruning(), NoDefense()), None),
    ],
)
def test_a_combination_is_as_private_as_the_rule_says(parts, guarantees):
    defense = Combined(parts=parts)
    expected = guarantees and guarantees.privacy(guarantees.procedure(LOCAL), samples=100)
    assert defense.privacy(defense.procedure(LOCAL), samples=100) == expected
    assert (expected is None) == (guarantees is None)


@dataclass(frozen=True, kw_only=True)
class Looking(UpdateDefense):
    """Sends the mean of the images, and does not say so."""

    type: Literal["test-looking"] = "test-looking"

    def changed(self, change, *, draws, client):
        if client.sample is None and client.network is None:
            raise UpdateError("nothing at hand")
        return change


def test_a_part_has_no_images_at_hand_that_does_not_say_that_it_looks_at_them():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    tensors = {name: torch.ones_like(p) for name, p in network.named_parameters()}
    specs = {n: TensorSpec(shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()}
    schema = PublicSchema(kind="gradient", specs=specs, private=frozenset())
    update = PublicUpdate(schema=schema, tensors=tensors, num_samples=1, round=0)
    client = Sending.of(tensors, network, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    silent, says = (Combined(parts=(each, Pruning())) for each in (Looking(), Soteria()))
    with pytest.raises(UpdateError, match="nothing at hand"):
        silent.transform(update, client=client)
    with pytest.raises(UpdateError, match="nothing at hand"):
        silent.imitate_transform(
            {name: tensor[None] for name, tensor in tensors.items()},
            clients=[client],
            generator=torch.Generator(),
        )
    assert says.transform(update, client=client).tensors.keys() == tensors.keys()
