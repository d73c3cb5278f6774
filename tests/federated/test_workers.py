"""Clients on several workers at once: the same results, repeatable, whatever the threads do."""

from __future__ import annotations

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from fedkl.data import Dirichlet
from fedkl.defenses import KeyLock, NoDefense
from fedkl.federated import Execution
from fedkl.federated.pool import WorkerPool, draws_random_numbers
from fedkl.federated.worker import Worker
from tests.federated.setting import (
    TwoNorms,
    WithDropout,
    copy_secrets,
    differences,
    everything,
    federation,
    one_update,
    seeded,
    trained,
)

MANY = {"clients": 5, "rounds": 2, "eval_every": 2, "partition": Dirichlet(alpha=1.0, min_samples=8)}


def workers(count):
    return Execution(workers=count)


@pytest.mark.parametrize(
    ("defense", "threads"), [(NoDefense(), 1), (KeyLock(layers="all"), 2)], ids=["none", "keylock"]
)
def test_workers_do_not_change_the_result(dataset, two_threads, defense, threads):
    """Every number of workers repeats itself exactly, and agrees with the others to rounding."""
    torch.set_num_threads(threads)
    model = seeded(TwoNorms)
    local = {"batch_size": 64, "augmentation": "flip"}
    runs = [
        federation(dataset, defense, model=model, execution=workers(count), local=local, **MANY)
        for count in (1, 1, 2, 2)
    ]
    for other in runs[1:]:
        copy_secrets(runs[0], other)
    results = [list(run.run()) for run in runs]
    assert [run.workers for run in runs] == [1, 1, 2, 2]
    one, one_again, two, two_again = (everything(run) for run in runs)
    assert not differences(one, one_again)
    assert not differences(two, two_again)
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    for a, b in zip(results[2], results[3], strict=True):
        assert (a.loss, a.accuracies, a.local_accuracies) == (b.loss, b.accuracies, b.local_accuracies)


class Centering(torch.nn.Module):
    """It keeps a mean of what it was trained on, outside its state, and what it was given last."""

    def __init__(self, how):
        super().__init__()
        self.how, self.head = how, torch.nn.Linear(3072, 10)
        self.register_buffer("mean", torch.zeros(3072), persistent=False)
        self.register_buffer("seen", None, persistent=False)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            mean = self.mean.lerp(x.mean(0), 0.5)
            if self.how == "written":
                self.mean.copy_(mean)
            else:
                self.mean = mean
        shift = 0 if self.seen is None else self.seen
        if self.training:
            self.seen = x.mean()
        return self.head(x - self.mean - shift)


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_nothing_outside_the_state_passes_from_client_to_client(dataset, two_threads, how):
    """Oracle: each client's update by a worker that nobody had before."""
    run = federation(dataset, NoDefense(), model=seeded(lambda: Centering(how)), execution=workers(1), **MANY)
    for index in range(MANY["clients"]):
        fresh = federation(dataset, NoDefense(), model=seeded(lambda: Centering(how)), **MANY)
        got, expected = (one_update(each, each.clients[index]) for each in (run, fresh))
        assert not differences(got.tensors, expected.tensors)
    worker = run._pool.workers[0]
    worker.prepare(run.clients[0], run.server.state)
    assert not worker.split.model.mean.any()
    assert worker.split.model.seen is None


def test_threads_are_given_back(dataset, two_threads):
    trained(federation(dataset, NoDefense(), model=seeded(TwoNorms), execution=workers(2), **MANY))
    assert torch.get_num_threads() == 2


def test_several_workers_leave_the_global_generator_alone(dataset, two_threads):
    """Threads that save and restore it in turns would not."""
    run = federation(dataset, NoDefense(), model=seeded(TwoNorms), execution=workers(2), **MANY)
    before = torch.get_rng_state()
    trained(run)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("asked", "cohort", "expected"), [(0, None, 2), (1, None, 1), (2, None, 2), (9, None, 2), (2, 1, 1)]
)
def test_how_many_workers_there_are(dataset, two_threads, asked, cohort, expected):
    """As many as asked for, but no more than clients of a round or processor cores."""
    options = MANY | {"cohort": cohort}
    run = federation(dataset, NoDefense(), model=seeded(TwoNorms), execution=workers(asked), **options)
    assert run.workers == expected


def test_a_model_that_draws_gets_one_worker_and_a_seed(dataset, two_threads):
    """Dropout: reproducible whatever the state of the global generator, which is left as it was."""
    model = seeded(WithDropout)
    states = []
    for seed in (5, 6):
        run = federation(dataset, NoDefense(), model=model, execution=workers(2), **MANY)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        trained(run)
        assert run.workers == 1
        assert torch.equal(torch.get_rng_state(), before)
        states.append(everything(run))
    assert not differences(*states)


def test_the_check_for_dropout_can_fail(dataset, monkeypatch):
    """Without its own seed the result depends on the global generator."""
    monkeypatch.setattr(Worker, "_model_randomness", lambda *_: contextlib.nullcontext())
    model = seeded(WithDropout)
    states = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(everything(trained(federation(dataset, NoDefense(), model=model))))
    assert differences(*states)


def test_dropout_differs_between_rounds_and_clients(dataset):
    """One seed for all would drop the same units every time."""
    run = federation(dataset, NoDefense(), model=seeded(WithDropout))
    worker, drawn = run._pool.workers[0], []
    for client in run.clients[:2]:
        for round in (0, 1):
            with worker._model_randomness(client, round):
                drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 4


class Jittered(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, images):
        return images * self.draw()


def test_draws_are_found_and_nothing_is_changed():
    images, model, dropout = torch.rand(2, 3, 32, 32), TwoNorms(), WithDropout()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert not draws_random_numbers(model, images)
    assert draws_random_numbers(dropout, images)
    for draw in (lambda: random.random(), lambda: np.random.rand()):  # noqa: NPY002 (others' layers do so)
        assert draws_random_numbers(Jittered(draw), images)
    assert torch.equal(torch.get_rng_state(), state)
    assert not differences(before, model.state_dict())


@pytest.mark.parametrize(("clients", "count"), [(1, 1), (1, 2), (2, 2), (5, 2), (5, 1)])
def test_every_client_has_its_turn_on_its_share_of_the_threads(dataset, two_threads, clients, count):
    """The threads depend on the number of workers only; results come with the largest client first."""
    options = MANY | {"clients": clients}
    run = federation(dataset, NoDefense(), model=seeded(TwoNorms), **options)
    pool = WorkerPool([copy.copy(run._pool.workers[0]) for _ in range(count)], threads=2)
    seen = list(pool.map(lambda worker, client: (id(worker), torch.get_num_threads()), run.clients))
    assert [client for client, _ in seen] == sorted(run.clients, key=lambda client: -client.num_samples)
    assert {threads for _, (_, threads) in seen} == {2 // count}
    assert {worker for _, (worker, _) in seen} <= {id(worker) for worker in pool.workers}


def test_an_error_ends_the_round_and_gives_the_threads_back(dataset, two_threads):
    """A bug in a task is not an update that was refused: it comes out."""
    run = federation(dataset, NoDefense(), model=seeded(TwoNorms), execution=workers(2), **MANY)

    def broken(worker, client):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(run._pool.map(broken, run.clients))
    assert torch.get_num_threads() == 2
