"""A server that knows a defense gets more out of its updates than one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl import data, models
from fedkl.attacking import SimulatedClients, observe, trials_of
from fedkl.attacks import DLG
from fedkl.attacks.labels import infer_labels
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.defenses import own_arms
from fedkl.defenses.client_dp import ClientDP
from fedkl.defenses.clipping import Clipping
from fedkl.defenses.combined import Combined
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.defenses.local_dp import LocalDpMod
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.percentile import Percentile
from fedkl.defenses.pruning import Pruning
from fedkl.defenses.soteria import Soteria
from fedkl.defenses.sparse_vector import SparseVector
from fedkl.protocol import Auxiliary, Procedure, only_kept

TRIALS = 2
BLURRED = GaussianNoise(deviation=1e-5)


@pytest.fixture(scope="module")
def trials():
    return trials_of(data.load("mnist-sample"), trials=TRIALS)


def observations(defense, trials):
    found = []
    for trial in trials:
        model = models.build_model(
            "lenet", channels=3, classes=10, seed=trial.index, initialization="default"
        )
        arm = own_arms(defense)[defense.type]
        found.append(observe(defense.prepare(model), arm=arm, model=model, trial=trial, classes=10))
    return found


def error(seen, trials):
    """Mean squared error of what DLG finds; 0.4 and more at its start."""
    generators = [torch.Generator().manual_seed(trial.index) for trial in trials]
    found = DLG(evaluations=40).reconstruct_many(seen, generators=generators)
    images = torch.cat([each.images for each in found])
    return float((images - torch.cat([trial.images for trial in trials])).square().mean())


@pytest.mark.parametrize(
    "defense",
    [
        Pruning(keep=0.3),
        Percentile(),
        SparseVector(fraction=0.5, epsilon=1e9, noise_var=1e4, gamma=1.0, tau=1e-9),
        LocalDpMod(clipping_norm=0.1, sensitivity=1e-6),
        Combined(parts=(BLURRED, Pruning(keep=0.3))),
        Combined(parts=(Pruning(keep=0.3), Percentile(percentile=0.0))),
    ],
    ids=lambda defense: defense.describe(),
)
def test_matching_what_was_kept_beats_matching_all(defense, trials):
    seen = observations(defense, trials)
    informed, naive = error(seen, trials), error([replace(each, transform=None) for each in seen], trials)
    assert informed < 0.75 * naive


def test_a_server_that_takes_pruned_entries_for_gradients_is_an_arm(trials):
    """It is the one of DLG's section 5.2."""
    pruning = Pruning(keep=0.3)
    arms = own_arms(pruning)
    assert {name: arm.main for name, arm in arms.items()} == {
        "no-norm": True, "pruning": True, "pruning-naive": False
    }  # fmt: skip
    model = models.build_model("lenet", channels=3, classes=10, seed=0, initialization="default")
    transforms = [
        observe(pruning.prepare(model), arm=arm, model=model, trial=trials[0], classes=10).transform
        for arm in (arms["pruning"], arms["pruning-naive"])
    ]
    assert transforms == [only_kept, None]


@pytest.mark.parametrize(
    "noise", [GaussianNoise(deviation=1e-6), ClientDP(clip=1e3, noise_multiplier=1e-9)], ids=lambda d: d.type
)
@pytest.mark.parametrize(
    "filtering", [Pruning(keep=0.1), Percentile(percentile=90.0), Soteria()], ids=lambda d: d.type
)
def test_noise_on_what_was_filtered_does_not_hide_the_filter(filtering, noise, trials):
    """The true images fit what was sent, though no entry of it is zero."""
    seen = observations(Combined(parts=(filtering, noise)), trials)
    assert all(bool((tensor != 0).all()) for tensor in seen[0].gradient.values())
    matching = GradientMatching(seen, labels=[trial.labels for trial in trials])
    points = torch.stack([trial.images.double().flatten() for trial in trials])
    values, slopes = matching(points, torch.arange(len(trials)))
    assert float(values.max()) < 1e-3
    blind = GradientMatching(
        [replace(each, transform=None) for each in seen], labels=[trial.labels for trial in trials]
    )
    assert float(blind(points, torch.arange(len(trials)))[0].min()) > 0.1
    assert bool(matching(torch.rand_like(points), torch.arange(len(trials)))[1].isfinite().all())
    assert bool(slopes.isfinite().all())


