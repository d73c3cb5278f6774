"""The image from a vision transformer's gradients, against the truth; what is said where it is not there."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkl.attacking import observe, trials_of
from fedkl.attacks import Knowledge, Positions, Procedure
from fedkl.attacks.algebraic.pixels import pixel_layers
from fedkl.attacks.algebraic.positions import _roughness
from fedkl.auditing.subject import Subject
from fedkl.defenses import Arm, NoDefense
from fedkl.errors import AttackError
from fedkl.metrics import psnr
from fedkl.models.vit import ViT

TORCH = torch.Generator


def transformer(features=32, **changes):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch": 4, "depth": 2, "heads": 2}
    return ViT(channels=3, classes=10, features=features, **(sizes | changes))


class Unfolded(nn.Module):
    """Patches through a linear layer, a normalization inside, and positions in an embedding's table."""

    def __init__(self):
        super().__init__()
        self.project, self.place = nn.Linear(48, 32), nn.Embedding(16, 32)
        self.block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        patches = F.unfold((x - 0.3) / 0.2, 4, stride=4).transpose(1, 2)
        tokens = self.project(patches) + self.place(torch.arange(16))
        return self.head(self.block(tokens).mean(1))


def huggingface():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=10, **sizes)
    return transformers.ViTForImageClassification(config)


def subject(images, build, normalization=None):
    """The network as an audit calls it."""
    return Subject(
        model=build,
        images=images.test_images[:40],
        labels=images.test_labels[:40],
        normalization=normalization,
    ).classifier()


def seen_of(images, model, *, index=0, batch_size=1, **changes):
    arm = Arm(name="seen", description="", defense=NoDefense(), knowledge=Knowledge(labels=False))
    trial = trials_of(images, trials=index + 1, batch_size=batch_size)[index]
    victim = arm.defense.prepare(model)
    return observe(victim, arm=arm, model=model, trial=trial, classes=10, **changes), trial


def quality(found, trial):
    return float(psnr(found.images.clamp(0, 1), trial.images))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", ["fedkl", "unfolded", "huggingface", "normalized"])
def test_with_fewer_patches_than_features_the_image_is_exact(images, name, index):
    torch.manual_seed(0)
    builds = {
        "fedkl": transformer,
        "unfolded": Unfolded,
        "huggingface": huggingface,
        "normalized": huggingface,
    }
    pair = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)) if name == "normalized" else None
    seen, trial = seen_of(images, subject(images, builds[name], pair), index=index)
    found = Positions().reconstruct(seen, generator=TORCH())
    assert quality(found, trial) > 60
    assert found.loss < 1e-6
    assert torch.equal(found.labels, trial.labels)


@pytest.mark.parametrize("index", range(3))
def test_what_the_norms_take_from_the_rank_is_filled_in(images, index):
    seen, trial = seen_of(images, transformer(features=16), index=index)  # rank 15 for 16 patches
    found = Positions().reconstruct(seen, generator=TORCH())
    blank = float(psnr(torch.full_like(trial.images, 0.5), trial.images))
    assert quality(found, trial) > blank + 10
    assert 1e-12 < found.loss < 1e-3


@pytest.mark.parametrize(
    ("local", "most"),
    [
        (Procedure(algorithm="fedavg", lr=0.1, weight_decay=0.1), 1e-6),
        (Procedure(algorithm="fedavg", lr=0.01, epochs=3, momentum=0.9), 0.5),  # of weights that move
    ],
    ids=["one step", "epochs"],
)
def test_weights_after_steps_of_sgd(images, local, most):
    seen, trial = seen_of(images, transformer(), local=local)
    found = Positions().reconstruct(seen, generator=TORCH())
    assert quality(found, trial) > 40
    assert found.loss < most


def test_what_it_cannot_explain_it_says(images):
    model = transformer()
    pair, _ = seen_of(images, model, batch_size=2)
    seen, _ = seen_of(images, model)
    noise = {name: torch.randn_like(g) * g.std() for name, g in seen.gradient.items()}
    for gradient, least in ((pair.gradient, 0.1), (noise, 0.9)):
        found = Positions().reconstruct(replace(seen, gradient=gradient), generator=TORCH())
        assert found.loss > least


def test_without_the_heads_gradient_it_tries_all_labels(images):
    seen, trial = seen_of(images, transformer())
    headless = {name: g for name, g in seen.gradient.items() if not name.startswith("head")}
    found = Positions().reconstruct(replace(seen, gradient=headless), generator=TORCH())
    assert quality(found, trial) > 60
    assert found.labels is None
    assert found.loss < 1e-6


def test_the_smoothest_image_has_no_force_left():
    image = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    rough = (image.diff(dim=1).square().sum() + image.diff(dim=2).square().sum()) / 2
    (slope,) = torch.autograd.grad(rough, image)
    torch.testing.assert_close(_roughness(image.detach()), slope)


def test_layers_on_pixels(images):
    seen, _ = seen_of(images, transformer())
    (layer,) = pixel_layers(seen)
    assert layer.name == "embedding.patches"
    picture = torch.rand(3, 16, 16)
    patches = F.unfold(picture[None], 4, stride=4)[0].T
    torch.testing.assert_close(layer.values(patches.double()), picture.flatten().double())
    assert math.prod(layer.pixels.shape) == picture.numel()
    overlapping = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(1024, 10))
    assert not pixel_layers(seen_of(images, overlapping)[0])


def test_refusals(images):
    model = transformer()
    seen, _ = seen_of(images, model)
    adam = Procedure(algorithm="fedavg", optimizer="adam")
    without = {name: g for name, g in seen.gradient.items() if name != "embedding.positions"}
    cases = {
        "at most 1 images behind an update, got 2": seen_of(images, model, batch_size=2)[0],
        "another optimizer": seen_of(images, model, local=adam)[0],
        "expected a vision transformer": replace(seen, gradient=without),
    }
    for message, observation in cases.items():
        with pytest.raises(AttackError, match=message):
            Positions().reconstruct(observation, generator=TORCH())


class OtherPositions(nn.Module):
    """Positions as CLIP has them, or of each row and column, beside an attention and a classifier."""

    def __init__(self, *shape):
        super().__init__()
        self.project, self.where = nn.Linear(48, 32), nn.Parameter(0.1 * torch.randn(shape))
        self.block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.answer = nn.Linear(32, 17)

    def forward(self, x):
        tokens = self.project(F.unfold(x, 4, stride=4).transpose(1, 2))
        places = self.where.flatten(0, -2)
        extra = torch.zeros(len(x), len(places) - 16, 32)
        return self.answer(self.block(torch.cat([extra, tokens], 1) + places).mean(1))


@pytest.mark.parametrize("shape", [(17, 32), (1, 4, 4, 32), (4, 4, 32)])
def test_positions_have_other_shapes(images, shape):
    torch.manual_seed(0)
    seen, trial = seen_of(images, OtherPositions(*shape))
    assert quality(Positions().reconstruct(seen, generator=TORCH()), trial) > 40
