"""The arms: what each grants, that the victim is the same, and that known secrets mean the true γ and β."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fedkl import PublicUpdate, data, models
from fedkl.attacking import SimulatedClients, attack_arms, full_gradient, grid, observe, trials_of
from fedkl.attacks import DLG, Auxiliary, Knowledge, PriorOnly, Procedure
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.defenses import Arm, KeyLock, NoDefense, arms_of
from fedkl.defenses.base import plain_arm
from fedkl.errors import AttackError, DataError


@pytest.fixture(scope="module")
def dataset():
    return data.load("mnist-sample")


def build(seed):
    return models.build_model("lenet", channels=3, classes=10, seed=seed)


def own_data(dataset):
    return Auxiliary(images=dataset.train_images[:8], labels=dataset.train_labels[:8], simulate=dict)


def views(dataset, lock):
    model, (trial,) = build(0), trials_of(dataset, trials=1)
    victims = {}
    result = {}
    for arm in arms_of(lock).values():
        victim = victims.setdefault(arm.defense, arm.defense.prepare(model))
        observation = observe(
            victim, arm=arm, model=model, trial=trial, classes=10, auxiliary=own_data(dataset)
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

    truth = arms["lock"][0].bake().get_parameter("conv1.norm.weight")
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
        [arm for arm in arms_of(KeyLock()).values() if arm.name in names],
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
    assert seen == [(2, 2, 2.0), (2, 1, 1.0)]


def test_the_server_sees_the_update_after_the_defenses_transform(dataset):
    """A defense that changes the update is attacked as it is, and a private tensor would be refused."""

    @dataclass(frozen=True, kw_only=True)
    class Zeroed(KeyLock):
        def public_transform(self, tensors, seen):
            return {n: t if n != "conv1.weight" else 0 * t for n, t in tensors.items()}

        def transform(self, update, *, client):
            tensors = self.public_transform(update.tensors, {})
            return PublicUpdate(schema=update.schema, tensors=tensors, num_samples=1, round=0)

    model, (trial,), defense = build(0), trials_of(dataset, trials=1), Zeroed()
    arm = Arm(name="zeroed", description="", defense=defense)
    observation = observe(defense.prepare(model), arm=arm, model=model, trial=trial, classes=10)
    assert observation.transform == defense.public_transform
    assert not observation.gradient["conv1.weight"].any()
    assert observation.gradient["conv2.weight"].any()


def test_knowledge_in_words():
    assert Knowledge(labels=False).describe() == "nothing private"
    assert Knowledge(key=True).describe() == "labels, key"


def loss_at_the_truth(arm, dataset, *, local=None, batch_size=1, train_mode=True, frozen=False, **changes):
    """The attacker's objective at the true images, where its guess of everything else stays as it is."""
    model, (trial,) = build(0), trials_of(dataset, trials=1, batch_size=batch_size)
    model.conv2.requires_grad_(not frozen)
    observation = observe(
        arm.defense.prepare(model),
        arm=arm,
        model=model,
        trial=trial,
        classes=10,
        auxiliary=own_data(dataset),
        train_mode=train_mode,
        local=local,
    )
    matching = GradientMatching([replace(observation, **changes)], labels=[trial.labels])
    point = matching.starts([torch.Generator().manual_seed(0)])
    point[0, : trial.images.numel()] = trial.images.flatten()
    value, gradient = matching(point, torch.tensor([0]))
    return float(value), gradient, matching


EXACT = ("no-norm", "public-norm", "lock-known-both")
GUESSES = ("lock", "lock-known-key", "lock-known-layers", "lock-seen-gradient", "lock-regressed-key")


