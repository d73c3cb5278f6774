"""What a fully connected layer got, from rows of its gradient: exact, or not claimed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl.attacking import attack_arms, observe, trials_of
from fedkl.attacks import Auxiliary, Knowledge, LinearRows, Procedure
from fedkl.attacks.algebraic.first_linear import unexplained
from fedkl.auditing.subject import Subject
from fedkl.defenses import Arm, KeyLock, NoDefense, PrivateNorm
from fedkl.defenses.clipping import Clipping
from fedkl.defenses.combined import Combined
from fedkl.defenses.local_dp import LocalDpMod
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.percentile import Percentile
from fedkl.defenses.pruning import Pruning
from fedkl.defenses.sparse_vector import SparseVector
from fedkl.errors import AttackError
from fedkl.metrics import psnr

EXACT = 60  # dB
PAIR = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def perceptron(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, classes)
    )


def behind_convolutions(norm=nn.Identity):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), norm(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(128, 48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip


def seen_of(images, model, *, batch_size=1, defense=None, **changes):
    arm = Arm(name="seen", description="", defense=defense or NoDefense(), knowledge=Knowledge(labels=False))
    (trial,) = trials_of(images, trials=1, batch_size=batch_size)
    victim = arm.defense.prepare(model)
    return observe(victim, arm=arm, model=model, trial=trial, classes=10, **changes), trial


def qualities(found, trial):
    """Of every image that was found, the best PSNR to an image of the batch."""
    claimed = [image for image in found.images if bool(image.isfinite().all())]
    return [max(float(psnr(image[None], truth[None])) for truth in trial.images) for image in claimed]


def reconstructed(seen):
    return LinearRows().reconstruct(seen, generator=torch.Generator())


@pytest.mark.parametrize("local", [None, Procedure(algorithm="fedavg", lr=0.1, epochs=3, momentum=0.9)])
def test_one_image_is_exact_behind_a_normalization(images, local):
    model = Subject(
        model=perceptron,
        images=images.test_images[:40],
        labels=images.test_labels[:40],
        normalization=PAIR,
    ).classifier()
    seen, trial = seen_of(images, model, local=local)
    found = reconstructed(seen)
    assert qualities(found, trial)[0] > EXACT
    assert found.loss < 1e-10
    assert torch.equal(found.labels, trial.labels)


def test_of_a_batch_what_is_claimed_is_exact(images):
    seen, trial = seen_of(images, perceptron(), batch_size=4)
    found = reconstructed(seen)
    exact = qualities(found, trial)
    assert len(exact) >= 3
    assert min(exact) > EXACT


def test_weights_after_a_step(images):
    local = Procedure(algorithm="fedavg", lr=0.1, weight_decay=0.01)
    seen, trial = seen_of(images, perceptron(), batch_size=3, local=local)
    exact = qualities(reconstructed(seen), trial)
    assert len(exact) >= 2
    assert min(exact) > 50


def test_rows_of_several_images_are_not_taken_for_one(images):
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Sigmoid(), nn.Linear(64, 10))
    found = reconstructed(seen_of(images, smooth, batch_size=4)[0])
    assert not found.images.isfinite().any()
    assert found.loss == 1
    noise, _ = seen_of(images, perceptron(), batch_size=4)
    noise = replace(noise, gradient={name: torch.randn_like(g) for name, g in noise.gradient.items()})
    assert not reconstructed(noise).images.isfinite().any()


def test_the_loss_is_what_is_left_unexplained():
    x, other = torch.randn(2, 5, dtype=torch.float64)
    one = torch.outer(torch.tensor([1.0, -2.0, 0.5]).double(), torch.cat([x, torch.ones(1)]))
    assert unexplained(one, x[None]) < 1e-20
    assert unexplained(one, other[None]) > 0.1
    assert unexplained(one, x[None][:0]) == 1


def test_features_are_inverted_with_own_images(images):
    found, model = [], behind_convolutions()
    arm = Arm(name="a", description="", defense=NoDefense(), knowledge=Knowledge(labels=False, auxiliary=500))
    attack_arms(
        [arm],
        attack=LinearRows(),
        build=lambda _: model,
        dataset=images,
        trials=trials_of(images, trials=2, batch_size=2),
        seed=0,
        on_result=found.append,
    )
    scores = [score for one in found for score in one.scores]
    assert sum(score.identified for score in scores) >= 3
    assert all(one.reconstruction.loss < 1e-6 for one in found)


def test_refusals(images):
    adam = Procedure(algorithm="fedavg", optimizer="adam")
    mixed, _ = seen_of(images, behind_convolutions(nn.BatchNorm2d), batch_size=2)
    convolutions = nn.Sequential(nn.Conv2d(3, 10, 16), nn.Flatten())
    cases = {
        "another optimizer": seen_of(images, perceptron(), local=adam)[0],
        "more than two classes": replace(seen_of(images, perceptron(), batch_size=2)[0], classes=2),
        "at least 100 auxiliary images": seen_of(images, behind_convolutions())[0],
        "batch statistics": mixed,
        "got none": seen_of(images, convolutions)[0],
    }
    for message, observation in cases.items():
        with pytest.raises(AttackError, match=message):
            reconstructed(observation)


@pytest.mark.parametrize(
    "local", [Procedure(), Procedure(algorithm="fedavg", lr=0.1, steps=3, momentum=0.9, weight_decay=1e-3)]
)
def test_of_a_pruned_update_what_was_kept_is_exact(images, local):
    """And what was kept in no row is small: with it taken for 0, the image is as good as there."""
    seen, trial = seen_of(images, perceptron(), defense=Pruning(keep=0.1), local=local)
    (found,) = reconstructed(seen).images
    (truth,) = trial.images
    kept = found != 0
    torch.testing.assert_close(found[kept], truth[kept], atol=1e-4, rtol=0)
    assert int(kept.sum()) > 0.9 * int((truth > 0).sum())
    assert float(psnr(found[None], truth[None])) > 30
    with pytest.raises(AttackError, match="got a transformed update"):
        reconstructed(replace(seen, transform=lambda change, observed: change))


def test_of_pruned_updates_only_images_are_read(images):
    x, y = images.train_images[:200], images.train_labels[:200]
    own = Auxiliary(images=x, labels=y, simulate=lambda x, y: {}, draw=dict)
    for model, changes in ((perceptron(), {"batch_size": 2}), (behind_convolutions(), {"auxiliary": own})):
        seen, _ = seen_of(images, model, defense=Pruning(), **changes)
        with pytest.raises(AttackError, match="of a pruned update, expected one of one image"):
            reconstructed(seen)


@pytest.mark.parametrize(
    "defense",
    [
        LocalDpMod(clipping_norm=0.1, sensitivity=0.0),
        Combined(parts=(Clipping(max_norm=0.1), GaussianNoise(deviation=1e-12))),
        Combined(parts=(LocalDpMod(sensitivity=0.0), Clipping(max_norm=0.1))),
    ],
    ids=lambda defense: defense.describe(),
)
def test_what_is_clipped_and_by_whomever_is_exact_up_to_a_factor(images, defense):
    seen, trial = seen_of(images, perceptron(), defense=defense)
    assert min(qualities(reconstructed(seen), trial)) > EXACT


@pytest.mark.parametrize("max_norm", [1e9, 1e-3], ids=["longer than it", "clipped"])
def test_weight_decay_in_a_clipped_update_is_a_small_error(images, max_norm):
    local = Procedure(algorithm="fedavg", lr=0.1, steps=1, weight_decay=5e-4)
    seen, trial = seen_of(images, perceptron(), defense=Clipping(max_norm=max_norm), local=local)
    assert qualities(reconstructed(seen), trial)[0] > 30
    plain, _ = seen_of(images, perceptron(), local=Procedure())
    read = seen.as_gradient()
    assert read.local.is_gradient
    for name, expected in plain.gradient.items():
        cosine = torch.cosine_similarity(read.gradient[name].flatten(), expected.flatten(), dim=0)
        assert float(cosine) > 0.99


def test_the_only_part_that_changes_updates_is_known_as_it_is():
    assert Combined(parts=(KeyLock(), Clipping())).public_transform == Clipping().public_transform
    assert Combined(parts=(PrivateNorm(), Pruning())).public_transform is Pruning().public_transform


def test_what_was_sent_with_noise_is_not_taken_for_exact(images):
    for defense in (SparseVector(), Combined(parts=(GaussianNoise(), Pruning()))):
        seen, _ = seen_of(images, perceptron(), defense=defense)
        with pytest.raises(AttackError, match="got a transformed update"):
            reconstructed(seen)


@pytest.mark.parametrize(
    "local", [Procedure(), Procedure(algorithm="fedavg", lr=0.1)], ids=["gradient", "weights"]
)
def test_nvflares_percentile_filter_leaves_small_entries_as_they_are(images, local):
    """What is neither dropped nor cut off is read; where all was cut off, nothing is taken for it."""
    seen, trial = seen_of(images, perceptron(), defense=Percentile(gamma=10.0), local=local)
    (found,), (truth,) = reconstructed(seen).images, trial.images
    kept = found != 0
    assert int(kept.sum()) > 0.9 * int((truth > 0).sum())
    torch.testing.assert_close(found[kept], truth[kept], atol=1e-4, rtol=0)
    cut, _ = seen_of(images, perceptron(), defense=Percentile(gamma=1e-12), local=local)
    assert not reconstructed(cut).images.isfinite().any()
