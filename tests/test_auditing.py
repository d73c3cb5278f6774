"""The arms: what each grants, that the victim is the same, and that known secrets mean the true γ and β."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fedkl import PublicUpdate, data, models
from fedkl.attacks import DLG, Knowledge
from fedkl.auditing import attack_arms, full_gradient, observe, standard_arms, trials_of
from fedkl.defenses import KeyLock
from fedkl.defenses.base import plain_copy
from fedkl.errors import DataError


@pytest.fixture(scope="module")
def dataset():
    return data.load("mnist-sample")


def build(seed):
    return models.build_model("lenet", channels=3, classes=10, seed=seed)


def views(dataset, lock):
    model, (trial,) = build(0), trials_of(dataset, trials=1)
    victims = {}
    result = {}
    for arm in standard_arms(lock):
        victim = victims.setdefault(arm.defense, arm.defense.prepare(model))
        observation = observe(
            victim, defense=arm.defense, model=model, trial=trial, classes=10, knowledge=arm.knowledge
        )
        result[arm.name] = (victim, observation)
    return result, trial


@pytest.mark.parametrize("lock", [KeyLock(), KeyLock(layers="all")])
def test_what_each_arm_knows(dataset, lock):
    arms, _ = views(dataset, lock)
    affine = {"conv1.norm.weight", "conv1.norm.bias"}
    assert not affine & set(arms["no-norm"][1].gradient)
    assert affine <= set(arms["public-norm"][1].gradient)
    for name in ("private-norm", "lock", "lock-known-key", "lock-known-layers", "lock-known-both"):
        assert not any("norm" in tensor for tensor in arms[name][1].gradient)

    def gamma(name):
        return arms[name][1].model.get_parameter("conv1.norm.weight")

    truth = plain_copy(arms["lock"][0]).get_parameter("conv1.norm.weight")
    for name in ("public-norm", "lock-known-both"):
        torch.testing.assert_close(gamma(name), truth)
    for name in ("lock", "lock-known-key", "lock-known-layers"):
        assert (gamma(name) - truth).abs().max() > 0.05, name
    assert torch.equal(gamma("private-norm"), torch.ones(12))  # FedBN starts where everyone knows


def test_the_locked_arms_observe_one_and_the_same_public_gradient(dataset):
    arms, _ = views(dataset, KeyLock())
    locked = arms["lock"][1].gradient
    for name in ("lock-known-key", "lock-known-both"):
        assert all(torch.equal(locked[t], arms[name][1].gradient[t]) for t in locked)


def test_the_server_with_all_secrets_computes_the_observed_gradient(dataset):
    """Oracle: with the true γ, β and image the gradient must match; with a wrong key it must not."""
    arms, trial = views(dataset, KeyLock())

    def error(name):
        observation = arms[name][1]
        gradient = full_gradient(observation.model, trial.images, trial.labels)
        return max((gradient[t] - g).abs().max().item() for t, g in observation.gradient.items())

    for name in ("no-norm", "public-norm", "private-norm", "lock-known-both"):
        assert error(name) < 1e-6, name
    for name in ("lock", "lock-known-key", "lock-known-layers"):
        assert error(name) > 1e-3, name


def test_batches_of_trials(dataset):
    trials = trials_of(dataset, trials=3, batch_size=4)
    assert [len(t.images) for t in trials] == [4, 4, 4]
    assert torch.equal(torch.cat([t.images for t in trials]), dataset.test_images[:12])
    with pytest.raises(DataError, match="at most 500"):
        trials_of(dataset, trials=501)


def attack(dataset, names, *, trials=2, evaluations=2, **options):
    results = []
    attack_arms(
        [arm for arm in standard_arms() if arm.name in names],
        attack=DLG(evaluations=evaluations),
        build=build,
        dataset=dataset,
        trials=trials_of(dataset, trials=trials),
        seed=0,
        on_result=results.append,
        **options,
    )
    return results


def test_trials_that_are_done_are_not_repeated(dataset):
    results = attack(dataset, ("no-norm", "lock"), skip={0})
    assert {(result.arm, result.trial) for result in results} == {("no-norm", 1), ("lock", 1)}


def test_every_image_is_identified_among_the_same_candidates(dataset):
    results = attack(dataset, ("no-norm",), trials=102, evaluations=1, chunk=102)
    assert {result.scores[0].candidates for result in results} == {102}


def test_chunks_and_progress(dataset):
    seen = []
    results = attack(dataset, ("no-norm",), trials=3, chunk=2, on_evaluation=lambda *step: seen.append(step))
    assert [result.trial for result in results] == [0, 1, 2]
    assert seen == [(2, 2), (2, 1)]


def test_the_server_sees_the_update_after_the_defenses_transform(dataset):
    """A defense that changes the update is attacked as it is, and a private tensor would be refused."""

    @dataclass(frozen=True, kw_only=True)
    class Zeroed(KeyLock):
        def transform(self, update):
            tensors = {n: t if n != "conv1.weight" else 0 * t for n, t in update.tensors.items()}
            return PublicUpdate(schema=update.schema, tensors=tensors, num_samples=1, round=0)

    model, (trial,), defense = build(0), trials_of(dataset, trials=1), Zeroed()
    observation = observe(
        defense.prepare(model), defense=defense, model=model, trial=trial, classes=10, knowledge=Knowledge()
    )
    assert not observation.gradient["conv1.weight"].any()
    assert observation.gradient["conv2.weight"].any()


def test_knowledge_in_words():
    assert Knowledge(labels=False).describe() == "nothing private"
    assert Knowledge(key=True).describe() == "labels, key"
