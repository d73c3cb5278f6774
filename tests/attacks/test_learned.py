"""The learned inversion: what simulated clients teach, its choice of views, and what it refuses."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch

from fedkl import rng
from fedkl.attacking import SimulatedClients, attack_arms, trials_of
from fedkl.attacks import Knowledge, LearnedInversion, PriorOnly, Procedure
from fedkl.attacks.learned import inversion as learned
from fedkl.attacks.learned import kernels
from fedkl.attacks.learned.kernels import Views, best_regression
from fedkl.defenses import Arm, KeyLock, NoDefense
from fedkl.errors import AttackError, ConfigError, DataError

SMALL = LearnedInversion(simulations=400)


def attacked(
    images,
    model,
    attack,
    defense=None,
    *,
    batch_size=1,
    trials=8,
    auxiliary=400,
    labels=True,
    updates_per_client=1,
):
    """Results of one arm, all trials on one network."""
    found = []
    arm = Arm(
        name="one",
        description="",
        defense=defense or NoDefense(),
        knowledge=Knowledge(labels=labels, auxiliary=auxiliary),
    )
    attack_arms(
        [arm],
        attack=attack,
        build=lambda trial: model,
        dataset=images,
        trials=trials_of(images, trials=trials, batch_size=batch_size),
        seed=0,
        updates_per_client=updates_per_client,
        on_result=found.append,
    )
    return found


def mean_error(results):
    return float(np.mean([score.mse for result in results for score in result.scores]))


def identified(results):
    return sum(score.identified for result in results for score in result.scores)


def test_reads_an_undefended_update_and_does_better_than_the_label_alone(images, small):
    model = small()
    learned, floor = (attacked(images, model, attack) for attack in (SMALL, PriorOnly()))
    assert mean_error(learned) < 0.5 * mean_error(floor)
    assert identified(learned) == 8
    assert identified(floor) < 4
    assert learned[0].reconstruction.loss < 0.5


def test_reads_an_update_behind_a_lock_that_it_never_saw(images, small):
    model = small()
    learned, floor = (
        attacked(images, model, attack, KeyLock(), trials=20) for attack in (SMALL, PriorOnly())
    )
    assert mean_error(learned) < 0.8 * mean_error(floor)
    assert identified(learned) > identified(floor)


def test_tells_the_images_of_a_batch_apart_by_their_labels(images, small):
    model = small()
    learned, floor = (
        attacked(images, model, attack, batch_size=2, labels=False) for attack in (SMALL, PriorOnly())
    )
    assert all(result.reconstruction.images.shape == (2, 3, 16, 16) for result in learned)
    assert mean_error(learned) < 0.8 * mean_error(floor)


def test_learns_nothing_from_updates_that_do_not_depend_on_the_image(images, small):
    """With a simulation that ignores its images, only the label is left, and the loss says so."""

    class Deaf(LearnedInversion):
        def _simulated(self, observation, own, count, generator, on_evaluation, **rest):
            views, truth = super()._simulated(observation, own, count, generator, on_evaluation, **rest)
            for name in views.per_update:
                views.per_update[name].normal_(generator=generator)
            for name in views.per_image:
                if name != "class":
                    views.per_image[name].normal_(generator=generator)
            return views, truth

    model = small()
    deaf, floor = (attacked(images, model, attack) for attack in (Deaf(simulations=400), PriorOnly()))
    assert mean_error(deaf) > 0.9 * mean_error(floor)
    assert deaf[0].reconstruction.loss > 0.7


def test_one_fit_serves_all_observations_of_a_network(images, small, monkeypatch):
    fits = []
    learn = LearnedInversion._learn
    monkeypatch.setattr(
        LearnedInversion,
        "_learn",
        lambda self, own, group, *rest, **like: (
            fits.append(len(group)) or learn(self, own, group, *rest, **like)
        ),
    )
    attacked(images, small(), SMALL, KeyLock(), trials=3)
    assert fits == [3]


def test_a_label_of_its_own_for_every_simulated_image(images, small, monkeypatch):
    """One lot of simulations per label that is asked about; what is chosen for the first serves all."""
    simulated, chosen = [], []
    simulate, choose = SimulatedClients.__call__, learned.best_regression

    def noted(self, x, y):
        simulated.append(y.unique().tolist())
        return simulate(self, x, y)

    def chosen_like(*args, like):
        assert like is (chosen[-1] if chosen else None)
        chosen.append(choose(*args, like=like))
        return chosen[-1]

    monkeypatch.setattr(SimulatedClients, "__call__", noted)
    monkeypatch.setattr(learned, "best_regression", chosen_like)
    found = attacked(images, small(), replace(SMALL, per_label=True), trials=8)
    labels = [int(result.reconstruction.labels) for result in found]
    assert [int(label) for label in images.test_labels[:8]] == labels
    assert len(set(labels)) < len(labels)
    runs = [label for label, _ in itertools.groupby(simulated)]
    assert runs == [[label] for label in dict.fromkeys(labels)]
    assert len({(each.names, each.width, each.ridge) for each in chosen}) == 1


def test_simulations_with_the_label_teach_more(images, small):
    model = small()
    plain, per_label = (
        attacked(images, model, replace(SMALL, per_label=each), KeyLock(), trials=20)
        for each in (False, True)
    )
    assert mean_error(per_label) < 0.9 * mean_error(plain)


@pytest.mark.parametrize("changes", [{"batch_size": 2}, {"updates_per_client": 2}])
def test_per_label_is_for_single_images_of_different_clients(images, small, changes):
    with pytest.raises(AttackError, match="per_label expects updates of one image, each of another client"):
        attacked(images, small(), replace(SMALL, per_label=True), trials=2, **changes)


def test_needs_auxiliary_images(images, small, observed):
    seen, _, _ = observed()
    for attack, least in ((SMALL, 40), (PriorOnly(), 1)):
        with pytest.raises(AttackError, match=rf"at least {least} auxiliary images .* got 0\."):
            attack.reconstruct(seen, generator=torch.Generator())
    with pytest.raises(AttackError, match=r"at least 60 auxiliary images .* got 50"):
        attacked(images, small(), SMALL, batch_size=8, trials=1, auxiliary=50)
    with pytest.raises(DataError, match="at most 2000, the training images of mnist-sample, got 10000"):
        attacked(images, small(), SMALL, trials=1, auxiliary=10_000)


def test_refuses_what_it_does_not_look_for(images, small):
    arm = Arm(
        name="free", description="", defense=KeyLock(), knowledge=Knowledge(auxiliary=100), regress="affine"
    )
    with pytest.raises(AttackError, match="nothing may be free, got"):
        attack_arms(
            [arm], attack=SMALL, build=lambda trial: small(), dataset=images,
            trials=trials_of(images, trials=1), seed=0, on_result=print,
        )  # fmt: skip


@pytest.mark.parametrize("options", [{"simulations": 39}, {"updates_per_client": 0}])
def test_settings_out_of_range(options):
    with pytest.raises(ConfigError, match="expected"):
        LearnedInversion(**options)


@pytest.mark.parametrize(("auxiliary", "expected"), [(60, 70), (80, 80)])
def test_every_auxiliary_image_has_an_update(images, small, monkeypatch, auxiliary, expected):
    monkeypatch.setattr("fedkl.attacks.learned.inversion._SIMULATIONS", 70)
    [result] = attacked(images, small(), LearnedInversion(), trials=1, auxiliary=auxiliary)
    assert result.reconstruction.evaluations == expected


@pytest.mark.parametrize("guess", ["mean", "class-mean", "class-image"])
def test_the_floor_is_made_of_auxiliary_images_only(images, small, guess):
    (result,) = attacked(images, small(), PriorOnly(guess=guess), trials=1, auxiliary=50)
    order = torch.randperm(len(images.train_images), generator=rng.generator(0, "auxiliary"))[:50]
    own = images.train_images[order]
    of_class = own[images.train_labels[order] == images.test_labels[0]]
    found = result.reconstruction.images[0]
    if guess == "class-image":
        assert any(torch.equal(found, each) for each in of_class)
    else:
        torch.testing.assert_close(found, (own if guess == "mean" else of_class).mean(0))


def test_the_regression_equals_a_plain_one():
    """Kernel ridge regression of one view by NumPy, at the width and ridge that were chosen."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=source)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].tanh()], 1)
    known, probes, asked = (Views.of(per_update={"x": x[p]}, per_image={}, batch=1) for p in _parts(120))
    fit, check, rest = _parts(120)
    regression = best_regression(known, y[fit], probes, y[check])
    found = regression(known, asked)
    unit = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    squared = ((unit[:, None] - unit[None]) ** 2).sum(2)
    kernel = np.exp(-squared / regression.width)
    mean = y[fit].double().numpy().mean(0)
    ridge = regression.ridge * np.eye(len(fit))
    weights = np.linalg.solve(kernel[fit][:, fit] + ridge, y[fit].numpy() - mean)
    np.testing.assert_allclose(found.numpy(), kernel[rest][:, fit] @ weights + mean, atol=1e-3)
    assert regression.names == ("x",)


