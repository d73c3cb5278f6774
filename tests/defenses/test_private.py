"""Clipping, DP-SGD and client-level DP: what they bound, what they add, and what an attacker makes of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl import data
from fedkl.attacking import SimulatedClients, trials_of
from fedkl.attacking.gradients import full_gradient, step_gradient
from fedkl.attacking.observing import observe
from fedkl.attacks import DLG, ClosedForm, LinearRows
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.auditing import Subject
from fedkl.auditing.clients import Clients
from fedkl.auditing.plan import exposures_of
from fedkl.defenses import DEFENSES, NoDefense, own_arms, plain_arm
from fedkl.defenses.client_dp import ClientDP
from fedkl.defenses.clipping import Clipped, Clipping
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.errors import ConfigError, TrainingError
from fedkl.federated import FederatedTraining, Federation
from fedkl.federated.options import LocalTraining
from fedkl.keys import imitated_uniform
from fedkl.protocol import Procedure, Sending
from fedkl.protocol.per_example import clipped_sum
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec

CLIP = 0.05  # far below the norm of a gradient here


@pytest.fixture(scope="module")
def images():
    whole = data.load("mnist-sample")
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    return replace(whole, **{part: getattr(whole, part)[:120] for part in parts})


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.Sigmoid(), nn.Flatten(), nn.Linear(196, 10))


def wide():
    """Its gradient determines the image."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 16, 5, stride=2, padding=2)
    return nn.Sequential(layer, nn.Sigmoid(), nn.Flatten(), nn.Linear(4096, 10))


def norm(tensors):
    return torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm()


def observed(defense, images, *, batch_size=1, local=None, model=None):
    arm, model = own_arms(defense).get(defense.type, plain_arm()), model or net()
    (trial,) = trials_of(images, trials=1, batch_size=batch_size)
    victim = defense.prepare(model)
    return trial, observe(victim, arm=arm, model=model, trial=trial, classes=10, local=local or Procedure())


def clipped_by_hand(model, x, y, *, clip):
    """The sum over images, one after the other."""
    total = {}
    for image, label in zip(x, y, strict=True):
        one = full_gradient(model, image[None], label[None])
        factor = min(1.0, float(clip / norm(one)))
        total = {name: total.get(name, 0) + factor * tensor for name, tensor in one.items()}
    return total


RESCALED = [NoDefense(), Clipping(max_norm=CLIP), DPSGD(clip=CLIP, noise_multiplier=0.0)]


# What is sent


