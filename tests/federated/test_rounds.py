"""Rounds: who takes part, who is gone, who diverges, and what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from torch import nn

from fedkl.data import Dataset, Dirichlet, Shards
from fedkl.defenses import KeyLock, NoDefense, PrivateLayers, PrivateNorm
from fedkl.defenses.changing import UpdateDefense
from fedkl.defenses.client_dp import ClientDP
from fedkl.defenses.clipping import Clipping
from fedkl.defenses.combined import Combined
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.defenses.local_dp import LocalDpMod
from fedkl.defenses.noise import GaussianNoise, LaplaceNoise
from fedkl.defenses.percentile import Percentile
from fedkl.defenses.pruning import Pruning
from fedkl.defenses.soteria import Soteria
from fedkl.defenses.sparse_vector import SparseVector
from fedkl.errors import ConfigError, DataError, TrainingError, UpdateError, gathered
from fedkl.federated import (
    Averaging,
    FederatedTraining,
    Federation,
    LocalTraining,
    ServerSGD,
    weighted_average,
)
from tests.federated.setting import (
    TwoNorms,
    copy_secrets,
    differences,
    everything,
    federation,
    one_update,
    seeded,
    trained,
)

DEFENSES = [NoDefense(), KeyLock(layers="all"), PrivateNorm(), PrivateLayers()]


def small(dataset, defense=None, **options):
    return federation(dataset, defense or NoDefense(), model=seeded(TwoNorms), **options)


def cohorts(run):
    """Names of the clients that trained, by round."""
    taken = []
    for round in range(run.training.rounds):
        before = {client.name: client.rounds for client in run.clients}
        run.run_round(round)
        taken.append(frozenset(c.name for c in run.clients if c.rounds > before[c.name]))
    return taken


def test_cohorts_have_the_right_size_and_take_turns(dataset):
    taken = cohorts(small(dataset, clients=6, cohort=2, rounds=12, eval_every=12))
    assert {len(names) for names in taken} == {2}
    assert len(frozenset.union(*taken)) == 6
    assert len(set(taken)) > 3


def test_cohorts_depend_on_the_seed_only(dataset):
    options = {"clients": 6, "cohort": 2, "rounds": 4, "eval_every": 4}
    first, again = (cohorts(small(dataset, **options)) for _ in range(2))
    other = cohorts(small(dataset, seed=1, **options))
    assert first == again
    assert first != other


def test_a_result_says_who_took_part(dataset):
    run = small(dataset, clients=8, cohort=5, dropout=0.5, rounds=6, eval_every=6)
    names, gone = {client.name for client in run.clients}, 0
    for result in run.run():
        assert result.updates + len(result.dropped) == 5
        assert set(result.dropped) < names
        assert not result.failed
        gone += len(result.dropped)
    assert 8 <= gone <= 22  # of 30 at one half


def test_everyone_may_be_gone(dataset):
    run = small(dataset, clients=2, dropout=0.9, rounds=8, eval_every=8)
    before = run.server.state
    result = next(result for result in run.run() if result.updates == 0)
    assert result.loss is None
    assert result.update_bytes == 0
    assert not result.aggregated
    if result.round == 0:
        assert not differences(before, run.server.state)


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda d: d.type)
def test_those_who_are_there_are_averaged(dataset, defense):
    """Oracle: each present client's update from a federation of the same secrets, weighted by its samples."""
    options = {"clients": 5, "cohort": 4, "dropout": 0.5, "partition": Dirichlet(min_samples=4)}
    run, alone = (small(dataset, defense, **options) for _ in range(2))
    copy_secrets(run, alone)
    before = {client.name: client.rounds for client in run.clients}
    result = run.run_round(0)
    present = [client for client in alone.clients if run_of(run, client).rounds > before[client.name]]
    assert result.dropped
    assert len(present) == result.updates > 1
    # In the order in which the round adds them up: float64 sums, so it would hardly matter.
    present.sort(key=lambda client: -client.num_samples)
    expected = weighted_average([one_update(alone, client) for client in present])
    assert len({client.num_samples for client in present}) > 1
    assert not differences(expected, run.server.state)


def run_of(run, client):
    return next(other for other in run.clients if other.name == client.name)


