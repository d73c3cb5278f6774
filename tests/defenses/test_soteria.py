"""Soteria: which columns are pruned, and that a server which ignores them gets the images all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl import data
from fedkl.attacking.gradients import full_gradient
from fedkl.attacking.observing import trials_of
from fedkl.attacks import DLG, LinearRows
from fedkl.attacks.algebraic.structure import read_structure
from fedkl.defenses.soteria import Soteria
from fedkl.errors import ConfigError
from fedkl.federated import FederatedTraining, Federation, LocalTraining
from fedkl.locking import Split
from fedkl.protocol import Sending
from tests.defenses.attacked import errors, seen

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([1, 0, 3, 2])


def net():
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 5, stride=3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 10))


def sent(defense, network, kind="gradient"):
    """What a client sends, and what it would send without the defense."""
    gradient = full_gradient(network, IMAGES, LABELS, train_mode=False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors = gradient if kind == "gradient" else before | {n: before[n] - g for n, g in gradient.items()}
    update = Split(network).public_update(tensors, kind=kind, num_samples=4, round=0)
    at_hand = Sending.of(before, network, IMAGES, LABELS)
    changed = defense.transform(update, client=at_hand).tensors
    return changed, tensors, before


def oracle(network):
    """Σ ‖∂r_i/∂X‖ / |r_i| of the input of '4', one derivative at a time."""
    features = network.eval()[:4]
    scores = torch.zeros(36)
    for image in IMAGES:
        x = image[None].clone().requires_grad_()
        r = features(x)[0]
        for place in range(36):
            (slope,) = torch.autograd.grad(r[place], x, retain_graph=True)
            scores[place] += slope.norm() / r[place].abs()
    return scores.detach()


@pytest.mark.parametrize("kind", ["gradient", "weights"])
def test_the_columns_of_the_smallest_ratio_are_pruned_and_nothing_else(kind):
    network = net()
    changed, plain, before = sent(Soteria(percentile=75.0), network, kind=kind)
    pruned = oracle(network).argsort()[:27]
    kept = torch.ones(36, dtype=torch.bool).index_fill(0, pruned, False)
    start = before["4.weight"] if kind == "weights" else torch.zeros(20, 36)
    assert torch.equal(changed["4.weight"][:, ~kept], start[:, ~kept])
    assert torch.allclose(changed["4.weight"][:, kept], plain["4.weight"][:, kept])
    assert bool((changed["4.weight"][:, kept] != start[:, kept]).any(0).all())
    assert all(torch.equal(changed[name], plain[name]) for name in plain if name != "4.weight")


def test_nothing_is_pruned_at_percentile_zero_and_other_layers_can_be_named():
    changed, plain, _ = sent(Soteria(percentile=0.0), net())
    assert all(torch.equal(changed[name], plain[name]) for name in plain)
    changed, plain, _ = sent(Soteria(layer="6", percentile=50.0), net())
    assert int((changed["6.weight"] == 0).all(0).sum()) == 10
    assert torch.equal(changed["4.weight"], plain["4.weight"])


def test_the_mask_is_of_the_network_as_it_was_received():
    network = net()
    _, gradient, before = sent(Soteria(), network)
    update = Split(network).public_update(gradient, kind="gradient", num_samples=4, round=0)
    expected = Soteria().transform(update, client=Sending.of(before, network, IMAGES, LABELS)).tensors
    with torch.no_grad():
        network[0].weight.normal_()
    again = Soteria().transform(update, client=Sending.of(before, network, IMAGES, LABELS)).tensors
    assert torch.equal(again["4.weight"], expected["4.weight"])


def test_probes_estimate_what_rows_give():
    """Of 36 features the mask of 4 % standard error differs in few."""
    network = net()
    rows, _, _ = sent(Soteria(percentile=50.0, probes=36), network)
    few = nn.Sequential(*network[:4], nn.Unflatten(1, (1, 36)), *network[4:], nn.Flatten())
    update = full_gradient(few, IMAGES, LABELS, train_mode=False)
    split = Split(few).public_update(update, kind="gradient", num_samples=4, round=0)
    at_hand = Sending.of(few.state_dict(), few, IMAGES, LABELS)
    probed = Soteria(percentile=50.0, probes=300).transform(split, client=at_hand).tensors
    masks = [(tensor == 0).all(0) for tensor in (rows["4.weight"], probed["5.weight"])]
    assert int(masks[0].sum()) == int(masks[1].sum()) == 18
    assert int((masks[0] & masks[1]).sum()) >= 16


def test_what_it_cannot_do_is_refused():
    network = net()
    update = Split(network).public_update(
        full_gradient(network, IMAGES, LABELS), kind="gradient", num_samples=4, round=0
    )
    with pytest.raises(ConfigError, match="network and images at hand"):
        Soteria().transform(update, client=Sending(received=network.state_dict()))
    with pytest.raises(ConfigError, match="There are: 4, 6"):
        Soteria(layer="fc").transform(
            update, client=Sending.of(network.state_dict(), network, IMAGES, LABELS)
        )
    for wrong in ({"percentile": 101.0}, {"percentile": float("nan")}, {"probes": 0}):
        with pytest.raises(ConfigError, match="percentile in"):
            Soteria(**wrong)


@pytest.fixture(scope="module")
def images():
    return data.load("mnist-sample")


def small_trials(images):
    """Real images, so small that L-BFGS finds them within seconds: 14 × 14, gray."""
    pooled = torch.nn.functional.avg_pool2d(images.test_images[:4].mean(1, keepdim=True), 2)[:, :, 1:15, 1:15]
    return [
        replace(trial, images=image[None])
        for trial, image in zip(trials_of(images, trials=4), pooled, strict=True)
    ]


def small():
    """One on which the plain gradient gives these away."""
    torch.manual_seed(0)
    body = nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten()
    network = nn.Sequential(*body, nn.Linear(8 * 49, 10))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-0.5, 0.5)
    return network


def test_a_server_that_ignores_what_is_pruned_beats_one_that_does_not(images):
    trials = small_trials(images)
    attack = DLG(evaluations=150)
    by_arm = seen(Soteria(), small(), trials)
    found = {name: errors(attack, observations, trials) for name, observations in by_arm.items()}
    assert set(found) == {"no-norm", "soteria", "soteria-naive"}
    assert bool((found["soteria"] < 0.1 * found["soteria-naive"]).all()), found


def test_rows_of_a_layer_that_is_not_defended_are_read_as_ever(images):
    """The first layer of an MLP gives the image away exactly."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    trials = trials_of(images, trials=4)
    by_arm = seen(Soteria(), mlp, trials)
    for name in ("soteria", "soteria-naive"):
        assert all(int((o.gradient["3.weight"] == 0).all(0).sum()) >= 51 for o in by_arm[name])
        assert float(errors(LinearRows(), by_arm[name], trials).max()) < 1e-8