def _parts(count):
    order = np.arange(count)
    return order[: count // 2], order[count // 2 : 3 * count // 4], order[3 * count // 4 :]


def test_views_without_information_do_not_count():
    source = torch.Generator().manual_seed(0)
    x, noise = torch.randn(300, 4, generator=source), torch.randn(300, 4, generator=source)
    fit, check, _ = _parts(300)
    known, probes = (
        Views.of(per_update={"noise": noise[p], "x": x[p]}, per_image={}, batch=1) for p in (fit, check)
    )
    assert best_regression(known, x[fit], probes, x[check]).names == ("x",)


def test_long_vectors_keep_their_distances_when_hashed():
    source = torch.Generator().manual_seed(0)
    long = torch.randn(20, 20_000, generator=source)
    views = Views.of(per_update={"long": long}, per_image={}, batch=1)
    assert views.per_update["long"].shape == (20, 4096)
    unit = long / long.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        views.distances(views, ["long"]), torch.cdist(unit, unit).square(), atol=0.15, rtol=0.1
    )


def test_nothing_of_the_victim_can_be_reached_that_was_not_granted(images, small):
    arm = Arm(name="one", description="", defense=KeyLock(), knowledge=Knowledge(auxiliary=50))
    model = small()
    victim = arm.defense.prepare(model)
    clients = SimulatedClients.of(arm, victim, model, local=Procedure())
    secrets = {id(victim), id(victim.key), *(id(t) for t in victim.private_parameters().values())}
    seen, pending = set(), [clients]
    while pending:
        thing = pending.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | FunctionType | str):
            continue
        seen.add(id(thing))
        pending += gc.get_referents(thing)
    assert not secrets & seen
    assert clients.known.key is None
    assert not clients.known.private