def test_too_small_a_cohort_leaves_the_server_as_it_is(dataset):
    server = ServerSGD(momentum=0.9)
    run = small(dataset, clients=4, dropout=0.5, min_cohort=4, rounds=6, eval_every=6, server=server)
    skipped = 0
    for round in range(6):
        before = run.server.snapshot()
        result = run.run_round(round)
        assert result.aggregated == (result.updates == 4)
        if not result.aggregated:
            skipped += 1
            assert not differences(before, run.server.snapshot())
    assert 0 < skipped
    assert any(client.trained for client in run.clients)  # they do not know, and go on


class Flaky:
    """The images of a dataset; from some time on, those of one client are broken."""

    def __init__(self, images):
        self._images = images
        self.broken = torch.zeros(len(images), dtype=torch.bool)
        self.shape = tuple(images.shape)

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        images = self._images[index].clone()
        images[self.broken[index]] = float("nan")
        return images


class Normless(nn.Sequential):
    """A network whose images can be told apart, as DP-SGD asks."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 10))


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("defense", [ClientDP(noise_multiplier=0.1), DPSGD()], ids=lambda each: each.type)
def test_under_a_guarantee_nobody_sees_who_diverges(dataset, defense, algorithm):
    """Whether one image makes the training diverge is something that ε has to cover."""
    store, broken = flaky(dataset)
    local = {"algorithm": algorithm, "batch_size": 16}
    run = federation(broken, defense, model=seeded(Normless), local=local)
    store.broken[run.clients[0].samples] = True
    before = {name: tensor.clone() for name, tensor in run.server.state.items()}
    result = run.run_round(0)
    assert not result.failed
    assert result.updates == len(run.clients)
    assert result.loss is not None
    assert all(tensor.isfinite().all() for tensor in run.server.state.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in run.server.state.items())


def test_counts_of_batches_do_not_say_who_diverged(dataset):
    """They are not noisy, and would be one exact bit."""
    store, broken = flaky(dataset)
    run = small(broken, ClientDP(noise_multiplier=0.1), local={"batch_size": 16})
    store.broken[run.clients[0].samples] = True
    shown = []
    run.run_round(0, on_seen=lambda plan, seen: shown.extend(seen))
    sent = [each.update.tensors["body.1.num_batches_tracked"].item() for each in shown]
    assert sent == [-(-client.num_samples // 16) for client in run.clients]


@dataclass(frozen=True, kw_only=True)
class Looking(UpdateDefense):
    """Sends what it is given, and lets one see that."""

    type: Literal["test-at-hand"] = "test-at-hand"
    seen: list = field(default_factory=list)

    @property
    def looks_at_images(self):
        return True

    def changed(self, change, *, draws, client):
        self.seen.append((change, client.sample(99)))
        return change


def test_a_defense_looks_at_the_images_that_the_gradient_is_of(dataset):
    looking, model = Looking(), seeded(Normless)
    run = federation(dataset, looking, model=model, clients=1, local={"algorithm": "fedsgd", "batch_size": 4})
    run.run_round(0)
    ((gradient, (images, labels)),) = looking.seen
    assert len(images) == 4
    expected = torch.autograd.grad(
        nn.functional.cross_entropy(model(images), labels), list(model.parameters())
    )
    torch.testing.assert_close(list(gradient.values()), list(expected))


class Exiting(Looking):
    """Ends the program."""

    def changed(self, change, *, draws, client):
        raise SystemExit(0)


def test_a_defense_that_ends_the_program_ends_the_training_with_its_name(dataset):
    with pytest.raises(TrainingError, match=r"Exiting\.transform: SystemExit on an update of kind 'weights'"):
        federation(dataset, Exiting(), model=seeded(Normless)).run_round(0)


@pytest.mark.parametrize(
    "defense", [GaussianNoise(deviation=0.1), ClientDP(), Pruning(keep=0.9)], ids=lambda each: each.type
)
def test_frozen_parameters_are_left_alone(dataset, defense):
    """Noise on what nobody trains destroys a pretrained network, and hides nothing."""
    model = seeded(Normless)
    model[1].requires_grad_(False)
    before = model[1].weight.clone()
    run = federation(dataset, defense, model=model)
    list(run.run())
    assert torch.equal(run.server.state["1.weight"], before)
    assert not torch.equal(run.server.state["3.weight"], model[3].weight)


@pytest.mark.parametrize(
    "defense", [GaussianNoise(deviation=0.1), ClientDP(), Pruning(keep=0.9)], ids=lambda each: each.type
)
def test_a_frozen_tied_weight_is_left_alone_under_both_names(dataset, defense):
    model = seeded(Tied)
    model.first.weight.requires_grad_(False)
    before = model.first.weight.clone()
    run = trained(federation(dataset, defense, model=model))
    for name in ("first.weight", "second.weight"):
        assert torch.equal(run.server.state[name], before), name
    assert not torch.equal(run.server.state["first.bias"], model.first.bias)


@pytest.mark.parametrize(
    "defense", [GaussianNoise(deviation=0.1), ClientDP(), Pruning(keep=0.9)], ids=lambda each: each.type
)
def test_a_tied_weight_is_changed_once(dataset, defense):
    """Of two draws of noise on one weight a server takes the mean, which has less."""
    seen, run = [], federation(dataset, defense, model=seeded(Tied), rounds=1)
    run.run_round(0, on_seen=lambda plan, updates: seen.extend(updates))
    for each in seen:
        assert torch.equal(each.update.tensors["first.weight"], each.update.tensors["second.weight"])
        assert not torch.equal(each.update.tensors["first.bias"], each.update.tensors["second.bias"])
    assert len(seen) == 3


def test_what_noise_cannot_cover_is_refused_before_anything_is_spent(dataset):
    model = seeded(Normless)
    model[1].register_buffer("position_ids", torch.arange(8))
    for defense in (ClientDP(), Combined(parts=(Pruning(), ClientDP()))):
        with pytest.raises(ConfigError, match=r"'1\.position_ids' is torch\.int64(.|\n)*persistent=False"):
            federation(dataset, defense, model=model)
    model[1].register_buffer("position_ids", torch.arange(8), persistent=False)
    assert [result.updates for result in federation(dataset, ClientDP(), model=model).run()] == [3, 3]


class Frequencies(nn.Module):
    """It has a complex weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3072,), 0.5, dtype=torch.complex64))
        self.head = nn.Linear(3072, 10)

    def forward(self, x):
        return self.head((x.flatten(1) * self.scale).real)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
