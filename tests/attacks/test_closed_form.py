"""The closed form reads γ, β and the image off one locked gradient of a real image."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl.attacks import ClosedForm, Procedure
from fedkl.attacks.algebraic import blind
from fedkl.attacks.algebraic import way_down as descent
from fedkl.attacks.algebraic.chain import Layer
from fedkl.attacks.algebraic.convolution import ConvolutionSystem
from fedkl.defenses import KeyLock, PrivateLayers, PrivateNorm
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import score

PUBLISHED = KeyLock(key_distribution="uniform", activation="relu", initialization="published")


def run(observation, **options):
    return ClosedForm(**options).reconstruct(observation, generator=torch.Generator())


def quality(found, trial, candidates):
    (result,) = score(
        found.images,
        trial.images,
        candidates=candidates,
        candidate_index=trial.places,
        labels_true=trial.labels,
        labels_found=found.labels,
        scaling=found.scaling,
    )
    assert result.label_correct
    return result


def affine_error(found, victim):
    """Of γ and β, relative to the largest of each norm's γ."""
    true = {name: p.detach() for name, p in victim.bake().named_parameters()}
    errors = []
    for gamma, beta in zip(found.gammas, found.betas, strict=True):
        size = true[gamma].abs().max()
        errors.append((found.gammas[gamma] - true[gamma]).abs().max() / size)
        errors.append((found.betas[beta] - true[beta]).abs().max() / size)
    return float(max(errors))


def test_an_undefended_image_comes_out_almost_exactly(observed, images):
    seen, _, trial = observed()
    found = run(seen)
    assert found.scaling == "clip"
    assert quality(found, trial, images.test_images[:100]).psnr > 60
    assert found.loss < 1e-6
    assert not found.gammas


@pytest.mark.parametrize("activation", ["softplus", "sigmoid"])
def test_the_first_lock_is_read_off(observed, images, activation):
    """With all channels alive the image follows too, without any prior."""
    seen, victim, trial = observed(KeyLock(activation=activation), index=1)
    found = run(seen)
    assert found.scaling == "prior"
    assert set(found.gammas) == {"0.norm.weight"}
    assert affine_error(found, victim) < 0.02
    result = quality(found, trial, images.test_images[:100])
    assert result.correlation > 0.95
    assert result.identified


def test_the_published_lock_is_read_off_despite_dead_channels(observed, images):
    seen, victim, trial = observed(PUBLISHED, model=None, index=2)
    gamma = victim.bake().get_parameter("0.norm.weight")
    found = run(seen, chroma=1000.0)
    assert 3 <= int((gamma > 0).sum()) < len(gamma)
    assert found.layers[-1].live == int((gamma > 0).sum())
    assert bool((found.gammas["0.norm.weight"][gamma == 0] == 0).all())
    assert affine_error(found, victim) < 0.02
    assert quality(found, trial, images.test_images[:100]).correlation > 0.6


def test_a_private_norm_without_a_key_is_read_off(observed, images):
    seen, victim, trial = observed(PrivateNorm(), index=3)
    found = run(seen)
    assert affine_error(found, victim) < 0.01
    assert quality(found, trial, images.test_images[:100]).correlation > 0.95


def test_a_chain_of_private_norms_is_read_off(observed, images):
    lock = PrivateNorm(like=KeyLock(layers="all"))  # γ = 1, β = 0: the chain is passed whatever the key was
    seen, victim, trial = observed(lock, index=4)
    found = run(seen)
    assert set(found.gammas) == {"0.norm.weight", "2.norm.weight"}
    assert affine_error(found, victim) < 0.02
    assert quality(found, trial, images.test_images[:100]).correlation > 0.9


def test_nothing_of_the_servers_fill_in_is_read(observed):
    seen, _, _ = observed(KeyLock(), index=1)
    changed = copy.deepcopy(seen.model)
    with torch.no_grad():
        changed.get_parameter("0.norm.weight").fill_(-3.0)
        changed.get_parameter("0.norm.bias").fill_(7.0)
    for buffer in changed.buffers():
        buffer.fill_(9)
    first, second = run(seen), run(replace(seen, model=changed))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.gammas["0.norm.weight"], second.gammas["0.norm.weight"])


def test_the_model_is_left_as_it_was(observed):
    seen, _, _ = observed(KeyLock(), index=1)
    before = copy.deepcopy(seen.model.state_dict())
    run(seen)
    after = seen.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_found_statistics_explain_the_gradient(observed):
    """The attacker's own check, without any truth."""
    seen, _, _ = observed(KeyLock(activation="sigmoid"), index=1)
    assert run(seen).loss < 0.05


def test_refuses_a_batch(observed):
    seen, _, _ = observed(batch_size=2)
    with pytest.raises(AttackError, match="batch of 2"):
        run(seen)


def test_refuses_several_local_steps(observed):
    seen, _, _ = observed()
    with pytest.raises(AttackError, match="several local steps"):
        run(replace(seen, local=Procedure(steps=2)))