def test_a_defended_layer_is_not_read_as_it_is(images):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
    (observation,) = seen(Soteria(layer="1"), mlp, trials_of(images, trials=1))["soteria"]
    assert observation.altered == {"1.weight"}
    read = observation.unaltered()
    assert set(read.gradient) == set(observation.gradient) - {"1.weight"}
    assert read.up_to_a_factor
    assert "at least 100 auxiliary images" in LinearRows().refusal(observation).reason


@pytest.mark.parametrize("layer", ["3", None])
def test_structure_reads_what_is_left(images, layer):
    """The head's bias gives the label; of a pruned weight no input is read and no output called dead."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
    (trial,) = trials_of(images, trials=1)
    (observation,) = seen(Soteria(layer=layer), mlp, [trial])["soteria"]
    structure = read_structure(observation)
    assert torch.equal(structure.label, trial.labels)
    assert (structure.head_input is None) == (layer == "3")
    assert set(structure.dead) == ({"1"} if layer == "3" else {"3"})


def test_training_goes_on(images):
    part = ("train_images", "train_labels", "test_images", "test_labels")
    few = replace(images, **{name: getattr(images, name)[:400] for name in part})
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten()
    network = nn.Sequential(*body, nn.Linear(8 * 49, 10))
    training = FederatedTraining(clients=2, rounds=3, local=LocalTraining(lr=0.05))
    federation = Federation(network, defense=Soteria(), dataset=few, training=training, seed=0)
    accuracy = [each.accuracy for each in federation.run()]
    assert accuracy[-1] > 0.3, accuracy


def test_a_flower_mod_gives_it_what_it_looks_at():
    flwr = pytest.importorskip("flwr.clientapp")
    from flwr.app import ArrayRecord, Context, Message, RecordDict

    from fedkl.flower import TransformMod, in_process, public_arrays

    network, trained = net(), net()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)

    def train(message, context):
        return Message(RecordDict({"arrays": ArrayRecord(trained.state_dict())}), reply_to=message)

    def answered(**given):
        app = flwr.ClientApp(mods=[TransformMod(Soteria(percentile=75.0), **given)])
        app.train()(train)
        sent = RecordDict({"arrays": public_arrays(network, defense=Soteria())})
        with in_process._identity():
            message = Message(sent, dst_node_id=7, message_type="train")
            message.metadata.__dict__["_message_id"] = "1"
            return app(message=message, context=Context(1, 7, {}, RecordDict(), {}))

    answer = answered(network=trained, sample=lambda count: (IMAGES[:count], LABELS[:count]))
    weight = answer.content["arrays"].to_torch_state_dict()["4.weight"]
    pruned = (weight == network[4].weight).all(0)
    assert torch.equal(pruned.nonzero().flatten(), oracle(network).argsort()[:27].sort().values)
    assert answered().has_error()
