"""DLG and iDLG on real images: they beat their random start, and with little budget already identify."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl import lock, models
from fedkl.attacking import local_update, observe_gradient
from fedkl.attacks import DLG, IDLG, Knowledge, Observation, infer_label, infer_labels, known_labels
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.attacks.priors import outside_box
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import score
from fedkl.protocol import Auxiliary, Procedure
from fedkl.protocol.differentiable import plain_attention


def quality(reconstruction, images, dataset, first=0):
    index = list(range(first, first + len(images)))
    scores = score(
        reconstruction.images,
        images,
        candidates=dataset.test_images[:100],
        candidate_index=index,
        scaling="clip",
    )
    return scores


@pytest.mark.parametrize("attack", [DLG, IDLG])
def test_recovers_an_undefended_image(attack, observe_plain, dataset, generator):
    observation, images, labels = observe_plain(labels=attack is DLG)
    start = attack(evaluations=1, weighting="sqrt").reconstruct(observation, generator=generator)
    found = attack(evaluations=500, weighting="sqrt").reconstruct(
        observation, generator=generator.manual_seed(0)
    )
    (before,), (after,) = quality(start, images, dataset), quality(found, images, dataset)
    assert before.psnr < 8
    assert after.psnr > 30
    assert after.identified
    assert torch.equal(found.labels, labels)
    assert found.evaluations <= 500


def test_optimizes_the_label_along_where_it_is_not_granted(observe_plain, dataset, generator):
    observation, images, labels = observe_plain(first=1, labels=False)
    found = DLG(evaluations=700, weighting="sqrt").reconstruct(observation, generator=generator)
    assert torch.equal(found.labels, labels)
    assert quality(found, images, dataset, first=1)[0].identified


def test_the_company_does_not_change_a_result(observe_plain):
    observations = [observe_plain(first=i)[0] for i in range(2)]
    attack = DLG(evaluations=25, weighting="sqrt")

    def seeded(i):
        return torch.Generator().manual_seed(i)

    together = attack.reconstruct_many(observations, generators=[seeded(0), seeded(1)])
    for i, observation in enumerate(observations):
        alone = attack.reconstruct(observation, generator=seeded(i))
        torch.testing.assert_close(together[i].images, alone.images, atol=1e-4, rtol=1e-4)


def test_the_best_restart_is_chosen_by_the_attackers_own_loss(observe_plain, generator):
    observation, _, _ = observe_plain()
    several = DLG(evaluations=20, restarts=3).reconstruct(observation, generator=generator)
    losses = []
    fresh = torch.Generator().manual_seed(0)
    for _ in range(3):
        losses.append(DLG(evaluations=20).reconstruct(observation, generator=fresh).loss)
    assert several.loss == pytest.approx(min(losses), rel=1e-6)
    assert several.start == losses.index(min(losses))


def test_labels_are_inferred_exactly(observe_plain):
    for first in range(20):
        observation, _, labels = observe_plain(first=first, labels=False)
        assert torch.equal(infer_label(observation), labels)


def test_label_inference_without_a_bias_gradient(observe_plain):
    observation, _, labels = observe_plain(labels=False)
    without = {name: g for name, g in observation.gradient.items() if name != "fc.bias"}
    observation, _, labels = observe_plain(labels=False, gradient=without)
    assert torch.equal(infer_label(observation), labels)


def test_label_inference_without_a_bias_whatever_the_sign_of_features(dataset):
    """Row sums are p − y times the sum of the classifier's inputs, which may be negative."""
    torch.manual_seed(0)
    for first in range(20):
        image, label = dataset.test_images[first : first + 1], dataset.test_labels[first : first + 1]
        hidden = nn.Linear(3072, 32)
        model = nn.Sequential(nn.Flatten(), hidden, nn.Tanh(), nn.Linear(32, 10, bias=False))
        seen = observe_gradient(model, image, label, classes=10, knowledge=Knowledge(labels=False))
        assert torch.equal(infer_label(seen), label)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weight_decay_does_not_change_an_inferred_label(part, steps, dataset):
    """A classifier that is sure has next to no gradient, beside which decay is all there is to see."""
    torch.manual_seed(0)
    images, labels = 0.02 * dataset.test_images[:10], dataset.test_labels[:10]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    with torch.no_grad():
        model[1].bias[3] -= 5.0
        model[1].weight[4] *= 5.0
    local = Procedure(algorithm="fedavg", steps=steps, lr=0.01, weight_decay=0.5)
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        gradient = local_update(model, image, label, train_mode=True, local=local)
        seen = Observation(
            model=model,
            gradient={f"1.{part}": gradient[f"1.{part}"]},
            image_shape=tuple(image.shape[1:]),
            classes=10,
            batch_size=1,
            local=local,
        )
        assert torch.equal(infer_label(seen), label)


def test_label_inference_refuses_batches(observe_plain):
    observation, _, _ = observe_plain(batch_size=2)
    with pytest.raises(AttackError, match="batch of 2"):
        infer_label(observation)