@pytest.mark.parametrize(
    "defense",
    [
        *(GaussianNoise(), LaplaceNoise(), Pruning(), Clipping(), LocalDpMod(), Percentile(), SparseVector()),
        *(Soteria(), ClientDP(), Combined(parts=(KeyLock(layers=("head",)), GaussianNoise()))),
    ],
    ids=lambda each: each.type,
)
def test_complex_weights_that_would_be_sent_bare_are_refused(dataset, defense, algorithm):
    with pytest.raises(ConfigError, match=r"(?s)expected .*'scale' is torch\.complex64"):
        federation(dataset, defense, model=seeded(Frequencies), local={"algorithm": algorithm})


def flaky(dataset):
    store = Flaky(dataset.train_images)
    rest = {name: getattr(dataset, name) for name in ("train_labels", "test_images", "test_labels")}
    return store, Dataset(dataset.spec, train_images=store, **rest)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("defense", [KeyLock(layers="all"), PrivateNorm()], ids=lambda d: d.type)
def test_one_that_diverges_is_named_and_left_as_it_was(dataset, defense, algorithm):
    """The others' update is what it would be without it, though they share a worker."""
    store, broken = flaky(dataset)
    local = {"algorithm": algorithm, "batch_size": 16}
    run = small(broken, defense, local=local, norm_statistics="kept")
    run.run_round(0)
    sick, *well = run.clients  # it comes first in its worker's row: the others follow it
    store.broken[sick.samples] = True
    reference = small(dataset, defense, local=local, norm_statistics="kept")
    copy_secrets(run, reference)
    reference.server.restore(run.server.snapshot())
    before = {name: t for name, t in everything(run).items() if name.startswith(f"{sick.name}/")}
    assert any("/optimizer/" in name for name in before)
    result = run.run_round(1)
    assert set(result.failed) == {sick.name}
    assert "non-finite" in result.failed[sick.name]
    assert result.updates == 2
    assert result.aggregated
    after = everything(run)
    assert not differences(before, {name: after[name] for name in before})
    state = reference.server.state
    updates = [one_update(reference, reference.clients[i], round=1, state=state) for i in (1, 2)]
    if algorithm == "fedavg":
        expected = weighted_average(updates)
        assert not differences(expected, run.server.state)
    for client, other in zip(well, reference.clients[1:], strict=True):
        assert not differences(client.private_state, other.private_state)