@pytest.mark.parametrize(
    "local", [None, Procedure(steps=3, lr=0.1), Procedure(steps=3, lr=0.1, batch_size=2)]
)
@pytest.mark.parametrize("lock", [KeyLock(), KeyLock(layers="all", chained=True)], ids=["first", "all"])
def test_the_objective_knows_what_the_client_does(dataset, lock, local):
    """Oracle: at the true images the simulated update is the client's, also one of several steps."""
    for arm in arms_of(lock).values():
        value, _, _ = loss_at_the_truth(arm, dataset, local=local, batch_size=3)
        if arm.name in EXACT:
            assert value < 1e-10, arm.name
        elif arm.name in GUESSES:
            assert value > 1e-7, arm.name


@pytest.mark.parametrize(
    "local",
    [
        None,
        Procedure(steps=3, lr=0.1, batch_size=2),
        Procedure(algorithm="fedavg", lr=0.1, batch_size=2, momentum=0.9, weight_decay=0.1),
    ],
    ids=["gradient", "steps", "epoch"],
)
def test_the_objective_knows_what_the_client_has_frozen(dataset, local):
    """As in transfer learning: the server sees what is trained, and that the rest stays as it is."""
    for arm in (plain_arm(), arms_of(KeyLock())["lock-known-both"]):
        assert loss_at_the_truth(arm, dataset, local=local, batch_size=4, frozen=True)[0] < 1e-10


def test_the_gradient_of_the_lock_layers_is_compared_too(dataset):
    arms = arms_of(KeyLock())
    both = replace(
        arms["lock-known-both"], knowledge=Knowledge(key=True, lock_layers=True, lock_gradient=True)
    )
    assert loss_at_the_truth(both, dataset)[0] < 1e-8
    seen, unseen = (loss_at_the_truth(arms[name], dataset) for name in ("lock-seen-gradient", "lock"))
    assert seen[2].dimension == unseen[2].dimension  # nothing more to find, only more to match


def test_the_gradient_of_the_lock_layers_gives_the_key_away(dataset):
    """Of γ = act(W k + b), ∂L/∂W = δ kᵀ and ∂L/∂b = δ: their ratio is the key. No attack is needed."""
    model, (trial,) = build(0), trials_of(dataset, trials=1)
    arm = arms_of(KeyLock())["lock-seen-gradient"]
    victim = arm.defense.prepare(model)
    seen = observe(victim, arm=arm, model=model, trial=trial, classes=10)
    weight, bias = (f"conv1.norm.parametrizations.weight.original{i}" for i in (0, 1))
    row = seen.gradient[bias].abs().argmax()
    key = seen.gradient[weight][row] / seen.gradient[bias][row]
    torch.testing.assert_close(key, victim.key.reveal().float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "numbers"), [("lock-regressed-key", 1024), ("lock-regressed-affine", 24)])
def test_what_is_regressed_is_a_part_of_the_point(dataset, name, numbers):
    arm = arms_of(KeyLock())[name]
    _, gradient, matching = loss_at_the_truth(arm, dataset)
    assert matching.dimension == 3 * 32 * 32 + numbers
    assert gradient[0, -numbers:].any()


def test_the_regressed_tensors_minimize_the_objective_where_they_are_true(dataset):
    """With the true γ and β as the guess, the objective is zero and flat in them."""
    arm = arms_of(KeyLock())["lock-known-affine"]
    free = ("conv1.norm.weight", "conv1.norm.bias")
    value, gradient, _ = loss_at_the_truth(arm, dataset, free=free)
    assert value < 1e-8
    assert gradient[0, -24:].abs().max() < 1e-3


def test_eval_mode_uses_the_running_statistics(dataset):
    arms = arms_of(KeyLock(share_statistics=True))
    for name in ("public-norm", "lock-known-both"):
        assert loss_at_the_truth(arms[name], dataset, train_mode=False)[0] < 1e-8