def test_label_inference_needs_the_head(observe_plain):
    observation, _, _ = observe_plain()
    partial = {"conv1.weight": observation.gradient["conv1.weight"]}
    observation, _, _ = observe_plain(gradient=partial)
    with pytest.raises(AttackError, match="last linear layer"):
        infer_label(observation)


@pytest.mark.parametrize("weighting", ["none", "sqrt", "full"])
@pytest.mark.parametrize("labels", [True, False])
def test_the_objective_against_a_plain_loop(observe_plain, weighting, labels):
    """Oracle: one problem at a time with ordinary autograd in float64, no vmap."""
    observations = [observe_plain(first=i)[0] for i in range(2)]
    known = [o.labels for o in observations] if labels else None
    matching = GradientMatching(observations, labels=known, weighting=weighting)
    points = torch.randn(
        2, matching.dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    values, gradients = matching(points, torch.arange(2))
    for i, observation in enumerate(observations):
        model = observation.model.double()
        point = points[i].clone().requires_grad_()
        image = point[:3072].reshape(1, 3, 32, 32)
        target = observation.labels if labels else point[3072:].reshape(1, 10).softmax(1)
        loss = torch.nn.functional.cross_entropy(model(image), target)
        names = list(observation.gradient)
        dummy = torch.autograd.grad(
            loss, [dict(model.named_parameters())[n] for n in names], create_graph=True
        )
        observed = [observation.gradient[n].double() for n in names]
        exponent = {"none": 0, "sqrt": 1, "full": 2}[weighting]
        weights = [g.norm() ** -exponent for g in observed]
        numerator = sum(w * ((d - g) ** 2).sum() for w, d, g in zip(weights, dummy, observed, strict=True))
        expected = numerator / sum(w * (g**2).sum() for w, g in zip(weights, observed, strict=True))
        (slope,) = torch.autograd.grad(expected, point)
        torch.testing.assert_close(values[i], expected.detach())
        torch.testing.assert_close(gradients[i], slope)
        model.float()


def test_the_box_counts_pixels_outside_the_unit_interval_only(observe_plain):
    observation, _, _ = observe_plain()
    plain, boxed = (
        GradientMatching([observation], labels=[observation.labels], prior=prior)
        for prior in (None, lambda images: 2.0 * outside_box(images))
    )
    index, inside = torch.tensor([0]), torch.rand(1, 3072, dtype=torch.float64)
    assert torch.equal(plain(inside, index)[0], boxed(inside, index)[0])
    outside = inside.clone()
    outside[0, :2] = torch.tensor([-3.0, 1.5])
    extra = boxed(outside, index)[0] - plain(outside, index)[0]
    torch.testing.assert_close(extra, torch.tensor([2.0 * (9.0 + 0.25) / 3072], dtype=torch.float64))


def test_who_fixes_the_scale(observe_plain, generator):
    """The gradient itself, the attack's box, or, behind a norm and without a box, the rule afterwards."""
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    normed = lock(model).bake()
    for net, box, expected in ((model, 0.0, "clip"), (normed, 0.0, "prior"), (normed, 1e-3, "clip")):
        observation, _, _ = observe_plain(model=net)
        attack = DLG(evaluations=1, box=box)
        assert attack.reconstruct(observation, generator=generator).scaling == expected


def test_impossible_observations_are_refused_with_all_problems(observe_plain):
    observation, _, _ = observe_plain()
    bad = dict(observation.gradient)
    bad["fc.bias"] = torch.full((10,), torch.nan)
    bad["fc.weight"] = torch.zeros(10, 3)
    bad["nowhere"] = torch.zeros(1)
    with pytest.raises(AttackError) as refusal:
        observe_plain(gradient=bad, labels=True)
    for part in ("'fc.bias' has non-finite", "'fc.weight' has shape (10, 3)", "'nowhere' is not a parameter"):
        assert part in str(refusal.value)


def test_buffers_in_an_update_are_named_and_what_to_do_with_them(observe_plain):
    """What clients send under FedAvg has them; a gradient has none."""
    model = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 10))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.rand(8, 3, 32, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    update = {name: (before[name] - after) / 0.1 for name, after in model.state_dict().items()}
    with pytest.raises(AttackError) as refusal:
        observe_plain(model=model, gradient=update)
    text = str(refusal.value)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert f"'1.{name}' is a buffer of the model" in text
    assert "leave them out, and take the names of model.named_parameters() only" in text
    assert text.count("- ") == 3
    told = {name: update[name] for name, _ in model.named_parameters()}
    assert observe_plain(model=model, gradient=told)[0].gradient == told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": {}}, "no gradient"),
        ({"gradient": {"fc.bias": torch.zeros(10)}}, "zero"),
        ({"batch_size": 3}, "labels have shape"),
    ],
)
def test_empty_or_inconsistent_observations(observe_plain, changes, message):
    observation, _, _ = observe_plain()
    fields = {"model": observation.model, "gradient": observation.gradient, "labels": observation.labels}
    with pytest.raises(AttackError, match=message):
        type(observation)(image_shape=(3, 32, 32), classes=10, **({"batch_size": 1} | fields | changes))


