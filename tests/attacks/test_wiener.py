"""A lock per element leaves nothing pinned by counting, and yet the image comes out."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkl.attacks import ClosedForm, PriorOnly, Procedure, Wiener
from fedkl.attacks.algebraic import wiener
from fedkl.attacks.algebraic.chain import read_chain
from fedkl.attacks.gaussian import Gaussian
from fedkl.defenses import KeyLock
from fedkl.defenses.server_view import Known
from fedkl.errors import AttackError, ConfigError
from tests.attacks.element import Affine, ElementLock, correlations, seen_of

QUICK = Wiener(components=100, draws=5, starts=5)


def positive(u, v):
    return F.softplus(0.54 + u), F.softplus(v)


def signed(u, v):
    return u.sign() * (1 + 0.1 * v), 0.3 * v


def silent(u, v):
    return 1e-4 * u, v


def constant(u, v):
    return 0 * u + 0.7, 0 * v - 0.2


def observe(images, model, draw, *, trials=4, **options):
    torch.manual_seed(3)
    return seen_of(ElementLock(draw=draw, **options), model, images, trials=trials)


def run(attack, seen):
    generators = [torch.Generator().manual_seed(k) for k in range(len(seen))]
    return attack.reconstruct_many(seen, generators=generators)


@pytest.fixture
def model(small):
    torch.manual_seed(0)
    return small()


@pytest.mark.parametrize("draw", [positive, signed])
def test_images_come_out_far_above_the_floor(images, model, draw):
    seen, trials = observe(images, model, draw)
    found = run(QUICK, seen)
    floor = correlations(run(PriorOnly(guess="mean"), seen), trials)
    ours = correlations(found, trials)
    assert float(ours.min()) > 0.85
    assert bool((ours > floor + 0.15).all())
    assert all(
        each.scaling == "clip" and bool(each.labels == t.labels)
        for each, t in zip(found, trials, strict=True)
    )


def test_where_z_carries_nothing_nothing_comes_out(images, model):
    seen, trials = observe(images, model, silent)
    floor = correlations(run(PriorOnly(guess="mean"), seen), trials)
    ours = correlations(run(QUICK, seen), trials)
    assert float((ours - floor).abs().max()) < 0.1


def test_the_loss_tells_a_good_fit_from_a_bad_one(images, model):
    seen, _ = observe(images, model, positive, trials=2)
    strange = nn.Parameter(seen[0].gradient["6.bias"])
    other = replace(
        seen[0], gradient={**seen[0].gradient, "6.weight": seen[1].gradient["6.weight"] - strange[0]}
    )
    good, bad = run(QUICK, [seen[0], other])
    assert good.loss < bad.loss


def test_a_private_head_does_not_help(images, model):
    seen, trials = observe(images, model, positive, trials=2, head="6")
    assert not any(name.startswith("6.") for name in seen[0].gradient)
    assert float(correlations(run(QUICK, seen), trials).min()) > 0.85


def test_secrets_that_all_clients_share_are_known_exactly(images, model):
    seen, trials = observe(images, model, constant, trials=2)
    assert float(correlations(run(QUICK, seen), trials).min()) > 0.97


def test_the_fill_in_is_never_read(images, model):
    seen, _ = observe(images, model, positive, trials=1)
    other = replace(seen[0], model=_with_other_affine(seen[0].model))
    first, second = run(QUICK, seen)[0], run(QUICK, [other])[0]
    torch.testing.assert_close(first.images, second.images)


def test_one_prior_serves_all_observations(images, model):
    seen, _ = observe(images, model, positive, trials=2)
    drawn = []
    counted = replace(seen[0].auxiliary, draw=lambda: drawn.append(1) or seen[0].auxiliary.draw())
    run(QUICK, [replace(each, auxiliary=counted) for each in seen])
    assert len(drawn) == QUICK.draws
    assert not QUICK.divisible


def _with_other_affine(model):
    model = copy.deepcopy(model)
    affine = model[0].norm.affine
    with torch.no_grad():
        affine.weight.fill_(5.0)
        affine.bias.fill_(-3.0)
    return model


def test_a_chain_reads_scale_and_shift_per_element(small):
    torch.manual_seed(0)
    shape = (8, 8, 8)
    norm = nn.BatchNorm2d(8, affine=False)
    affine = Affine(torch.randn(shape), torch.randn(shape))
    net = small()
    net[0] = nn.Sequential(net[0], norm, affine)
    first = read_chain(net, image_shape=(3, 16, 16), train_mode=True).blocks[0]
    assert (first.elementwise.scale, first.elementwise.shift) == ("0.2.weight", "0.2.bias")
    assert first.norm.scale == first.norm.shift == ""
    net[0] = nn.Sequential(net[0][0], affine, norm)
    with pytest.raises(AttackError, match="Wiener: expected a layer, its norm and"):
        read_chain(net, image_shape=(3, 16, 16), train_mode=True, attack="Wiener")


def test_the_closed_form_refuses_a_lock_per_element(images, model):
    seen, _ = observe(images, model, positive, trials=1)
    with pytest.raises(AttackError, match=r"one of each per element behind '0'.* Use the attack wiener"):
        run(ClosedForm(), seen)


def test_what_it_cannot_read_it_refuses(images, model, observed, small):
    (seen,), _ = observe(images, model, positive, trials=1)
    own = seen.auxiliary
    stem = {name: g for name, g in seen.gradient.items() if name != "0.weight"}
    channel = observed(KeyLock())[0]
    above = observed(model=small(between=lambda: nn.BatchNorm2d(8)))[0]
    cases = {
        "at least 100 auxiliary images": replace(seen, auxiliary=None),
        "several local steps": replace(seen, local=Procedure(steps=2)),
        r"not observed: 0\.weight": replace(seen, gradient=stem),
        "clients that draw γ and β": replace(seen, auxiliary=replace(own, draw=None)),
        "Use the attack closed-form": replace(channel, auxiliary=own),
        "behind the first convolution only": replace(above, auxiliary=own),
    }
    for message, observation in cases.items():
        with pytest.raises(AttackError, match=message):
            run(QUICK, [observation])
    with pytest.raises(ConfigError, match="draws ≥ 2"):  # one would seem to be the secret itself
        Wiener(draws=1)


def test_what_is_neither_public_nor_drawn_is_not_guessed(images, model):
    (seen,), _ = observe(images, model, positive, trials=1)
    own = seen.auxiliary
    silent_on = replace(own, draw=lambda: {name: t for name, t in own.draw().items() if "weight" not in name})
    with pytest.raises(AttackError, match=r"'0\.norm\.affine\.weight' is neither public nor drawn"):
        run(QUICK, [replace(seen, auxiliary=silent_on)])


def test_a_scaled_sum_is_no_shift_per_element(small):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.randn(8, 8, 8))

        def forward(self, x):
            return torch.add(x, self.shift, alpha=-2)

    net = small()
    net[0] = nn.Sequential(net[0], Scaled())
    with pytest.raises(AttackError, match=r"add after '0\.0'"):
        read_chain(net, image_shape=(3, 16, 16), train_mode=True)


def test_an_image_that_cannot_be_read_does_not_stop_the_others(images, model):
    seen, trials = observe(images, model, positive, trials=2)
    blank = {name: torch.zeros_like(g) if name == "6.bias" else g for name, g in seen[0].gradient.items()}
    broken, good = run(QUICK, [replace(seen[0], gradient=blank), seen[1]])
    assert not broken.images.isfinite().any()
    assert broken.loss == float("inf")
    assert float(correlations([good], trials[1:])) > 0.85


@pytest.mark.parametrize("examples", [30, 200])
def test_the_posterior_is_that_of_dense_algebra(examples):
    torch.manual_seed(0)
    values = torch.randn(examples, 12).double() @ torch.randn(12, 40).double() + 1
    prior = Gaussian.of(values, components=6)
    noise = prior.rest + torch.rand(40).double()
    z = torch.randn(40).double()
    found = prior.posterior(1 / noise, z / noise)
    covariance = prior.basis @ prior.basis.T
    gain = covariance @ torch.linalg.inv(covariance + noise.diag())
    torch.testing.assert_close(prior.values(found.scores), prior.mean + gain @ (z - prior.mean))
    torch.testing.assert_close(found.spread @ found.spread.T, covariance - gain @ covariance)
    torch.testing.assert_close(prior.variance, values.var(0, correction=0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(prior.scores(values).var(0, correction=0), torch.ones(6).double())


def test_clients_that_start_at_a_trained_model_have_a_known_scale_and_shift():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    nn.init.normal_(model[1].weight)
    model(torch.rand(4, 3, 8, 8))
    trained = KeyLock(granularity="element", activation="identity", input_shape=(3, 8, 8), key_length=16)
    for defense, known in ((trained, True), (replace(trained, start="drawn"), False)):
        own = [
            defense.imitated(model, known=Known(public=defense.prepare(model).public_state())) for _ in "ab"
        ]
        draws = torch.stack([split.bake()[1].elementwise.weight.detach().flatten() for split in own])
        assert wiener._known(draws.double()) == known
