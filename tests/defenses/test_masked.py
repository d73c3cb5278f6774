"""Single uploads of masked clients: what reads the plain network reads nothing here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedkl import data, experiments
from fedkl.attacks import InvertingGradients
from fedkl.config import AttackConfig, ModelConfig
from fedkl.defenses.masked import MaskedUpload
from fedkl.errors import ConfigError
from fedkl.federated import FederatedTraining, Federation
from fedkl.protocol import Sending
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec
from tests.federated.setting import lenet

SPECS = {"w": TensorSpec(shape=(200, 300), dtype=torch.float32), "n": TensorSpec(shape=(), dtype=torch.int64)}


def update(value):
    tensors = {"w": torch.full((200, 300), value), "n": torch.tensor(3)}
    schema = PublicSchema(kind="gradient", specs=SPECS)
    return PublicUpdate(schema=schema, tensors=tensors, num_samples=1, round=0)


@pytest.mark.parametrize("mode", ["blind", "pairwise", "both"])
def test_what_is_seen_does_not_depend_on_what_is_sent(mode):
    seen = [
        MaskedUpload(mode=mode).transform(update(value), client=Sending(received={})).tensors
        for value in (0.0, 1.0, 1.0)
    ]
    for each in seen:
        assert float(each["w"].abs().max()) <= 0.01
        assert abs(float(each["w"].mean())) < 0.01 / 60_000**0.5 * 7
        counts = torch.histc(each["w"], bins=16, min=-0.01, max=0.01)
        assert float(((counts - 3750) ** 2 / 3750).sum()) < 100
    for other in (seen[0], seen[2]):
        together = torch.stack([seen[1]["w"].flatten(), other["w"].flatten()]).corrcoef()[0, 1]
        assert abs(float(together)) < 7 / 60_000**0.5


def test_the_same_words_without_masks_would_be_found():
    """The control: a constant update, unmasked, is one number over and over."""
    numbers = update(1.0).tensors["w"]
    assert torch.histc(numbers, bins=16, min=-2, max=2).max() == 60_000


def test_it_is_not_for_training(dataset_of_digits):
    with pytest.raises(ConfigError, match=r"fedkl train --masking both"):
        Federation(
            lenet(),
            defense=MaskedUpload(mode="both"),
            dataset=dataset_of_digits,
            training=FederatedTraining(clients=3),
            seed=0,
        )


@pytest.fixture(scope="module")
def dataset_of_digits():
    return data.load("mnist-sample")


def test_an_attack_that_reads_its_control_reads_nothing_behind_masks(tmp_path):
    config = AttackConfig(
        model=ModelConfig(initialization="default"),
        defense=MaskedUpload(),
        attack=InvertingGradients(iterations=60),
        trials=2,
    )
    directory = experiments.run(config, out=tmp_path / "run")
    arms = {arm["name"]: arm for arm in directory.summary["arms"]}
    assert arms["no-norm"]["identified"]["rate"] == 1
    assert arms["masked"]["identified"]["rate"] < 1  # one of two is hit by chance now and then


@pytest.mark.parametrize("kind", ["gradient", "weights"])
def test_played_members_send_what_real_ones_do(kind):
    """A change that is random numbers: else an attacker learns of uploads that nobody sends."""
    received = {"w": torch.full((200, 300), 5.0), "n": torch.tensor(3)}
    real = update(6.0)
    real = replace(real, schema=PublicSchema(kind=kind, specs=SPECS))
    sent = MaskedUpload().transform(real, client=Sending(received=received)).tensors["w"]
    change = sent - received["w"] if kind == "weights" else sent
    played = MaskedUpload().imitate_transform(
        {"w": torch.ones(1, 200, 300)},
        clients=[Sending(received=received)],
        generator=torch.Generator().manual_seed(0),
    )["w"]
    for each in (change, played):
        assert float(each.abs().max()) <= 0.01001
        assert abs(float(each.std()) - 0.01 / 3**0.5) < 1e-4