def test_broken_images_heal(dataset):
    """Whoever has failed once takes part again."""
    store, broken = flaky(dataset)
    run = small(broken, KeyLock(), rounds=3)
    store.broken[run.clients[1].samples] = True
    assert set(run.run_round(0).failed) == {"client-1"}
    store.broken[:] = False
    result = run.run_round(1)
    assert (result.failed, result.updates) == ({}, 3)


class Loud(nn.Module):
    """The variance of what the norm sees overflows; what it gives, and every gradient, stays finite."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 8, 8, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.norm(self.conv(x) * 1e25).flatten(1))


def test_private_statistics_that_overflow_count_as_divergence(dataset):
    """The update alone would look sound, and the client could never be entered again."""
    dark = dataset.train_images.clone()
    run = federation(dataset, PrivateNorm(), model=seeded(Loud))
    dark[torch.cat([run.clients[0].samples, run.clients[2].samples])] = 0
    rest = {name: getattr(dataset, name) for name in ("train_labels", "test_images", "test_labels")}
    run = federation(Dataset(dataset.spec, train_images=dark, **rest), PrivateNorm(), model=seeded(Loud))
    for result in run.run():
        assert set(result.failed) == {"client-1"}
        assert "'norm.running_var' has non-finite values" in result.failed["client-1"]
        assert set(result.accuracies) == {"client-0", "client-2"}
    assert not run.clients[1].trained
    for client in run.clients:
        assert all(bool(t.isfinite().all()) for t in client.private_state.values())


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda d: d.type)
def test_if_all_diverge_the_training_ends_with_a_reason(dataset, defense):
    run = small(dataset, defense, local={"lr": 1e38, "batch_size": 8})
    before = everything(run)
    with pytest.raises(
        TrainingError,
        match=r"Round 0: the training of all 3 clients diverged \(learning rate 1e\+38; "
        r"client-0: .*non-finite.*Lower the learning rate\.",
    ):
        run.run_round(0)
    assert not differences(before, everything(run))


def accuracy_by_hand(run, client, test):
    """Correct images of each class and all of them, counted one by one."""
    client.enter(run.split, run.server.state)
    model = run.split.model.eval()
    with torch.no_grad():
        right = [int(model(test[0][i : i + 1]).argmax()) == int(test[1][i]) for i in range(len(test[1]))]
    by_class = {}
    for hit, label in zip(right, test[1].tolist(), strict=True):
        by_class.setdefault(label, []).append(hit)
    return sum(right) / len(right), {label: sum(hits) / len(hits) for label, hits in by_class.items()}


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda d: d.type)
def test_accuracies_count_what_is_right(dataset, defense):
    """Oracle: image by image; the local test set has each of the client's training labels once."""
    run = small(
        dataset, defense, clients=2, partition=Shards(per_client=3), local={"batch_size": 8, "lr": 0.05}
    )
    *_, result = run.run()
    test = (dataset.test_images, dataset.test_labels)
    for client in run.clients:
        whole, by_class = accuracy_by_hand(run, client, test)
        labels = dataset.train_labels[client.samples].tolist()
        home = sum(by_class[label] for label in labels) / len(labels)
        assert result.accuracies[client.name] == pytest.approx(whole)
        assert result.local_accuracies[client.name] == pytest.approx(home)
    assert result.accuracy == pytest.approx(sum(result.accuracies.values()) / 2)
    assert result.local_accuracy == pytest.approx(sum(result.local_accuracies.values()) / 2)
    assert len(set(result.local_accuracies.values())) == 2


def test_evaluation_changes_nothing(dataset):
    run = small(dataset, KeyLock())
    run.run_round(0)
    before = everything(run)
    assert run.evaluate() == run.evaluate()
    assert not differences(before, everything(run))


def test_only_some_of_those_who_have_trained_are_evaluated(dataset):
    run = small(dataset, KeyLock(), clients=8, cohort=4, eval_clients=3, rounds=12)
    first_choice = {client.name for client in run.evaluated_clients()}
    assert len(first_choice) == 3
    seen = []
    for round in range(12):
        result = run.run_round(round)
        trained_now = {client.name for client in run.clients if client.trained}
        assert list(result.accuracies) == list(result.local_accuracies)
        assert set(result.accuracies) <= trained_now
        assert first_choice & trained_now <= set(result.accuracies), "once they have trained they are chosen"
        seen.append(set(result.accuracies))
    assert seen[-1] == first_choice
    again = small(dataset, KeyLock(), clients=8, cohort=4, eval_clients=3)
    assert {client.name for client in again.evaluated_clients()} == first_choice