@pytest.mark.parametrize(
    ("local", "known"),
    [
        (Procedure(algorithm="fedavg", steps=1, lr=0.1), True),
        (Procedure(algorithm="fedavg", steps=1, batch_size=4, lr=0.1), False),
        (Procedure(algorithm="fedavg", steps=1, lr=0.1, precision="bfloat16"), False),
    ],
    ids=["all images", "four of them", "half precision"],
)
def test_statistics_are_those_of_the_images_that_were_in_the_step(dataset, local, known):
    """Of eight images of which four were, the server gets none that nobody sent."""
    model = nn.Sequential(nn.Conv2d(3, 2, 5), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 28 * 28, 10))
    (trial,) = trials_of(dataset, trials=1, batch_size=8)
    seen = observe(
        NoDefense().prepare(model), arm=plain_arm(), model=model, trial=trial, classes=10, local=local
    )
    assert bool(seen.statistics) == known


def test_a_public_transform_is_applied_by_the_attacker_too(dataset):
    def halved(tensors, seen):
        return {name: tensor / 2 for name, tensor in tensors.items()}

    arm = arms_of(KeyLock())["no-norm"]
    plain, transformed = (
        loss_at_the_truth(arm, dataset, transform=transform)[0] for transform in (None, halved)
    )
    assert plain < 1e-8
    assert transformed == pytest.approx(0.25)


def test_several_workers_find_the_same(dataset):
    one, two = (
        {(r.arm, r.trial): r.reconstruction for r in attack(dataset, ("no-norm", "lock"), workers=workers)}
        for workers in (1, 2)
    )
    assert one.keys() == two.keys()
    torch.testing.assert_close(one["no-norm", 1].images, two["no-norm", 1].images)


def simulation(dataset, name, **changes):
    """Simulated clients of an arm, its victim, and two updates of one simulated client for real images."""
    model = build(0)
    arm = arms_of(KeyLock(), auxiliary=8)[name]
    victim = arm.defense.prepare(model)
    clients = SimulatedClients.of(arm, victim, model, **({"local": Procedure()} | changes))
    return arm, victim, model, clients


def test_the_server_sees_the_mean_of_a_cohort(dataset):
    """Each member trains on its own images, with γ and β of its own."""
    arm = arms_of(KeyLock())["lock"]
    model = build(0)
    clients = [arm.defense.prepare(model) for _ in range(2)]
    (trial,) = trials_of(dataset, trials=1, batch_size=4)
    halves = trials_of(dataset, trials=2, batch_size=2)
    alone = [
        observe(client, arm=arm, model=model, trial=half, classes=10).gradient
        for client, half in zip(clients, halves, strict=True)
    ]
    seen = observe(clients[0], others=clients[1:], arm=arm, model=model, trial=trial, classes=10)
    assert (seen.cohort, seen.batch_size) == (2, 4)
    for name, tensor in seen.gradient.items():
        torch.testing.assert_close(tensor, (alone[0][name] + alone[1][name]) / 2)
    with pytest.raises(AttackError, match="expected the update of one client, got the mean over 2"):
        DLG(evaluations=2).reconstruct(seen, generator=torch.Generator())


def test_a_simulated_cohort_is_the_victims_where_nothing_is_left_to_draw(dataset):
    arm, victim, model, clients = simulation(dataset, "public-norm", cohort=2)
    (trial,) = trials_of(dataset, trials=1, batch_size=4)
    seen = observe(victim, others=[victim], arm=arm, model=model, trial=trial, classes=10).gradient
    simulated = clients(trial.images[None], trial.labels[None])
    assert set(simulated) == set(seen)
    for name, tensor in simulated.items():
        torch.testing.assert_close(tensor[0], seen[name])