@pytest.mark.parametrize("kind", ["module", "attention"])
def test_the_objective_of_a_network_with_dropout_does_not_change(kind, dataset):
    """A line search compares values: masks drawn for each would be all that it sees."""
    torch.manual_seed(0)

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            rows = x.flatten(1, 2)
            return self.attention(rows, rows, rows, need_weights=False)[0]

    drawing = nn.Dropout(0.5) if kind == "module" else Attending()
    model = nn.Sequential(drawing, nn.Flatten(), nn.Linear(3072, 10))
    image, label = dataset.test_images[:1], dataset.test_labels[:1]
    seen = observe_gradient(model, image, label, classes=10)
    matching = GradientMatching([seen], labels=[label])
    point, index = matching.starts([torch.Generator().manual_seed(0)]), torch.zeros(1, dtype=torch.long)
    with plain_attention():
        values = {float(matching(point, index)[0]) for _ in range(3)}
    assert len(values) == 1
    assert seen.model[0].training  # the observation's own is as it was


def test_mixed_observations_are_refused(observe_plain, generator):
    one, two = observe_plain()[0], observe_plain(batch_size=2)[0]
    with pytest.raises(AttackError, match="one kind"):
        DLG().reconstruct_many([one, two], generators=[generator, generator])
    with pytest.raises(AttackError, match="one generator per observation"):
        DLG().reconstruct_many([one], generators=[])


def test_unusable_budgets_are_refused():
    with pytest.raises(ConfigError, match="evaluations=0"):
        DLG(evaluations=0)
    with pytest.raises(ConfigError, match="box=-1"):
        DLG(box=-1.0)


def test_observations_do_not_show_tensors(observe_plain):
    observation, _, _ = observe_plain()
    assert "tensor" not in repr(observation)


def test_labels_of_a_batch_are_inferred_with_repetitions(observe_plain):
    for first in range(0, 80, 8):
        observation, _, labels = observe_plain(first=first, batch_size=8, labels=False)
        assert torch.equal(infer_labels(observation), labels.sort().values)


def test_own_images_say_how_predictions_of_a_trained_network_depend_on_the_class(dataset):
    torch.manual_seed(0)
    images, labels = dataset.train_images[:500], dataset.train_labels[:500]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    others = {"images": dataset.train_images[500:], "labels": dataset.train_labels[500:]}
    own = Auxiliary(**others, simulate=lambda x, y: {})
    right = {"random images": 0, "own images": 0}
    for first in range(0, 160, 8):
        x, y = dataset.test_images[first : first + 8], dataset.test_labels[first : first + 8]
        seen = observe_gradient(model, x, y, classes=10, knowledge=Knowledge(labels=False))
        for name, known in (("random images", None), ("own images", own)):
            found = infer_labels(replace(seen, auxiliary=known)).bincount(minlength=10)
            right[name] += int(torch.minimum(found, y.bincount(minlength=10)).sum())
    assert right["own images"] > 0.7 * 160 > 0.5 * 160 > right["random images"]


def test_own_images_of_some_classes_do_for_an_untrained_network(observe_plain, dataset):
    """A class without any has the mean prediction of all, and no two predictions differ much."""
    of_few = dataset.train_labels < 4
    images, labels = dataset.train_images[of_few][:65], dataset.train_labels[of_few][:65]
    own = Auxiliary(images=images, labels=labels, simulate=lambda x, y: {})
    for first in range(0, 40, 8):
        observation, _, labels = observe_plain(first=first, batch_size=8, labels=False, auxiliary=own)
        assert torch.equal(infer_labels(observation), labels.sort().values)


def test_labels_of_a_batch_need_the_bias(observe_plain):
    observation, _, labels = observe_plain(batch_size=2, labels=False)
    gradient = {name: g for name, g in observation.gradient.items() if name != "fc.bias"}
    with pytest.raises(AttackError, match=r"last linear layer's bias"):
        infer_labels(replace(observation, gradient=gradient))
    assert torch.equal(known_labels([replace(observation, labels=labels)])[0], labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"free": ("conv9.weight",)}, "'conv9.weight' is to be free, but there is no such tensor"),
        ({"secrets": {"key": torch.zeros(3)}}, "secrets and generate belong together"),
        (
            {
                "secrets": {"key": torch.zeros(12)},
                "generate": lambda secrets: {"conv1.bias": secrets["key"]},
                "free": ("conv1.bias",),
            },
            "'conv1.bias' is generated from secrets",
        ),
    ],
)
def test_contradictory_observations_are_refused(observe_plain, changes, message):
    with pytest.raises(AttackError, match=message):
        observe_plain(**changes)