@pytest.mark.parametrize("steps", [1, 3])
def test_one_update_of_a_simulated_client_does_not_change_the_next(images, small, steps):
    arm = Arm(name="one", description="", defense=KeyLock(layers="all"))
    model = small()
    victim = arm.defense.prepare(model)
    clients = SimulatedClients.of(arm, victim, model, local=Procedure(steps=steps, lr=0.5))
    image, label = images.test_images[:1].clone(), images.test_labels[:1]
    sent = clients(torch.stack([image] * 3), torch.stack([label] * 3))
    for tensor in sent.values():
        torch.testing.assert_close(tensor[0], tensor[2])


def test_results_do_not_depend_on_the_company(images, small, monkeypatch):
    model = small()
    alone, together = (attacked(images, model, SMALL, trials=trials)[0] for trials in (1, 3))
    rounding = 0.02  # of float32 distances, which the weights of a small ridge amplify
    torch.testing.assert_close(
        alone.reconstruction.images, together.reconstruction.images, atol=rounding, rtol=0
    )


def test_several_updates_of_one_client_give_away_what_one_does_not(images, small):
    lock = KeyLock(layers="all")
    alone, together = (
        attacked(images, small(), SMALL, lock, trials=32, updates_per_client=each) for each in (1, 16)
    )
    # Keys are the operating system's: in five runs the ratio was .63 to .74, the gain 2 to 10 of 32 images.
    assert mean_error(together) < 0.9 * mean_error(alone)
    assert identified(together) >= identified(alone)


def test_updates_of_a_client_may_come_in_any_order(images, small):
    arm = Arm(name="one", description="", defense=NoDefense(), knowledge=Knowledge(auxiliary=100))
    model, seen, attack = small(), [], LearnedInversion(simulations=60)
    run = LearnedInversion.reconstruct_many

    class Watched(LearnedInversion):
        def reconstruct_many(self, observations, **rest):
            seen.extend(observations)
            return run(attack, observations, **rest)

    attack_arms(
        [arm], attack=Watched(), build=lambda trial: model, dataset=images,
        trials=trials_of(images, trials=4), seed=0, updates_per_client=2, on_result=lambda result: None,
    )  # fmt: skip
    assert [one.client for one in seen] == [0, 0, 1, 1]
    order = [2, 0, 3, 1]
    sources = [torch.Generator()] * 4
    straight = run(attack, seen, generators=sources)
    mixed = run(attack, [seen[place] for place in order], generators=sources)
    for place, found in zip(order, mixed, strict=True):
        torch.testing.assert_close(found.images, straight[place].images, atol=0.02, rtol=0)
    with pytest.raises(AttackError, match="as many updates of every client, got 1 to 2"):
        run(attack, seen[:3], generators=sources[:3])


def test_updates_that_are_not_finite_are_named(images, small, monkeypatch):
    nothing = {name: torch.full((10, *p.shape), torch.nan) for name, p in small().named_parameters()}
    monkeypatch.setattr(SimulatedClients, "__call__", lambda self, *batch: nothing)
    with pytest.raises(AttackError, match="a simulated client's update is not finite"):
        attacked(images, small(), SMALL, trials=1)


def test_a_ridge_that_is_enough_for_a_part_of_the_examples_grows_with_the_rest(monkeypatch):
    """Vectors so alike that rounding makes the kernel of all of them indefinite, not that of a few."""
    monkeypatch.setattr(kernels, "_COMPARED_ON", 20)
    monkeypatch.setattr(kernels, "_RANKED_ON", 20)
    noise = torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
    x, y = 1 + 3e-3 * noise, noise[:, :2]
    known, probes = (Views.of(per_update={"x": part}, per_image={}, batch=1) for part in (x[:300], x[300:]))
    assert best_regression(known, y[:300], probes, y[300:]).error < 0.3
