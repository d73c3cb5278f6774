"""GGL on real images: it beats its random start, knows public transforms, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fedkl.attacks import GGL, Observation
from fedkl.attacks.generators.files import ConditionalGenerator, GeneratorInfo, load_generator, save_generator
from fedkl.attacks.matching.ggl import _Candidates, _Drawing
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import score


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def mse(reconstruction, images):
    return float((reconstruction.images - images).square().mean())


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (
            GGL(generator="mnist", generations=1, population=20),
            GGL(generator="mnist", generations=40, population=20),
        ),
        (
            GGL(generator="mnist", optimizer="adam", iterations=1),
            GGL(generator="mnist", optimizer="adam", iterations=60),
        ),
    ],
    ids=["cma", "adam"],
)
def test_beats_its_random_start(short, long, observe_plain, dataset):
    cases = [observe_plain(first=i, labels=False) for i in range(2)]
    observations = [observation for observation, _, _ in cases]

    def attacked(attack):
        return attack.reconstruct_many(observations, generators=[seeded(i) for i in range(2)])

    start, found = attacked(short), attacked(long)
    images = [image for _, image, _ in cases]
    assert sum(map(mse, found, images)) < 0.6 * sum(map(mse, start, images))
    for index, (_, image, label) in enumerate(cases):
        assert torch.equal(found[index].labels, label)
        assert found[index].loss < start[index].loss
        assert found[index].scaling == "clip"
        (scored,) = score(
            found[index].images,
            image,
            candidates=dataset.test_images[:100],
            candidate_index=[index],
            scaling="clip",
        )
        assert not scored.failed
    assert found[0].evaluations == (800 if long.optimizer == "cma" else 60)


def test_seeds_decide_and_company_does_not(observe_plain):
    observations = [observe_plain(first=i)[0] for i in range(2)]
    attack = GGL(generator="mnist", generations=3, population=8)
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the one that cma must leave alone
    together = attack.reconstruct_many(observations, generators=[seeded(0), seeded(1)])
    alone = attack.reconstruct(observations[1], generator=seeded(1))
    other = attack.reconstruct(observations[1], generator=seeded(2))
    assert torch.equal(together[1].images, alone.images)
    assert together[1].loss == alone.loss
    assert not torch.equal(other.images, alone.images)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_the_best_restart_is_chosen_by_its_loss(observe_plain):
    observation, _, _ = observe_plain()
    attack = GGL(generator="mnist", generations=2, population=6)
    several = dataclasses.replace(attack, restarts=3).reconstruct(observation, generator=seeded(0))
    generator = seeded(0)
    losses = [attack.reconstruct(observation, generator=generator).loss for _ in range(3)]
    assert several.loss == min(losses)
    assert several.start == losses.index(min(losses))


def clipped(gradient, seen=None):
    """A public transform: every tensor to norm 1e-3, and its signs only."""
    return {name: 1e-3 * tensor.sign() for name, tensor in gradient.items()}


def test_a_public_transform_is_applied_to_the_candidates_too(observe_plain):
    plain, image, label = observe_plain()
    changes = {"gradient": clipped(plain.gradient)}
    knowing = dataclasses.replace(plain, **changes, transform=clipped)
    naive = dataclasses.replace(plain, **changes)

    def loss(observation):
        return float(_Candidates([observation], labels=[label], dtype=torch.float32).losses(image, label))

    assert loss(plain) < 1e-6
    assert loss(knowing) < 0.05 < loss(naive)


def test_gray_images_serve_color_networks():
    draw = _Drawing(load_generator("mnist"), (3, 32, 32), 3.0)
    images = draw(torch.randn(2, draw.latent), torch.tensor([4]))
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])


def test_latent_values_stay_within_the_bound():
    seen = []

    class Recording(ConditionalGenerator):
        def forward(self, z, labels):
            seen.append(z)
            return super().forward(z, labels)

    info = GeneratorInfo(dataset="toy", classes=2, channels=1, latent=3, width=4)
    _Drawing(Recording(info), (1, 32, 32), 2.0)(torch.tensor([[-50.0, 0.0, 50.0]]), torch.tensor([1]))
    torch.testing.assert_close(seen[0], torch.tensor([[-2.0, 0.0, 2.0]]))


class Fragile(nn.Module):
    """NaN for images brighter than `limit`."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, 10)
        self.limit = 2.0

    def forward(self, x):
        return self.fc(x.flatten(1)) * torch.where(x.mean() > self.limit, torch.nan, 1.0)


def test_candidates_that_diverge_cost_nothing_but_themselves(observe_plain):
    model = Fragile()
    observation, _, _ = observe_plain(model=model)
    attack = GGL(generator="mnist", generations=4, population=12)
    model.limit = 0.13  # some of the drawn digits are brighter
    found = attack.reconstruct(observation, generator=seeded(0))
    assert found.images.mean() <= 0.13
    assert found.loss < float("inf")
    model.limit = -1.0
    failed = attack.reconstruct(observation, generator=seeded(0))
    assert failed.loss == float("inf")
    assert bool(failed.images.isnan().all())
    adam = dataclasses.replace(attack, optimizer="adam", iterations=2)
    assert bool(adam.reconstruct(observation, generator=seeded(0)).images.isnan().all())


def test_refusals(observe_plain, generator, tmp_path):
    batch, _, _ = observe_plain(batch_size=2)
    with pytest.raises(AttackError, match="one image behind a gradient, got a batch of 2"):
        GGL(generator="mnist").reconstruct(batch, generator=generator)
    one, _, _ = observe_plain(labels=False)
    with pytest.raises(AttackError, match="mnist and cifar10 both draw"):
        GGL().reconstruct(one, generator=generator)
    headless = {name: g for name, g in one.gradient.items() if not name.startswith("fc.")}
    with pytest.raises(AttackError, match="gradient of the last linear layer"):
        GGL(generator="mnist").reconstruct(dataclasses.replace(one, gradient=headless), generator=generator)
    with pytest.raises(ConfigError, match="neither one of mnist, cifar10 nor a file"):
        GGL(generator="celeba").reconstruct(one, generator=generator)
    toy = tmp_path / "toy.safetensors"
    save_generator(ConditionalGenerator(GeneratorInfo(dataset="toy", classes=3, channels=1)), toy)
    with pytest.raises(
        AttackError, match=r"\(1, 32, 32\) in 3 classes, expected images of shape \(3, 32, 32\) in 10"
    ):
        GGL(generator=str(toy)).reconstruct(one, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    small = Observation(
        model=model,
        gradient={name: torch.ones_like(p) for name, p in model.named_parameters()},
        image_shape=(1, 8, 8),
        classes=10,
        batch_size=1,
    )
    with pytest.raises(AttackError, match=r"no generator in the package draws.*fedkl generator train"):
        GGL().reconstruct(small, generator=generator)


@pytest.mark.parametrize(
    "wrong",
    [{"population": 3}, {"generations": 0}, {"restarts": 0}, {"iterations": 0}, {"bound": 0.0}, {"lr": -1.0}],
)
def test_unusable_settings_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}.*got {value}"):
        GGL(**wrong)


def test_an_unknown_optimizer_is_refused(unchecked):
    with pytest.raises(ConfigError, match="optimizer cma or adam, got 'sgd'"):
        GGL(optimizer="sgd")