@pytest.mark.parametrize(("name", "prepared_for"), [("lock", 2 * (2 + 1)), ("public-norm", 1)])
def test_members_of_a_cohort_have_keys_of_their_own(dataset, monkeypatch, name, prepared_for):
    """Two members in each of two trials, and the server's own; public γ and β are everybody's."""
    prepared, prepare = [], KeyLock.prepare
    monkeypatch.setattr(
        KeyLock, "prepare", lambda self, *a, **k: prepared.append(1) or prepare(self, *a, **k)
    )
    found, model = [], build(0)
    attack_arms(
        [arms_of(KeyLock(), auxiliary=400)[name]],
        attack=PriorOnly(), build=lambda trial: model, dataset=dataset,
        trials=trials_of(dataset, trials=2, batch_size=4), seed=0, cohort=2, on_result=found.append,
    )  # fmt: skip
    assert [len(result.scores) for result in found] == [4, 4]
    assert len(prepared) == prepared_for


def test_clients_that_torch_func_cannot_trace_are_simulated_one_by_one(dataset):
    class Doubtful(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build(0)

        def forward(self, x):
            return self.net(x) if float(x.detach().mean()) < 2 else 2 * self.net(x)

    arm = arms_of(KeyLock(), auxiliary=8)["no-norm"]
    images, labels = dataset.test_images[:3][:, None], dataset.test_labels[:3][:, None]
    found = []
    for model in (Doubtful(), build(0)):
        clients = SimulatedClients.of(arm, arm.defense.prepare(model), model, local=Procedure())
        found.append({name.removeprefix("net."): tensor for name, tensor in clients(images, labels).items()})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name])


@pytest.mark.parametrize("names", [("public-norm", "lock"), ("lock", "public-norm")])
def test_arms_that_share_victims_do_not_mix_their_cohorts(dataset, monkeypatch, names):
    """Behind a lock every member has its own key, and public γ and β are one, in whatever order they come."""
    members = {}

    def noted(victim, *, arm, trial, others, **rest):
        members[arm.name, trial.index] = {id(one) for one in (victim, *others)}
        return observe(victim, arm=arm, trial=trial, others=others, **rest)

    monkeypatch.setattr(grid, "observe", noted)
    arms, model = arms_of(KeyLock(), auxiliary=400), build(0)
    attack_arms(
        [arms[name] for name in names],
        attack=PriorOnly(), build=lambda trial: model, dataset=dataset,
        trials=trials_of(dataset, trials=2, batch_size=4), seed=0, cohort=4, on_result=lambda result: None,
    )  # fmt: skip
    assert {place: len(found) for place, found in members.items()} == {
        (name, trial): 4 if name == "lock" else 1 for name in names for trial in (0, 1)
    }


def test_of_a_cohort_only_the_victim_gave_its_secrets_away(dataset):
    """The server simulates the rest with keys of its own, whatever it knows of the one."""
    *_, clients = simulation(dataset, "lock-known-affine", cohort=2)
    alone = replace(clients, cohort=1)
    images, labels = dataset.test_images[:4][None], dataset.test_labels[:4][None]
    halves = [alone(images[:, part], labels[:, part]) for part in (slice(0, 2), slice(2, 4))]
    once, again = (clients(images, labels)["conv2.weight"] for _ in range(2))
    assert not torch.allclose(once, again, rtol=1e-3)
    assert not torch.allclose(once, sum(half["conv2.weight"] for half in halves) / 2, rtol=1e-3)


def test_a_simulated_client_has_secrets_of_its_own(dataset):
    arm, victim, model, clients = simulation(dataset, "lock")
    trial, *_ = trials_of(dataset, trials=1)
    images, labels = trial.images[None], trial.labels[None]
    sent = observe(victim, arm=arm, model=model, trial=trial, classes=10).gradient
    one, other = clients(images, labels), clients(images, labels)
    assert set(one) == set(sent)
    assert not torch.allclose(one["conv2.weight"][0], sent["conv2.weight"], rtol=1e-3)
    assert not torch.allclose(one["conv2.weight"], other["conv2.weight"], rtol=1e-3)