def test_rounds_between_evaluations(dataset):
    run = small(dataset, rounds=5, eval_every=2)
    results = list(run.run())
    assert [r.accuracy is not None for r in results] == [False, True, False, True, True]
    assert [bool(r.accuracies) for r in results] == [bool(r.local_accuracies) for r in results]


def test_classes_that_are_not_tested_have_no_accuracy(dataset):
    """A client all of whose classes lack test images is left out: there is no number for it, not NaN."""
    tested = dataset.test_labels < 3
    known = Dataset(
        dataset.spec,
        train_images=dataset.train_images,
        train_labels=dataset.train_labels,
        test_images=dataset.test_images[tested],
        test_labels=dataset.test_labels[tested],
    )
    result = small(known, clients=2, partition=Shards(per_client=1)).run_round(1)
    assert set(result.accuracies) == {"client-0", "client-1"}
    assert len(result.local_accuracies) == 1
    assert 0 <= result.local_accuracy <= 1


def test_a_training_can_start_in_the_middle(dataset):
    whole, rest = (small(dataset, rounds=3) for _ in range(2))
    trained(whole)
    rest.run_round(0)
    assert [result.round for result in rest.run(start=1)] == [1, 2]
    assert not differences(everything(whole), everything(rest))


def test_class_counts_are_those_of_the_clients(dataset):
    run = small(dataset, partition=Shards(per_client=2))
    for row, client in zip(run.class_counts, run.clients, strict=True):
        labels = dataset.train_labels[client.samples].tolist()
        assert row.tolist() == [labels.count(label) for label in range(10)]


def test_a_single_client_that_diverges_ends_the_training(dataset):
    run = small(dataset, clients=1, rounds=3, local={"lr": 1e30})
    with pytest.raises(TrainingError, match="client-0: '"):
        list(run.run())


def test_a_servers_step_that_overflows_is_not_the_clients_fault(dataset):
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    options = {"clients": 3, "cohort": 1, "rounds": 9, "eval_every": 9, "server": ServerSGD(lr=1e30)}
    run = federation(dataset, NoDefense(), model=model, **options)
    rounds = run.run()
    assert next(rounds).aggregated
    with pytest.raises(TrainingError, match=r"a step of ServerSGD with learning rate 1e\+30"):
        list(rounds)
    assert all(bool(tensor.isfinite().all()) for tensor in run.server.snapshot().values())


def test_refused_for_another_reason_they_have_not_diverged(dataset, monkeypatch):
    def refuse(self, client, update):
        raise UpdateError(gathered("Update refused.", ["'w' has shape (2,)"], "Send what was asked for."))

    monkeypatch.setattr("fedkl.aggregation.plain.PlainRound._take", refuse)
    with pytest.raises(TrainingError) as caught:
        small(dataset).run_round(0)
    assert str(caught.value) == (
        "Round 0: the updates of all 3 clients were refused (client-0: 'w' has shape (2,)). "
        "Send what was asked for."
    )


class Tied(torch.nn.Module):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3072, 10)
        self.second = torch.nn.Linear(3072, 10)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.first(x.flatten(1)) + self.second(x.flatten(1))


def test_tied_weights_are_averaged_or_refused(dataset):
    def tied(server):
        training = FederatedTraining(rounds=1, server=server)
        return Federation(Tied(), defense=NoDefense(), dataset=dataset, training=training, seed=0)

    run = tied(Averaging())
    list(run.run())
    assert torch.equal(run.server.state["first.weight"], run.server.state["second.weight"])
    with pytest.raises(ConfigError, match=r"second\.weight.*tied"):
        tied(ServerSGD())
    with pytest.raises(ConfigError, match=r"second\.weight.*tied"):  # and no public buffer
        federation(dataset, NoDefense(), model=Tied(), local={"algorithm": "fedsgd"})