def normless():
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 5, stride=4), nn.Sigmoid(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(196, 10))


def normed():
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(196, 10))


@pytest.fixture
def clipped_with_statistics():
    """Of weights after a step, of which running statistics are most, clipped together."""
    defense, local = Clipping(max_norm=0.05), Procedure(algorithm="fedavg", steps=1, lr=0.1)
    (trial,) = trials_of(data.load("mnist-sample"), trials=1, batch_size=4)
    arm, model = own_arms(defense)["clipping"], normed()
    victim = defense.prepare(model)
    seen = observe(victim, arm=arm, model=model, trial=trial, classes=10, local=local)
    return arm, victim, model, trial, seen


def test_played_clients_clip_running_statistics_along(clipped_with_statistics):
    arm, victim, model, trial, seen = clipped_with_statistics
    clients = SimulatedClients.of(arm, victim, model, local=seen.local)
    played = clients(trial.images[None].repeat(2, 1, 1, 1, 1), trial.labels[None].repeat(2, 1))
    assert set(played) == set(seen.gradient)
    for name, tensor in seen.gradient.items():
        for each in played[name]:
            torch.testing.assert_close(each, tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "most"),
    [
        ((Pruning(keep=0.5), Clipping(max_norm=0.05)), 1e-4),
        ((Clipping(max_norm=0.05), Pruning(keep=0.5)), 1e-4),
        ((GaussianNoise(deviation=0.01), Clipping(max_norm=0.05)), 0.9),
        ((DPSGD(clip=1.0, noise_multiplier=0.06), Clipping(max_norm=0.005)), 0.9),
    ],
    ids=["pruned before", "pruned after", "noise before", "noise of each step before"],
)
def test_a_factor_that_the_server_cannot_compute_is_left_open(parts, most):
    """At the true images only the noise is left; with the factor of images without it, more than all."""
    noisy = most > 0.1
    defense, local = Combined(parts=parts), Procedure(algorithm="fedavg", steps=1, lr=0.1)
    (trial,) = trials_of(data.load("mnist-sample"), trials=1, batch_size=4)
    arm = own_arms(defense)["combined"]
    model = normless() if noisy else normed()
    seen = observe(defense.prepare(model), arm=arm, model=model, trial=trial, classes=10, local=local)
    matching = GradientMatching([seen], labels=[trial.labels])
    value, _ = matching(trial.images.double().flatten()[None], torch.zeros(1, dtype=torch.long))
    assert float(value) < most


def test_matching_finds_the_factor_where_statistics_are_clipped_along(clipped_with_statistics):
    *_, trial, seen = clipped_with_statistics
    matching = GradientMatching([seen], labels=[trial.labels])
    value, _ = matching(trial.images.double().flatten()[None], torch.zeros(1, dtype=torch.long))
    assert float(value) < 1e-4


@pytest.mark.parametrize("wanted", [[2, 2, 2, 2], [0, 1, 1, 7]], ids=str)
@pytest.mark.parametrize(
    "defense",
    [
        Clipping(max_norm=0.01),
        LocalDpMod(clipping_norm=0.01, sensitivity=0.0),
        DPSGD(clip=0.01, noise_multiplier=0.0),
    ],
    ids=lambda d: d.type,
)
def test_labels_are_counted_whatever_was_clipped(defense, wanted, trials):
    model = models.build_model("lenet", channels=3, classes=10, seed=0, initialization="default")
    trial = replace(trials[0], images=trials[0].images.repeat(4, 1, 1, 1), labels=torch.tensor(wanted))
    arm = own_arms(defense)[defense.type]
    arm = replace(arm, knowledge=replace(arm.knowledge, labels=False))
    local = Procedure(algorithm="fedavg", steps=1, lr=0.1, weight_decay=0.01)
    seen = observe(defense.prepare(model), arm=arm, model=model, trial=trial, classes=10, local=local)
    assert infer_labels(seen).tolist() == wanted
    others = data.load("mnist-sample")
    own = Auxiliary(images=others.train_images, labels=others.train_labels, simulate=lambda x, y: {})
    assert infer_labels(replace(seen, auxiliary=own)).tolist() == wanted