@pytest.mark.parametrize("name", ["no-norm", "public-norm", "lock-known-both", "lock-known-affine"])
@pytest.mark.parametrize("local", [Procedure(), Procedure(steps=2, lr=0.1)])
def test_a_simulated_client_is_the_victim_where_nothing_is_left_to_draw(dataset, name, local):
    arm, victim, model, clients = simulation(dataset, name, local=local)
    trials = trials_of(dataset, trials=2)
    sent = [
        observe(victim, arm=arm, model=model, trial=trial, classes=10, local=local).gradient
        for trial in trials
    ]
    simulated = clients(
        torch.stack([trial.images for trial in trials]), torch.stack([trial.labels for trial in trials])
    )
    assert set(simulated) == set(sent[0])
    # With γ and β as numbers, the server cannot know exactly how the lock layers trained.
    loose = {"rtol": 0.01, "atol": 1e-3} if name == "lock-known-affine" and not local.is_gradient else {}
    for tensor in simulated:
        truth = torch.stack([each[tensor] for each in sent])
        torch.testing.assert_close(simulated[tensor], truth, **loose)


def test_better_guesses_of_gamma_and_beta(dataset):
    arms, _ = views(dataset, KeyLock())
    drawn, neutral, calibrated = (
        arms[name][1].model.conv1.norm for name in ("lock", "lock-neutral", "lock-calibrated")
    )
    assert torch.equal(neutral.weight, torch.ones_like(neutral.weight))
    assert torch.equal(neutral.bias, torch.zeros_like(neutral.bias))
    for one, other in ((drawn, neutral), (neutral, calibrated), (drawn, calibrated)):
        assert not torch.allclose(one.weight, other.weight, rtol=1e-2)


def test_calibrating_needs_images(dataset):
    arm = arms_of(KeyLock())["lock-calibrated"]
    model, (trial,) = build(0), trials_of(dataset, trials=1)
    with pytest.raises(DataError, match=r"lock-calibrated: expected auxiliary images .* --auxiliary 100"):
        observe(arm.defense.prepare(model), arm=arm, model=model, trial=trial, classes=10)


def places(observations):
    """Where the tensors of the observations' networks are in memory, by name."""
    found = {}
    for observation in observations:
        for name, tensor in observation.model.named_parameters():
            found.setdefault(name, set()).add(tensor.data_ptr())
    return found


def observed(dataset, arms, monkeypatch, *, attack, trials=3):
    """The observations of a grid of trials of one network."""
    seen = []
    run = type(attack)._run
    monkeypatch.setattr(
        type(attack), "_run", lambda self, given, *rest: seen.extend(given) or run(self, given, *rest)
    )
    model = build(0)
    attack_arms(
        [arms_of(KeyLock())[name] for name in arms],
        attack=attack,
        build=lambda trial: model,
        dataset=dataset,
        trials=trials_of(dataset, trials=trials),
        seed=0,
        on_result=lambda result: None,
    )
    return seen


def test_trials_of_one_public_network_hold_one_copy_of_it(dataset, monkeypatch):
    monkeypatch.setattr("fedkl.attacking.grid.lots_of", lambda trials, *rest, **options: [trials])
    seen = observed(dataset, ["no-norm"], monkeypatch, attack=DLG(evaluations=1))
    assert len(seen) == 3
    assert len({id(observation.model) for observation in seen}) == 1
    for observation in seen:
        assert all(parameter._version == 0 for parameter in observation.model.parameters())


def test_trials_and_arms_share_all_tensors_but_what_the_server_draws(dataset, monkeypatch):
    monkeypatch.setattr("fedkl.attacking.grid.lots_of", lambda trials, *rest, **options: [trials])
    seen = observed(dataset, ["public-norm", "lock"], monkeypatch, attack=DLG(evaluations=1))
    assert len({id(observation.model) for observation in seen}) == 1 + 3
    counts = {name: len(where) for name, where in places(seen).items()}
    drawn = {"conv1.norm.weight": 1 + 3, "conv1.norm.bias": 1 + 3}
    assert counts == {name: drawn.get(name, 1) for name in counts}