class Masked(nn.Module):
    """It has a causal mask, as `nn.Transformer.generate_square_subsequent_mask` gives it."""

    def __init__(self, *, persistent):
        super().__init__()
        self.head = nn.Linear(32, 10)
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(32), persistent=persistent
        )

    def forward(self, x):
        return self.head((x.mean(1) @ self.mask.exp()).mean(1))


def test_a_model_that_is_not_finite_has_not_diverged(dataset):
    for model, name in ((Masked(persistent=True), "mask"), (seeded(Normless), "1.weight")):
        if name == "1.weight":
            nn.init.constant_(model[1].weight, torch.nan)
        for defense in (NoDefense(), GaussianNoise()):
            with pytest.raises(ConfigError, match=rf"(?s)'{name}' has non-finite.*persistent=False.*diverge"):
                federation(dataset, defense, model=model)
    trained(federation(dataset, NoDefense(), model=Masked(persistent=False), rounds=1))


class Returning(nn.Module):
    """It returns something else than scores."""

    def __init__(self, wrap, *, features=10):
        super().__init__()
        self.wrap, self.head = wrap, nn.Linear(3072, features)

    def forward(self, x):
        return self.wrap(self.head(x.flatten(1)), self.training)


@dataclass
class Output:
    """As other libraries return it."""

    logits: torch.Tensor


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Returning(lambda scores, _: {"logits": scores}), r"got a dict .*network\(x\)\.logits"),
        (lambda: Returning(lambda scores, _: (scores, scores)), "got a tuple in train mode"),
        (lambda: Returning(lambda scores, _: Output(scores)), "got a Output"),
        (lambda: Returning(lambda scores, new: scores if new else (scores,)), "got a tuple in eval mode"),
        (
            lambda: Returning(lambda scores, _: scores[:, :, None]),
            r"got torch\.float32 of shape \(2, 10, 1\)",
        ),
        (lambda: Returning(lambda scores, _: scores.argmax(1)), r"got torch\.int64 of shape \(2,\)"),
        (lambda: Returning(lambda scores, _: scores, features=1), r"of 10 classes, got .*\(2, 1\)"),
        (lambda: Returning(lambda scores, _: scores, features=9), r"of 10 classes, got .*\(2, 9\)"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 10)),
            r"images of shape \(3, 32, 32\).*RuntimeError",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).double(), r"torch\.float32 \(RuntimeError"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)),
            "It takes images with channels=1: load them",
        ),
    ],
)
def test_a_network_that_does_not_fit_the_images_is_explained(dataset, build, message):
    with pytest.raises(DataError, match=rf"(?s)Federation: .*{message}"):
        federation(dataset, NoDefense(), model=build())


def test_more_scores_than_classes_train(dataset):
    model = seeded(lambda: Returning(lambda scores, _: scores, features=12))
    trained(federation(dataset, NoDefense(), model=model, rounds=1))


class Silent(nn.Module):
    """Its `train` returns nothing, as many write it; a norm of it stays as it is."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3072, 10)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()

    def eval(self):
        super().eval()

    def forward(self, x):
        return self.head(self.norm(x).flatten(1))


@pytest.mark.parametrize("defense", [NoDefense(), KeyLock(), DPSGD(), Soteria()], ids=lambda each: each.type)
def test_train_and_eval_need_not_return_the_model(dataset, defense):
    run = trained(federation(dataset, defense, model=seeded(Silent), rounds=1))
    assert run.use(run.clients[0]).model.norm.training is False


class Keeping(nn.Module):
    """It keeps what it computed."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3072, 10)
        self.seen = {}

    def forward(self, x):
        self.seen["last"] = self.head(self.norm(x).flatten(1))
        return self.seen["last"]


def test_a_model_that_keeps_results_is_named_with_them(dataset):
    model = Keeping()
    model(dataset.train_images[:2])
    with pytest.raises(ConfigError, match=r"(?s)Federation: Keeping .*'seen' is the result.*x\.detach"):
        federation(dataset, NoDefense(), model=model)


def test_a_batch_of_one_sample_that_a_norm_cannot_take_is_explained(dataset):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10), torch.nn.BatchNorm1d(10))
    training = FederatedTraining(rounds=1, local=LocalTraining(batch_size=63))
    run = Federation(model, defense=NoDefense(), dataset=dataset, training=training, seed=0)
    with pytest.raises(TrainingError, match=r"batch of one sample.*now 63"):
        list(run.run())
