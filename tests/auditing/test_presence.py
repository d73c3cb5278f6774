"""The presence test against slow direct formulas, and what its scores mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn
from torch.nn import functional as F

from fedkl.attacking import full_gradient
from fedkl.auditing.presence import LayerScores, PresenceTest, _center_by_class, _fitted, _Spans
from fedkl.auditing.rows import rows_of
from fedkl.errors import DataError
from tests.auditing.subjects import CLASSES, convnet, images, labels, mlp, trained

OWN, MEMBERS = 60, 6


def network(build=mlp):
    found = build()
    found.load_state_dict(trained(build))
    return found.eval()


def untrained():
    """All images have gradients of one size; a trained network's are as different as its losses."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return mlp()


def pool():
    """Images that nothing was trained on, and the last places of which are the server's."""
    return images(160), labels(160)


def gradient(model, x, y):
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def updates(model, count=2, size=MEMBERS):
    x, y = pool()
    return [gradient(model, x[n * size : (n + 1) * size], y[n * size : (n + 1) * size]) for n in range(count)]


def scores_of(model, observed):
    x, y = pool()
    return LayerScores(model, observed, images=x[-OWN:], labels=y[-OWN:])


def test_members_lie_in_the_span_of_a_wide_layer():
    """64 inputs and 6 images: the row space has their inputs, and no others."""
    model = untrained()
    (update,) = updates(model, 1)
    x, y = pool()
    scores = scores_of(model, update)
    span = scores([update], x[:100], y[:100])[0, :, scores.names.index("span 1")]
    torch.testing.assert_close(span[:MEMBERS], torch.ones(MEMBERS), atol=2e-4, rtol=0)
    assert span[MEMBERS:].max() < 0.9
    assert span.min() >= 0


def test_a_difference_of_weights_has_the_same_span():
    model = network()
    (update,) = updates(model, 1)
    x, y = pool()
    scores = scores_of(model, update)
    scaled = {name: -0.01 * tensor for name, tensor in update.items()}
    one, other = scores([update, scaled], x[:20], y[:20])
    spans = [place for place, name in enumerate(scores.names) if name.startswith("span")]
    ratios = [place for place, name in enumerate(scores.names) if name.startswith("ratio")]
    assert (len(spans), len(ratios)) == (2, 2)
    torch.testing.assert_close(one[:, spans], other[:, spans], atol=1e-4, rtol=0)
    torch.testing.assert_close(one[:, ratios], -other[:, ratios], atol=1e-4, rtol=0)


def test_the_ratio_of_an_image_and_its_own_gradient_is_1():
    model = network(convnet)
    x, y = pool()
    update = gradient(model, x[:1], y[:1])
    scores = scores_of(model, update)
    found = scores([update], x[:40], y[:40])[0]
    ratios = found[:, [place for place, name in enumerate(scores.names) if name.startswith("ratio")]]
    torch.testing.assert_close(ratios[0], torch.ones(3), atol=1e-4, rtol=0)
    assert (ratios[1:] < 0.99).all()
    assert ratios.min() >= -1.0001


def test_members_have_positive_ratios():
    model = network()
    (update,) = updates(model, 1)
    x, y = pool()
    scores = scores_of(model, update)
    ratio = scores([update], x[:100], y[:100])[0, :, scores.names.index("ratio 1")]
    assert (ratio[:MEMBERS] > 0).all()
    assert ratio[:MEMBERS].mean() > ratio[MEMBERS:].mean() + 0.1


def inverse_root(moments):
    """The matrix R with R² ∝ M⁻¹, the ridge included; by SciPy-free eigenvalues in double."""
    ridge = 1e-3 * np.trace(moments) / len(moments)
    values, vectors = np.linalg.eigh(moments + ridge * np.eye(len(moments)))
    return vectors @ np.diag(values**-0.5) @ vectors.T


