"""Before a client uses a global model, its norms' private statistics are of that model's weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedkl.data import Dataset
from fedkl.defenses import KeyLock, NoDefense, PrivateNorm
from fedkl.federated import Checkpoints, FederatedTraining
from fedkl.locking import recalibrate_norms_
from fedkl.metrics import class_accuracies
from tests.federated.setting import (
    TwoNorms,
    copy_secrets,
    differences,
    everything,
    federation,
    seeded,
    trained,
)

PRIVATE = [KeyLock(), KeyLock(layers="all"), PrivateNorm()]


def small(dataset, defense, **options):
    return federation(dataset, defense, model=seeded(TwoNorms), **options)


def used_by_hand(run, client):
    """The client's model with statistics of its own training images."""
    split = run.defense.prepare(seeded(TwoNorms))
    client.enter(split, run.server.state)
    recalibrate_norms_(split, run.dataset.train_images[client.samples])
    return split


@pytest.mark.parametrize("defense", PRIVATE, ids=repr)
def test_a_client_is_evaluated_with_statistics_of_these_weights_and_keeps_them(dataset, defense):
    run = small(dataset, defense)
    last = list(run.run())[-1]
    for client in run.clients:
        split = used_by_hand(run, client)
        assert not differences(split.private_state(), client.private_state)
        recalls = class_accuracies(split.model, dataset.test_images, dataset.test_labels, classes=10)
        counts = torch.bincount(dataset.test_labels, minlength=10).double()
        seen = ~recalls.isnan()
        accuracy = float((recalls[seen] * counts[seen]).sum() / counts[seen].sum())
        assert last.accuracies[client.name] == pytest.approx(accuracy, abs=1e-9)


def test_kept_they_are_those_of_the_last_training(dataset):
    """And nothing that is sent depends on it: the global model is the same to the last bit."""
    run, kept, unseen = (
        small(dataset, KeyLock(), norm_statistics=how, rounds=3, eval_every=every)
        for how, every in (("recalibrated", 1), ("kept", 1), ("kept", 3))
    )
    for other in (kept, unseen):
        copy_secrets(run, other)
    for each in (run, kept, unseen):
        trained(each)
    assert not differences(run.server.snapshot(), kept.server.snapshot())
    assert not differences(everything(kept), everything(unseen))
    changed = {name.rpartition(".")[2] for name in differences(everything(run), everything(kept))}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_no_test_image_is_looked_at(dataset):
    """Test images that are all black change no statistics."""
    black = Dataset(
        dataset.spec,
        train_images=dataset.train_images,
        train_labels=dataset.train_labels,
        test_images=torch.zeros(20, 3, 32, 32),
        test_labels=dataset.test_labels[:20],
    )
    run, other = small(dataset, KeyLock()), small(black, KeyLock())
    copy_secrets(run, other)
    assert not differences(everything(trained(run)), everything(trained(other)))


def test_a_checkpoint_holds_statistics_of_clients_that_were_only_evaluated(dataset, tmp_path):
    options = {"clients": 3, "cohort": 1, "rounds": 6}
    run, store = small(dataset, KeyLock(), **options), Checkpoints(tmp_path, passphrase="horse")
    store.save(run, round=0)
    for round in range(4):
        run.run_round(round)
        store.save(run, round=round + 1)
    assert sum(client.trained for client in run.clients) > 1
    again = small(dataset, KeyLock(), **options)
    assert Checkpoints(tmp_path, passphrase="horse").restore(again) == 4
    assert not differences(everything(run), everything(again))
    for each in (run, again):
        list(each.run(start=4))
    assert not differences(everything(run), everything(again))


@pytest.mark.parametrize("defense", [NoDefense(), KeyLock(share_statistics=True)], ids=lambda d: d.type)
def test_where_none_are_private_nothing_is_done(dataset, defense, monkeypatch):
    monkeypatch.setattr("fedkl.federated.worker.recalibrate_norms_", lambda *args: pytest.fail("called"))
    run = small(dataset, defense)
    run.evaluate()
    assert [client.revision for client in run.clients] == [0, 0, 0]


def test_a_client_with_one_image_has_the_statistics_that_it_had(dataset):
    few = dataclasses.replace(
        dataset, train_images=dataset.train_images[:3], train_labels=dataset.train_labels[:3]
    )
    run = small(few, KeyLock())
    before = everything(run)
    run.evaluate()
    assert not differences(before, everything(run))


def test_weights_that_overflow_are_evaluated_and_nothing_is_kept(dataset):
    run = small(dataset, KeyLock())
    state = run.server.state
    run.server.apply_weights({**state, "body.0.weight": torch.full_like(state["body.0.weight"], 1e30)})
    before = [client.private_state for client in run.clients]
    accuracies, _ = run.evaluate()
    assert set(accuracies) == {client.name for client in run.clients}
    for client, earlier in zip(run.clients, before, strict=True):
        assert not differences(earlier, client.private_state)


def test_the_model_that_a_client_uses(dataset):
    """Also of a client that nobody has evaluated."""
    run = trained(small(dataset, KeyLock(), eval_clients=1))
    names = {client.name for client in run.evaluated_clients()}
    other = next(each for each in run.clients if each.name not in names)
    expected = used_by_hand(run, other).private_state()
    assert differences(expected, other.private_state)
    split = run.use(other)
    assert not split.model.training
    assert not differences(expected, split.private_state())


def test_the_default_recalibrates():
    assert FederatedTraining().norm_statistics == "recalibrated"


class Frozen(TwoNorms):
    """Its first norm stays as it was pretrained, as `train` of many fine-tuned networks has it."""

    def train(self, mode=True):
        super().train(mode)
        next(each for each in self.modules() if isinstance(each, torch.nn.BatchNorm2d)).eval()
        return self


def test_frozen_norms_stay_and_with_them_what_is_sent(dataset):
    """Training uses their statistics: an evaluation that changed them would change the next update."""
    run, kept = (
        federation(dataset, PrivateNorm(), model=seeded(Frozen), norm_statistics=how, rounds=3)
        for how in ("recalibrated", "kept")
    )
    copy_secrets(run, kept)
    for each in (run, kept):
        trained(each)
    assert not differences(run.server.snapshot(), kept.server.snapshot())