def test_a_clipped_change_is_as_long_as_it_may_be(images):
    _, plain = observed(NoDefense(), images, local=Procedure())
    _, clipped = observed(Clipping(max_norm=CLIP), images)
    _, loose = observed(Clipping(max_norm=1e3), images)
    assert float(norm(clipped.gradient)) == pytest.approx(CLIP, rel=1e-5)
    factor = CLIP / norm(plain.gradient)
    for name, tensor in plain.gradient.items():
        torch.testing.assert_close(clipped.gradient[name], (factor * tensor).float())
        torch.testing.assert_close(loose.gradient[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_bound_holds_in_half_precision(dtype):
    """It is what the noise is for: what is longer gives away more than the ledger counts."""
    for seed in range(20):
        draws = torch.Generator().manual_seed(seed)
        sizes = {"a": 999, "b": 7}  # of numbers whose squares a half of 16 bits cannot hold
        change = {name: (300 * torch.randn(n, generator=draws)).to(dtype) for name, n in sizes.items()}
        sent = Clipped(max_norm=1.0)(change, change)
        assert 0.98 < float(norm({name: tensor.double() for name, tensor in sent.items()})) <= 1 + 1e-6


def test_clipped_weights_are_as_far_from_those_received_as_they_may_be(images):
    local = Procedure(algorithm="fedavg", steps=3, lr=0.5)
    _, seen = observed(Clipping(max_norm=CLIP), images, batch_size=4, local=local)
    assert float(norm(seen.gradient)) * local.lr == pytest.approx(CLIP, rel=1e-3)


def test_client_dp_sends_the_clipped_change_with_noise_of_its_size(images):
    dp = ClientDP(clip=CLIP, noise_multiplier=2.0)
    _, noisy = observed(dp, images)
    _, again = observed(dp, images)
    _, clipped = observed(Clipping(max_norm=CLIP), images)
    noise = torch.cat([(noisy.gradient[name] - t).flatten() for name, t in clipped.gradient.items()])
    assert float(noise.std()) == pytest.approx(2 * CLIP, rel=0.1)
    assert abs(float(noise.mean())) < 5 * 2 * CLIP / len(noise) ** 0.5
    assert all(not torch.equal(noisy.gradient[name], again.gradient[name]) for name in noisy.gradient)


@pytest.mark.parametrize("count", [1, 7])
def test_dp_sgd_clips_each_image(images, count):
    trial, seen = observed(DPSGD(clip=CLIP, noise_multiplier=0.0), images, batch_size=count)
    expected = clipped_by_hand(net(), trial.images, trial.labels, clip=CLIP)
    whole = full_gradient(net(), trial.images, trial.labels)
    for name, tensor in expected.items():
        torch.testing.assert_close(seen.gradient[name], tensor / count, rtol=1e-4, atol=1e-7)
        assert not torch.allclose(whole[name], seen.gradient[name], rtol=0.1)


def test_no_image_counts_more_than_its_clip(images):
    """Sensitivity: taking an image out moves the sum by the clip at most, whatever the image."""
    how = DPSGD(clip=CLIP, noise_multiplier=0.0).procedure(Procedure())
    x, y = images.test_images[:6].clone(), images.test_labels[:6]
    x[0] = 100  # an image that no other would outweigh
    with_it = step_gradient(net(), x, y, train_mode=True, local=how, samples=6)
    without = step_gradient(net(), x[1:], y[1:], train_mode=True, local=how, samples=6)
    moved = norm({name: 6 * (with_it[name] - tensor) for name, tensor in without.items()})
    assert float(moved) == pytest.approx(CLIP, rel=1e-3)


def test_the_noise_of_dp_sgd_is_of_the_stated_size(images):
    how = DPSGD(clip=CLIP, noise_multiplier=3.0).procedure(Procedure())
    x, y = images.test_images[:4], images.test_labels[:4]
    sent = step_gradient(net(), x, y, train_mode=True, local=how, samples=4)
    mean = clipped_by_hand(net(), x, y, clip=CLIP)
    noise = torch.cat([(4 * sent[name] - mean[name]).flatten() for name in sent])
    assert float(noise.std()) == pytest.approx(3 * CLIP, rel=0.1)


def test_an_empty_batch_is_noise_only(images):
    how = DPSGD(clip=CLIP, noise_multiplier=1.0).procedure(Procedure())
    sent = step_gradient(
        net(), images.test_images[:0], images.test_labels[:0], train_mode=True, local=how, samples=10
    )
    noise = torch.cat([10 * tensor.flatten() for tensor in sent.values()])
    assert float(noise.std()) == pytest.approx(CLIP, rel=0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {"momentum": 0.9},
        {"optimizer": "adam"},
        {"weight_decay": 0.1},
        {"proximal": 0.5},
        {"precision": "bfloat16"},
        {"algorithm": "fedsgd", "momentum": 0.0, "weight_decay": 0.0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_procedure_trains_with_it(images, fields):
    def trained(defense):
        local = LocalTraining(**{"batch_size": 16, **fields})
        training = FederatedTraining(clients=2, rounds=2, local=local)
        federation = Federation(net(), defense=defense, dataset=images, training=training, seed=0)
        results = list(federation.run())
        return federation.server.state, results

    state, results = trained(DPSGD(clip=1.0, noise_multiplier=0.5))
    plain, _ = trained(NoDefense())
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert all(not torch.equal(state[name], plain[name]) for name in plain)
    assert [result.updates for result in results] == [2, 2]


# Batches


def test_batches_are_drawn_image_by_image():
    how = DPSGD().procedure(Procedure(algorithm="fedavg", epochs=40, batch_size=8))
    batches = how.batches(100)
    assert len(batches) == how.step_count(100) == 40 * 13
    sizes = torch.tensor([len(batch) for batch in batches]).double()
    assert float(sizes.mean()) == pytest.approx(8, abs=0.5)
    assert float(sizes.var()) == pytest.approx(100 * 0.08 * 0.92, rel=0.3)  # binomial, not all alike
    assert all(len(batch.unique()) == len(batch) for batch in batches)
    plain = Procedure(algorithm="fedavg", epochs=1, batch_size=8).batches(100)
    assert {len(batch) for batch in plain} == {8, 4}


def test_one_gradient_is_of_all_images():
    how = DPSGD().procedure(Procedure(batch_size=2))
    assert how.sampling_rate(100) == 1
    assert [batch.tolist() for batch in how.batches(5)] == [[0, 1, 2, 3, 4]]


def test_a_federation_draws_its_batches(images):
    """Their sizes differ, and are others each time: the operating system draws."""
    local = LocalTraining(batch_size=8, epochs=10)
    training = FederatedTraining(clients=1, rounds=1, local=local)
    federation = Federation(net(), defense=DPSGD(), dataset=images, training=training, seed=0)
    worker, client = federation._pool.workers[0], federation.clients[0]

    def sizes():
        return [len(labels) for _, labels in worker._batches(client, 0)]

    first, again = sizes(), sizes()
    assert len(first) == 10 * 15
    assert sum(first) / len(first) == pytest.approx(8, abs=1.2)
    assert len(set(first)) > 3
    assert first != again


def test_a_sampled_gradient_does_not_say_how_many_images_it_is_of(images):
    local = LocalTraining(algorithm="fedsgd", batch_size=8)
    training = FederatedTraining(clients=2, rounds=1, local=local)
    federation = Federation(net(), defense=DPSGD(), dataset=images, training=training, seed=0)
    seen = []
    federation._transformed = lambda update, client: seen.append(update.num_samples) or update
    for round in range(6):
        federation.run_round(round)
    assert set(seen) == {8}


# Attackers


@pytest.mark.parametrize("fields", [{}, {"algorithm": "fedavg", "steps": 3, "lr": 0.5, "batch_size": 2}])
def test_attackers_differentiate_clipped_images(images, fields):
    """The twin of what a client does, to the last digits; without the clipping it is far off."""
    trial, seen = observed(
        DPSGD(clip=CLIP, noise_multiplier=0.0), images, batch_size=4, local=Procedure(**fields)
    )
    naive = replace(seen, local=replace(seen.local, per_example=None))
    ours, theirs = (differentiated(each, trial) for each in (seen, naive))
    for name, tensor in seen.gradient.items():
        torch.testing.assert_close(ours[name].float(), tensor, rtol=2e-3, atol=2e-5)
        assert (theirs[name] - tensor).norm() > 0.1 * tensor.norm()


def differentiated(observation, trial):
    matching = GradientMatching([observation], labels=[trial.labels])
    tensors, buffers = (
        {name: stacked[0] for name, stacked in part.items()} for part in (matching._known, matching._buffers)
    )
    seen = {name: matching._observed.first(name) for name in matching._observed}
    return matching._update(trial.images.double(), trial.labels, tensors, buffers, seen)


@pytest.mark.parametrize("defense", [Clipping(max_norm=CLIP), DPSGD(clip=CLIP, noise_multiplier=0.0)])
def test_the_informed_attacker_finds_what_the_naive_one_does_not(images, defense):
    """Both match the gradient; the naive one takes a clipped one for whole."""
    trial, seen = observed(defense, images, model=wide())
    naive = replace(seen, transform=None, local=Procedure())
    attack = DLG(evaluations=120)

    def wrong(observation):
        found = attack.reconstruct(observation, generator=torch.Generator().manual_seed(0)).images
        return float((found.clamp(0, 1) - trial.images).square().mean())

    assert wrong(seen) < 0.1 * wrong(naive)


@pytest.mark.parametrize("local", [Procedure(), Procedure(algorithm="fedavg", steps=1, lr=0.1)])
@pytest.mark.parametrize(
    "defense",
    [NoDefense(), Clipping(max_norm=CLIP), DPSGD(clip=CLIP, noise_multiplier=0.0)],
    ids=lambda d: d.type,
)
def test_rows_of_a_linear_layer_are_read_through_clipping(images, defense, local):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 20), nn.ReLU(), nn.Linear(20, 10))
    trial, seen = observed(defense, images, local=local, model=model)
    found = LinearRows().reconstruct(seen, generator=torch.Generator().manual_seed(0))
    assert float((found.images - trial.images).abs().max()) < 2e-3


@pytest.mark.parametrize(
    "defense",
    [NoDefense(), Clipping(max_norm=CLIP), DPSGD(clip=CLIP, noise_multiplier=0.0)],
    ids=lambda d: d.type,
)
def test_the_closed_form_reads_through_clipping(images, defense):
    trial, seen = observed(defense, images, model=wide())
    found = ClosedForm().reconstruct(seen, generator=torch.Generator().manual_seed(0))
    assert float((found.images - trial.images).square().mean()) < 1e-3


@pytest.mark.parametrize("local", [Procedure(), Procedure(algorithm="fedavg", steps=2, batch_size=3)])
def test_played_clients_have_noise_of_the_attackers_seed(images, local):
    defense = DPSGD(clip=CLIP, noise_multiplier=1.0)
    arm, model = own_arms(defense)[defense.type], net()
    batch = images.test_images[:4][None], images.test_labels[:4][None]

    def played(seed):
        clients = SimulatedClients.of(
            arm,
            defense.prepare(model),
            model,
            local=local,
            generator=torch.Generator().manual_seed(seed),
        )
        return clients(*batch)

    first, again, other = played(0), played(0), played(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)


# Refusals


class WithNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), norm, nn.Flatten(), nn.Linear(196, 10))

    def forward(self, images):
        return self.layers(images)


