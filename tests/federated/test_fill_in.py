"""The server's own model without any client's lock: complete, and public tensors as they are."""

from __future__ import annotations

import pytest
import torch

from fedkl.defenses import KeyLock, PublicNorm
from fedkl.defenses.completion import Completion
from fedkl.federated import server_fill_ins
from fedkl.federated.fill_in import _baked
from tests.federated.setting import TwoNorms, federation, lenet, trained


def filled_in(dataset, defense):
    run = trained(federation(dataset, defense, model=TwoNorms()))
    server = defense.prepare(TwoNorms())
    server.load_public_state(run.server.state)
    return run, Completion(server.bake(), server)


def test_fill_ins_of_an_untrained_federation(dataset):
    run = trained(federation(dataset, KeyLock(), rounds=1))
    arms = server_fill_ins(
        defense=run.defense,
        model=lenet(),
        state=run.server.state,
        split=run.split,
        clients=run.clients,
        auxiliary=(dataset.test_images[:20], dataset.test_labels[:20]),
        test=(dataset.test_images[20:], dataset.test_labels[20:]),
        refit_steps=5,
    )
    places = [(arm.arm, arm.statistics, arm.auxiliary) for arm in arms]
    assert len(places) == len(set(places)) == 8
    assert [arm.auxiliary for arm in arms if arm.arm == "refit"] == [10, 20]
    assert {arm.arm for arm in arms} == {"neutral", "random-key", "mean-affine", "refit"}
    assert all(0 <= arm.accuracy <= 1 for arm in arms)


def test_fill_ins_leave_everything_public_as_it_is(dataset):
    run, filled = filled_in(dataset, KeyLock())
    baked = [_baked(client, run.split, run.server.state) for client in run.clients]
    images, labels = dataset.test_images[:20], dataset.test_labels[:20]
    variants = [filled.neutral(), filled.averaged(baked), filled.refitted(images, labels, steps=3)]
    variants += [filled.neutral()._copy()]
    for variant in variants:
        for _, model, _ in variant.with_statistics(images):
            state = model.state_dict()
            for name, tensor in run.server.state.items():
                assert torch.equal(state[name], tensor), name
    neutral = variants[0].model
    assert torch.equal(neutral.body[1].weight, torch.ones(4))
    assert torch.equal(neutral.body[1].bias, torch.zeros(4))
    assert not torch.equal(variants[2].model.body[1].weight, filled.model.body[1].weight)


def test_fill_ins_keep_public_statistics(dataset):
    run, filled = filled_in(dataset, KeyLock(share_statistics=True))
    ((kind, model, used),) = filled.neutral().with_statistics(dataset.test_images[:20])
    assert (kind, used) == ("public", 0)
    assert torch.equal(model.body[1].running_mean, run.server.state["body.1.running_mean"])
    assert model.body[1].running_mean.any()


def test_re_estimated_statistics_are_those_of_the_auxiliary_images(dataset):
    _, filled = filled_in(dataset, KeyLock())
    images = dataset.test_images[:20]
    (_, initial, _), (_, estimated, used) = filled.neutral().with_statistics(images)
    assert used == 20
    assert torch.equal(initial.body[1].running_mean, torch.zeros(4))
    features = estimated.body[0](images)
    torch.testing.assert_close(estimated.body[1].running_mean, features.mean((0, 2, 3)))
    torch.testing.assert_close(estimated.body[1].running_var, features.var((0, 2, 3)))


def test_without_private_parameters_there_is_nothing_to_fill_in(dataset):
    run = trained(federation(dataset, PublicNorm(), rounds=1))
    pair = (dataset.test_images[:20], dataset.test_labels[:20])
    options = {"defense": run.defense, "model": lenet(), "state": run.server.state, "split": run.split}
    assert server_fill_ins(**options, clients=run.clients, auxiliary=pair, test=pair) == []


def test_the_mean_oracle_of_one_client_is_its_own_model(dataset):
    """Oracle: with one client the mean γ and β give exactly the client's parameters."""
    run = trained(federation(dataset, KeyLock(), clients=1))
    server = run.defense.prepare(lenet())
    server.load_public_state(run.server.state)
    baked = _baked(run.clients[0], run.split, run.server.state)
    mean = Completion(server.bake(), server).averaged([baked]).model
    for name, parameter in baked.named_parameters():
        torch.testing.assert_close(mean.get_parameter(name), parameter)


@pytest.mark.parametrize("layers", ["first", "all"])
def test_the_arm_of_one_client_is_as_good_as_the_client(dataset, layers):
    """Oracle: the mean over one client, with public statistics, is the client's own model."""
    defense = KeyLock(layers=layers, share_statistics=True)
    run = federation(dataset, defense, clients=1, rounds=3, local={"batch_size": 16, "lr": 0.05})
    *_, last = run.run()
    test = (dataset.test_images, dataset.test_labels)
    arms = server_fill_ins(
        defense=defense,
        model=lenet(),
        state=run.server.state,
        split=run.split,
        clients=run.clients,
        auxiliary=test,
        test=test,
        refit_steps=1,
    )
    (mean,) = (arm for arm in arms if arm.arm == "mean-affine")
    assert mean.accuracy == pytest.approx(last.accuracy)