def test_refuses_a_transformed_update(observed):
    seen, _, _ = observed()
    with pytest.raises(AttackError, match="transformed update"):
        run(replace(seen, transform=dict))


def test_refuses_where_nothing_at_the_top_is_observed(observed):
    seen, _, _ = observed()
    partial = {name: g for name, g in seen.gradient.items() if name not in ("2.bias", "6.bias")}
    with pytest.raises(AttackError, match=r"not observed: 2\.bias"):
        run(replace(seen, gradient=partial))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act": nn.ReLU}, "relu after '0' cannot be inverted"),
        ({"between": lambda: nn.GroupNorm(2, 8)}, "group_norm after '2' has statistics over several"),
        ({"between": lambda: nn.LayerNorm((8, 4, 4))}, "layer_norm after '2' has statistics over several"),
        ({"between": lambda: nn.Dropout(0.1)}, "dropout after '2' is not known"),
    ],
)
def test_refuses_what_cannot_be_passed(observed, small, changes, message):
    seen, _, _ = observed(model=small(**changes))
    with pytest.raises(AttackError, match=message):
        run(seen)


def test_refuses_running_statistics(observed, small):
    seen, _, _ = observed(model=small(between=lambda: nn.BatchNorm2d(8)))
    with pytest.raises(AttackError, match="expected train mode"):
        run(replace(seen, train_mode=False))


def test_refuses_a_network_with_shortcuts(observed):
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(768, 10)

        def forward(self, x):
            return self.fc((x + self.conv(x).sigmoid()).flatten(1))

    seen, _, _ = observed(model=Shortcut())
    with pytest.raises(AttackError, match="branches at 'conv'"):
        run(seen)


@pytest.mark.parametrize("options", [{"smoothness": 0.0}, {"chroma": -1.0}, {"smoothness": float("inf")}])
def test_refuses_impossible_options(options):
    with pytest.raises(ConfigError, match=r"a finite (smoothness > 0|chroma ≥ 0), got"):
        ClosedForm(**options)


def test_a_private_head_does_not_hide_the_image(observed, images):
    seen, _, trial = observed(PrivateLayers())
    assert not any(name.startswith("6.") for name in seen.gradient)
    found = run(seen)
    assert found.labels is None
    (result,) = score(
        found.images, trial.images, candidates=images.test_images[:100], candidate_index=trial.places,
        labels_true=trial.labels, labels_found=None, scaling=found.scaling,
    )  # fmt: skip
    assert result.identified
    assert result.correlation > 0.99
    assert found.loss < 1e-10


def test_a_lock_in_front_of_the_classifier_does_not_hide_the_image(observed, images):
    """Its norm covers the head's input: the way down starts below it. The label shows all the same."""
    seen, _, trial = observed(KeyLock(layers="classifier"), index=1)
    found = run(seen)
    assert found.scaling == "clip"
    assert quality(found, trial, images.test_images[:100]).psnr > 40
    assert found.loss < 1e-9


def test_the_blind_top_finds_input_and_gradient_of_a_convolution():
    """Oracle: a convolution with known input and output gradient."""
    source = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(4, 6, 5, padding=2).double()
    h = torch.rand(1, 4, 6, 6, generator=source, dtype=torch.float64)
    delta = torch.randn(1, 6, 6, 6, generator=source, dtype=torch.float64)
    gradient, bias = torch.autograd.grad((conv(h) * delta).sum(), [conv.weight, conv.bias])
    layer = Layer(name="conv", weight=conv.weight.detach(), bias=conv.bias.detach(), padding=(2, 2))
    system = ConvolutionSystem(layer, input_shape=(4, 6, 6))
    found = blind.solved(system, gradient.flatten(2), bias, generator=source, starts=5)
    torch.testing.assert_close(found.input, h[0].flatten(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.delta, delta[0].flatten(1), atol=1e-4, rtol=0)
    assert found.misfit < 1e-12


def test_a_private_head_above_a_norm_is_refused(observed, small):
    seen, *_ = observed(model=small(between=lambda: nn.BatchNorm2d(8)))
    below = replace(seen, gradient={n: g for n, g in seen.gradient.items() if not n.startswith("6.")})
    with pytest.raises(AttackError, match=r"a last convolution's .* without a norm .* 6\.weight"):
        run(below)


@pytest.mark.parametrize(("activation", "searched"), [("sigmoid", True), ("relu", False)])
def test_no_factor_is_sought_where_any_would_fit(observed, monkeypatch, activation, searched):
    """Dead channels leave a block fewer equations than unknowns; without them it is searched as ever."""
    calls = []

    def minimum(misfit, low, high, *, points=0):
        calls.append((low, high))
        return (low + high) / 2

    monkeypatch.setattr(descent, "minimum", minimum)
    lock = replace(PUBLISHED, layers="all", activation=activation)
    seen, _, _ = observed(lock, index=2)
    if not searched:
        lost = seen.gradient["0.weight"].clone()
        lost[2:] = 0.0  # two channels of eight are left
        seen = replace(seen, gradient={**seen.gradient, "0.weight": lost})
    run(seen)
    assert bool(calls) == searched