NORMS = [
    nn.BatchNorm2d(4),
    nn.BatchNorm2d(4, track_running_stats=False),
    nn.InstanceNorm2d(4, track_running_stats=True),
]


@pytest.mark.parametrize("layer", NORMS, ids=["batch", "untracked", "tracked"])
def test_norms_that_mix_images_or_keep_statistics_are_refused(images, layer):
    training = FederatedTraining(clients=2, rounds=1)
    with pytest.raises(TrainingError, match=r"layers\.1.*(\n.*)*GroupNorm"):
        Federation(WithNorm(layer), defense=DPSGD(), dataset=images, training=training, seed=0)
    with pytest.raises(TrainingError, match="mix the images"):
        observed(DPSGD(), images, batch_size=2, model=WithNorm(layer))


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm((4, 7, 7))])
def test_norms_of_each_image_are_not(images, layer):
    training = FederatedTraining(clients=2, rounds=1)
    federation = Federation(WithNorm(layer), defense=DPSGD(), dataset=images, training=training, seed=0)
    assert [result.updates for result in federation.run()] == [2]


def test_a_batch_norm_in_eval_mode_mixes_nothing(images):
    how = DPSGD(clip=CLIP, noise_multiplier=0.0).procedure(Procedure())
    x, y = images.test_images[:3], images.test_labels[:3]
    model = WithNorm(nn.BatchNorm2d(4))
    sent = step_gradient(model, x, y, train_mode=False, local=how, samples=3)
    assert float(3 * norm(sent)) <= 3 * CLIP * 1.0001


