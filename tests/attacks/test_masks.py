"""Dropout's masks stand in the gradient of a single image, and a server that reads them sees as without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl.attacks import DLG
from fedkl.attacks.matching import objectives
from fedkl.attacks.matching.masks import read_masks
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.defenses.clipping import Clipping
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.pruning import Pruning
from fedkl.metrics import score
from fedkl.protocol import Procedure


class Headed(nn.Module):
    """Convolutions and two fully connected layers, with dropout before each of the two."""

    def __init__(self, *, between=nn.Identity):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 5, 2, 2),
            nn.Sigmoid(),
            nn.Dropout2d(0.4),
            nn.Conv2d(12, 8, 5, 2, 2),
            nn.Sigmoid(),
        )
        self.first, self.hidden = nn.Dropout(0.25), nn.Linear(128, 60)
        self.second, self.between, self.head = nn.Dropout(0.5), between(), nn.Linear(60, 10)

    def forward(self, x):
        rows = self.first(self.features(x)).flatten(1)
        return self.head(self.between(self.second(self.hidden(rows).sigmoid())))


NAMES = {"features.2", "first", "second"}


def with_masks(observed, model, **fields):
    """What the server sees, and what each dropout module multiplied by, as it happened."""
    drawn = {}

    def note(name):
        return lambda module, args, output: drawn.update({name: output / args[0]})

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in NAMES]
    found = observed(model=model, **fields)
    for handle in handles:
        handle.remove()
    return found, drawn


def test_what_was_drawn_is_read(observed):
    torch.manual_seed(0)
    (observation, *_), drawn = with_masks(observed, Headed())
    masks = read_masks(observation)
    assert masks.keys() == NAMES == drawn.keys()
    for name, mask in masks.items():
        assert 0 < (mask == 0).sum() < mask.numel()
        torch.testing.assert_close(mask.expand(drawn[name].shape[1:]), drawn[name][0])


@pytest.mark.parametrize("defense", [None, Clipping(max_norm=0.1)], ids=["none", "clipping"])
def test_at_the_true_images_nothing_is_left_of_each_problems_distance(observed, defense, monkeypatch):
    """Each has a mask of its own."""
    torch.manual_seed(0)
    model = Headed()
    seen = [with_masks(observed, model, defense=defense, index=index)[0] for index in (0, 1)]
    trials = [each[2] for each in seen]
    matching = GradientMatching([each[0] for each in seen], labels=[trial.labels for trial in trials])
    points = torch.stack([trial.images.flatten().double() for trial in trials])
    index = torch.tensor([0, 1])
    assert matching(points, index)[0].max() < 1e-10
    assert matching(points.flip(0), index)[0].min() > 1e-6
    monkeypatch.setattr(objectives, "read_masks", lambda observation: {})
    off = GradientMatching([each[0] for each in seen], labels=[trial.labels for trial in trials])
    assert off(points, index)[0].min() > 0.1
    assert all(isinstance(seen[0][0].model.get_submodule(name), nn.Module) for name in NAMES)
    assert isinstance(seen[0][0].model.first, nn.Dropout)  # the observation's own is as it was


def test_who_reads_them_sees_what_others_do_not(observed, images, monkeypatch):
    torch.manual_seed(0)
    (observation, _, trial), _ = with_masks(observed, Headed(), index=3)

    def found():
        generator = torch.Generator().manual_seed(0)
        attack = DLG(evaluations=150, weighting="sqrt")
        rebuilt = attack.reconstruct(observation, generator=generator)
        return score(
            rebuilt.images,
            trial.images,
            candidates=images.test_images[:100],
            candidate_index=[3],
            scaling="clip",
        )[0]

    informed = found()
    monkeypatch.setattr(objectives, "read_masks", lambda observation: {})
    naive = found()
    assert informed.identified
    assert informed.psnr > naive.psnr + 5


class Shared(Headed):
    """One dropout module for both layers: whose mask would it be?"""

    def __init__(self):
        super().__init__()
        self.second = self.first


class Added(Headed):
    """What is dropped is added to something before a layer sees it, as in transformers."""

    def forward(self, x):
        rows = self.features(x).flatten(1)
        return self.head(self.hidden(rows + self.first(rows)).sigmoid())


class Rows(nn.Module):
    """A layer that sees several rows, each with a mask of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.head = nn.Dropout(0.25), nn.Linear(16, 4), nn.Linear(192, 10)

    def forward(self, x):
        return self.head(self.hidden(self.first(x)).flatten(1))


class Refusing(Headed):
    """It cannot be called without gradients."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            raise ValueError
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "fields", "read"),
    [
        (Headed, {"batch_size": 2}, set()),
        (Headed, {"local": Procedure(steps=2, lr=0.1)}, set()),
        (Headed, {"defense": GaussianNoise(deviation=1e-4)}, set()),
        (Headed, {"defense": Pruning(keep=0.5)}, set()),
        (lambda: Headed(between=nn.Tanh), {}, {"features.2", "first"}),
        (lambda: Headed(between=lambda: nn.ReLU(inplace=True)), {}, NAMES),
        (Headed, {"local": Procedure(algorithm="fedavg", steps=1, lr=0.1)}, NAMES),
        (Shared, {}, {"features.2"}),
        (Added, {}, {"features.2"}),
        (Rows, {}, set()),
        (Refusing, {}, set()),
    ],
    ids=[
        "two images", "two steps", "noise", "pruning", "a tanh between", "in place", "weights", "shared",
        "added", "rows", "refusing",
    ],
)  # fmt: skip
def test_what_is_not_shown_is_not_read(observed, model, fields, read):
    torch.manual_seed(0)
    observation, _, trial = observed(model=model(), **fields)
    assert read_masks(observation).keys() == read
    matching = GradientMatching([observation], labels=[trial.labels])  # what is not read is off
    point = trial.images.flatten().double()[None]
    assert len({float(matching(point, torch.tensor([0]))[0]) for _ in range(2)}) == 1


def test_an_observation_in_eval_mode_has_no_masks(observed):
    observation, *_ = observed(model=Headed().eval())
    assert read_masks(observation).keys() == NAMES  # fedkl's clients train in train mode
    assert not read_masks(replace(observation, train_mode=False))