def slow_scores(model, layer, update, rows):
    """A layer's scores of every image, one after the other, in double."""
    x, y = pool()
    (own,) = rows_of(model, x[-OWN:], y[-OWN:], layers=[layer], chunk=OWN)
    step = math.ceil(own[layer.name].inputs.shape[1] / 64)
    a, b = (
        each[:, ::step].flatten(0, 1).double().numpy()
        for each in (own[layer.name].inputs, own[layer.name].outputs)
    )
    left, right = inverse_root(b.T @ b), inverse_root(a.T @ a)
    delta = layer.matrix(update).double().numpy()
    space = np.linalg.pinv(delta @ right, rcond=1e-4) @ (delta @ right)
    whole = left @ delta @ right
    found = []
    for inputs, outputs in zip(rows.inputs.double().numpy(), rows.outputs.double().numpy(), strict=True):
        white = inputs @ right
        own_gradient = left @ outputs.T @ inputs @ right
        cosine = (own_gradient * whole).sum() / np.linalg.norm(own_gradient) / np.linalg.norm(whole)
        found.append([np.square(white @ space).sum() / np.square(white).sum(), cosine])
    return torch.tensor(np.array(found)).float()


def strided():
    """16 × 9 places at its first layer, of which moments are taken from every third."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2), nn.Conv2d(1, 5, 4, stride=(1, 2), padding=(2, 2)), nn.Tanh(),
        nn.Flatten(), nn.LazyLinear(CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize("build", [mlp, convnet, strided], ids=["mlp", "convnet", "many places"])
def test_scores_are_those_of_the_formula(build):
    if build is strided:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = strided().eval()
            model(images(2))
    else:
        model = network(build)
    x, y = pool()
    seen = updates(model, 2)
    scores = scores_of(model, seen[0])
    found = scores(seen, x[:70], y[:70])  # more than one chunk of images
    assert found.shape == (2, 70, 2 * len(scores.layers) + 1)
    assert scores.names[-1] == "match"
    weights = [f"{layer.name}.{part}" for layer in scores.layers for part in ("weight", "bias")]
    for number, image in enumerate(x[:5]):
        gradient = full_gradient(model, image[None], y[number][None], train_mode=False)
        own = torch.cat([gradient[name].flatten() for name in weights])
        for place, update in enumerate(seen):
            product = torch.cat([update[name].flatten() for name in weights]) @ own / own.norm()
            torch.testing.assert_close(found[place, number, -1], product, atol=1e-5, rtol=1e-3)
    for layer in scores.layers:
        places = [scores.names.index(f"{kind} {layer.name}") for kind in ("span", "ratio")]
        (rows,) = rows_of(model, x[:70], y[:70], layers=[layer], chunk=70)
        for number, update in enumerate(seen):
            slow = slow_scores(model, layer, update, rows[layer.name])
            torch.testing.assert_close(found[number][:, places], slow, atol=5e-3, rtol=0)


def test_there_is_no_span_without_an_update():
    model = network()
    (update,) = updates(model, 1)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
    x, y = pool()
    assert scores_of(model, update)([nothing], x[:5], y[:5]).abs().max() == 0


def test_rounding_spans_nothing():
    """A singular value of 1e-6 of the largest is no direction of an image."""
    model = network()
    (update,) = updates(model, 1)
    x, y = pool()
    scores = scores_of(model, update)
    noise = torch.randn(update["1.weight"].shape, generator=torch.Generator().manual_seed(0))
    noisy = dict(update) | {"1.weight": update["1.weight"] + 1e-7 * update["1.weight"].norm() * noise}
    place = scores.names.index("span 1")
    one, other = scores([update, noisy], x[:100], y[:100])[..., place]
    torch.testing.assert_close(one, other, atol=0.01, rtol=0)


@pytest.mark.parametrize(("count", "places"), [(1, 3), (9, 40)])
def test_both_ways_to_what_a_subspace_captures_agree(count, places):
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(12, 3 + n % 8, generator=generator)).Q for n in range(count)]
    inputs = torch.randn(5, places, 12, generator=generator)
    spans = _Spans(bases)
    found = [spans.captured(inputs) for _ in range(2)]
    slow = torch.stack(
        [
            torch.stack([sum((basis.T @ row).square().sum() for row in image) for image in inputs])
            for basis in bases
        ]
    )
    for each in found:
        torch.testing.assert_close(each, slow, atol=1e-4, rtol=1e-4)
    assert (spans._projectors is not None) == (count > 1), "the case does not take the way that it is for"


@pytest.mark.parametrize("most", [9, 18, 19, 100])
def test_a_wide_layer_takes_the_way_that_fits_into_the_memory(monkeypatch, most):
    """Nine projectors of 12 × 12, twice, and room for one more; moments a few at once."""
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(12, 8, generator=generator)).Q for _ in range(9)]
    inputs = torch.randn(25, 40, 12, generator=generator)
    expected = _Spans(bases).captured(inputs)
    monkeypatch.setattr("fedkl.auditing.presence._MOMENTS", 11)
    asked = []
    monkeypatch.setattr("fedkl.auditing.presence.at_once", lambda each: (asked.append(each), most)[1])
    spans = _Spans(bases)
    torch.testing.assert_close(spans.captured(inputs), expected, atol=1e-4, rtol=1e-4)
    assert (spans._projectors is not None) == (most > 18)
    assert asked == [4 * 144] + [2 * 4 * 144] * (most > 18)


def test_updates_are_taken_apart_once_for_all_lots_of_candidates(monkeypatch):
    observed, (x, y) = updates(network()), pool()
    members = torch.zeros(2, 40, dtype=torch.bool)
    members[0, :6] = members[1, 6:12] = True
    test = PresenceTest(
        scores_of(network(), observed[0]), played=observed, members=members, images=x[:40], labels=y[:40]
    )
    taken, real = [], LayerScores._of
    monkeypatch.setattr(
        LayerScores, "_of", lambda self, layer, sent: (taken.append(layer.name), real(self, layer, sent))[1]
    )
    test.both(observed, kept_back=(x[40:80], y[40:80]), images=x[80:], labels=y[80:])
    assert sorted(taken) == ["1", "3"]


def test_a_network_without_layers_to_look_in_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, CLASSES))

        def forward(self, x):
            return x.flatten(1) @ self.weight

    x, y = pool()
    with pytest.raises(DataError, match="expected a linear layer or an ungrouped convolution"):
        LayerScores(Bare(), {"weight": torch.ones(64, CLASSES)}, images=x, labels=y)


class Branching(nn.Module):
    """Bright images go through a layer more."""

    def __init__(self):
        super().__init__()
        self.first, self.more = nn.Linear(64, 16), nn.Linear(16, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        features = self.first(x.flatten(1)).tanh()
        return self.fc(self.more(features).tanh() if x.mean() > 0.5 else features)


def test_images_are_looked_for_in_layers_that_all_go_through():
    model, (x, y) = Branching(), pool()
    x = torch.cat([0.1 * x[:80] + 0.9, 0.1 * x[80:]])  # several chunks, bright ones first
    observed = gradient(model, x[:MEMBERS], y[:MEMBERS])
    scores = LayerScores(model, observed, images=x, labels=y)
    assert [layer.name for layer in scores.layers] == ["first", "fc"]
    assert scores([observed], x, y).isfinite().all()
    of_bright_ones = LayerScores(model, observed, images=x[:70], labels=y[:70])
    assert [layer.name for layer in of_bright_ones.layers] == ["first", "more", "fc"]
    with pytest.raises(DataError, match=r"expected that all images go through 'more', some do not\. Give"):
        of_bright_ones([observed], x, y)


def crafted(count=400, *, seed=0):
    """Scores of which the first tells members, the second is noise, and the third never differs."""
    generator = torch.Generator().manual_seed(seed)
    members = torch.rand(2, count, generator=generator) < 0.05
    noise = torch.randn(2, count, 3, generator=generator)
    noise[..., 0] += 3 * members
    noise[1] = 10 * noise[1] + 5  # another update, another scale
    noise[..., 2] = 0.5
    return noise, members


def test_the_logistic_regression_is_that_of_the_formula():
    noise, members = crafted()
    scores, wanted = noise[0, :, :2], members[0]
    x, y = scores.double().numpy(), wanted.double().numpy()
    balance = np.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean()))

    def loss(weights):
        said = x @ weights[:-1] + weights[-1]
        entropy = np.logaddexp(0, said) - y * said
        return (balance * entropy).mean() + np.square(weights[:-1]).sum() / y.sum()

    slow = scipy.optimize.minimize(loss, np.zeros(3), method="BFGS").x
    torch.testing.assert_close(
        _fitted(scores, wanted).double(), torch.tensor(slow[:-1]), atol=1e-3, rtol=1e-3
    )


def fitted_test(**given):
    """The test with scores that are given: `played` ones, those kept back, those of candidates."""
    answers = iter(given["answers"])
    nothing = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    scores = LayerScores(network(), updates(network(), 1)[0], images=pool()[0], labels=pool()[1])
    scores.__class__ = type(
        "Given", (LayerScores,), {"under": lambda self, updates: lambda *candidates: next(answers)}
    )
    return PresenceTest(
        scores, played=[{}, {}], members=given["members"], images=nothing[0], labels=nothing[1]
    )


def test_weights_are_learned_from_what_tells_members():
    noise, members = crafted()
    weights = fitted_test(answers=[noise], members=members).weights
    assert weights[0] > 1
    assert weights[1:].abs().max() < 0.2


def test_a_score_that_differs_for_members_only_leaves_the_others_their_weight():
    noise, members = crafted()
    noise[..., 2] += members  # 1e12 standard deviations away
    weights = fitted_test(answers=[noise], members=members).weights
    assert weights.isfinite().all()
    assert weights[2] > weights[0] > 0.1


def test_images_kept_back_set_the_scale_of_every_update():
    played, members = crafted()
    kept_back, candidates = crafted(seed=1)[0], crafted(count=50, seed=2)[0]
    test = fitted_test(answers=[played, kept_back, candidates], members=members)
    nothing = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    null, found = test.both([{}, {}], kept_back=nothing, images=nothing[0], labels=nothing[1])
    assert (null.shape, found.shape) == ((2, 400), (2, 50))
    for update in range(2):
        mean, std = kept_back[update].mean(0), kept_back[update].std(0)
        wanted = ((candidates[update] - mean) / std)[:, :2] @ test.weights[:2]
        torch.testing.assert_close(found[update], wanted, atol=1e-3, rtol=1e-3)
        assert abs(float(null[update].mean())) < 1e-3


@pytest.mark.parametrize("classes", [10, 100, 200])
def test_false_alarms_are_as_many_as_wanted_however_few_images_a_class_has(classes):
    """An image that is in its class's mean is nearer to it than one that is not."""
    generator = torch.Generator().manual_seed(0)
    kept_back = torch.arange(240) % classes
    labels = torch.arange(2400) % classes
    null, found = (torch.randn(4, len(each), 1, generator=generator) for each in (kept_back, labels))
    _center_by_class(null, found, kept_back, labels)
    alarms = float((found >= null.flatten().quantile(0.99)).float().mean())
    assert 0.003 < alarms < 0.016
    assert abs(float(null.std()) - float(found.std())) < 0.1


def test_a_class_of_which_nothing_was_kept_back_is_held_against_all():
    generator = torch.Generator().manual_seed(0)
    null, found = (
        5 + torch.randn(1, 40, 1, generator=generator),
        5 + torch.randn(1, 30, 1, generator=generator),
    )
    _center_by_class(null, found, torch.arange(40) % 2, torch.arange(30) % 3)
    assert float(found[:, 2::3].mean().abs()) < 1