def test_a_network_that_cannot_be_traced_is_refused_with_a_reason(images):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3072, 10)

        def forward(self, images):
            return self.layer(images.flatten(1)) * (2 if float(images.sum()) > 0 else 1)

    how = DPSGD().procedure(Procedure())
    with pytest.raises(TrainingError, match="one image at a time"):
        step_gradient(
            Branches(), images.test_images[:2], images.test_labels[:2], train_mode=True, local=how, samples=2
        )


def test_a_network_that_assigns_a_buffer_is_refused_and_is_as_it_was(images):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3072, 10)
            self.body.register_buffer("mean", torch.zeros(()))

        def forward(self, images):
            self.body.mean = 0.9 * self.body.mean + 0.1 * images.mean()
            return self.body(images.flatten(1))

    model, how = Remembers(), DPSGD().procedure(Procedure())
    x, y = images.test_images[:2], images.test_labels[:2]
    with pytest.raises(TrainingError, match=r"assigns 'body\.mean'\. Write to no buffer"):
        step_gradient(model, x, y, train_mode=True, local=how, samples=2)
    assert torch.equal(model.body.mean, torch.zeros(()))
    assert model(x).shape == (2, 10)


def test_a_function_that_trains_cannot_be_changed(images):
    def loop(network, inputs, labels):
        raise AssertionError("not called")

    subject = Subject(
        name="looped",
        model=net,
        images=images.test_images,
        labels=images.test_labels,
        procedure=loop,
        images_per_client=4,
        classes=10,
    )
    exposure = exposures_of(subject, defense=NoDefense(), masking="none", batch_sizes=(), seed=0)[0].exposure
    with pytest.raises(ConfigError, match=r"dp-sgd.*changes how clients train"):
        Clients.of(subject, exposure=exposure, procedure=loop, defense=DPSGD(), seed=0)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Clipping, {"max_norm": 0.0}),
        (ClientDP, {"clip": -1.0}),
        (ClientDP, {"noise_multiplier": float("nan")}),
        (DPSGD, {"clip": float("inf")}),
        (DPSGD, {"noise_multiplier": -1.0}),
    ],
)
def test_impossible_options_are_refused(kind, fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        kind(**fields)


def test_imitated_noise_is_normal():
    """What `private_gradient` takes from a generator has the distribution that it claims."""
    draws = imitated_uniform(torch.Generator().manual_seed(0))
    assert 0 < float(draws(1000).min()) < float(draws(1000).max()) < 1


def test_they_are_registered():
    assert {"clipping", "client-dp", "dp-sgd"} <= {kind.type for kind in DEFENSES}


def test_an_image_whose_gradient_overflows_decides_nothing():
    def gradient(x, y):
        return {"w": x.flatten() * torch.tensor([1.0, 2.0])}, x.sum()

    images = torch.tensor([[3.0, 4.0], [math.inf, 1.0]])
    like = {"w": torch.zeros(2)}
    total, _ = clipped_sum(gradient, images, torch.zeros(2), clip=1.0, like=like)
    alone, _ = clipped_sum(gradient, images[:1], torch.zeros(1), clip=1.0, like=like)
    assert torch.equal(total["w"], alone["w"])
    assert float(alone["w"].norm()) == pytest.approx(1.0)


def test_client_dp_sends_nothing_exactly():
    specs = {name: TensorSpec(shape=(3,), dtype=dtype) for name, dtype in (
        ("w", torch.float32), ("hist", torch.int64), ("norm.num_batches_tracked", torch.int64))}  # fmt: skip
    tensors = {name: torch.ones(3, dtype=spec.dtype) for name, spec in specs.items()}
    update = PublicUpdate(
        schema=PublicSchema(kind="weights", specs=specs), tensors=tensors, num_samples=1, round=0
    )
    with pytest.raises(ConfigError, match=r"(?s)'hist' is torch.int64") as refused:
        ClientDP().transform(update, client=Sending(received=tensors))
    assert "num_batches_tracked" not in str(refused.value)
