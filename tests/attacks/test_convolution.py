"""The matrices of a convolution against autograd, and its exact solution; norms and priors likewise."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedkl.attacks import smoothness as prior
from fedkl.attacks.algebraic.activations import elu, leaky_relu, sigmoid, softplus, tanh
from fedkl.attacks.algebraic.chain import Layer
from fedkl.attacks.algebraic.convolution import ConvolutionSystem, Evidence
from fedkl.attacks.algebraic.moments import standardized
from fedkl.attacks.algebraic.search import minimum

GEOMETRY = [
    {"stride": (2, 2), "padding": (2, 2), "dilation": (1, 1)},
    {"stride": (1, 2), "padding": (0, 1), "dilation": (1, 1)},
    {"stride": (1, 1), "padding": (2, 0), "dilation": (2, 1)},
]


def convolution(geometry, outputs=4):
    weight, bias = torch.randn(outputs, 2, 3, 3).double(), torch.randn(outputs).double()
    return Layer(name="conv", weight=weight, bias=bias, **geometry)


@pytest.mark.parametrize("geometry", GEOMETRY)
def test_both_relations_against_autograd(geometry):
    layer = convolution(geometry)
    system = ConvolutionSystem(layer, input_shape=(2, 7, 8))
    h = torch.randn(1, 2, 7, 8).double().requires_grad_()
    weight = layer.weight.clone().requires_grad_()
    u = F.conv2d(h, weight, None, **geometry)
    delta = torch.randn_like(u)
    by_h, by_weight = torch.autograd.grad(u, [h, weight], delta)
    flat, inputs = delta.view(4, -1), h.detach().view(2, -1)
    torch.testing.assert_close(system.apply(inputs), u.detach().view(4, -1))
    torch.testing.assert_close(system.transpose(flat), by_h.view(2, -1))
    found = torch.einsum("okq,iq->oik", system.backward(flat), inputs)
    torch.testing.assert_close(found, by_weight.flatten(2))


@pytest.mark.parametrize("homogeneous", [False, True])
def test_the_input_of_a_convolution_comes_back(homogeneous):
    """Behind a norm up to one factor, and with its σ."""
    layer = convolution(GEOMETRY[0], outputs=12)
    system = ConvolutionSystem(layer, input_shape=(2, 8, 8))
    h = torch.rand(2, 64).double()
    u = system.apply(h)
    delta = torch.randn_like(u)
    gradient = torch.einsum("okq,iq->oik", system.backward(delta), h)
    mean, sigma = u.mean(1, keepdim=True), u.std(1, keepdim=True, unbiased=False)
    known = Evidence(
        output=(u - mean) / sigma if homogeneous else u,
        variance=torch.full_like(u, 1e-14),
        delta=delta * sigma if homogeneous else delta,
        gradient=gradient,
        gradient_variance=torch.full((12,), 1e-14).double(),
        homogeneous=homogeneous,
    )
    found = system.solve(known, prior=1e-3 * torch.eye(128).double())
    factor = float(found.input.norm() / h.norm()) if homogeneous else 1.0
    torch.testing.assert_close(found.input, h * factor, atol=1e-5, rtol=1e-5)
    if homogeneous:
        torch.testing.assert_close(found.sigma, sigma.squeeze(1) * factor, atol=1e-5, rtol=1e-5)
    assert max(found.misfit) < 1


def test_moments_give_the_secret_and_the_gradient_before_the_norm():
    """Oracle: PyTorch's own batch norm and its backward pass."""
    u = torch.randn(1, 3, 6, 6).double().requires_grad_()
    gamma, beta, eps = torch.tensor([0.3, 2.0, 1.1]).double(), torch.randn(3).double(), 1e-2
    z = F.batch_norm(u, None, None, gamma, beta, training=True, eps=eps)
    delta = torch.randn_like(z)
    (expected,) = torch.autograd.grad(z, u, delta)
    sigma = u.detach().view(3, -1).std(1, unbiased=False)
    gradient = torch.ones(3, 1, 1).double()
    flat = z.detach().view(3, -1)
    found = standardized(flat, torch.full_like(flat, 1e-20), delta.view(3, -1), gradient=gradient)
    found = found.of_size(sigma, eps=eps)
    torch.testing.assert_close(found.scale, gamma)
    torch.testing.assert_close(found.beta, beta)
    got = found.evidence(gradient).delta / sigma.unsqueeze(1)
    torch.testing.assert_close(got, expected.view(3, -1))


def test_saturated_positions_are_left_out_and_filled_in():
    x = torch.randn(2, 400).double()
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, unbiased=False)
    gamma, beta = torch.tensor([3.0, 0.5]).double(), torch.tensor([1.0, -2.0]).double()
    z = gamma.unsqueeze(1) * x + beta.unsqueeze(1)
    lost = z > 2.5
    variance = torch.where(lost, 1e4, 1e-10).double()
    first = standardized(
        z.clamp(max=2.5), variance, torch.ones_like(z), gradient=torch.ones(2, 1, 1).double()
    )
    assert first.saturated == pytest.approx(float(lost.double().mean()))
    assert abs(first.gamma[0] - 3) > 0.3
    found = first.refined(7 * x + 3, torch.ones(2).double(), eps=0.0)
    torch.testing.assert_close(found.gamma, gamma, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.beta, beta, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.x, x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("made", "function"),
    [
        (sigmoid(), torch.sigmoid),
        (tanh(), torch.tanh),
        (leaky_relu(0.2), lambda z: F.leaky_relu(z, 0.2)),
        (elu(1.5), lambda z: F.elu(z, 1.5)),
        (softplus(2.0), lambda z: F.softplus(z, 2.0)),
    ],
)
def test_activations_against_autograd(made, function):
    z = torch.linspace(-4, 4, 40).double().requires_grad_()  # not at the kink, where slopes differ by side
    h = function(z)
    (slope,) = torch.autograd.grad(h.sum(), z)
    back, found = made.undo(h.detach())
    torch.testing.assert_close(back, z.detach())
    torch.testing.assert_close(found, slope)


def test_the_prior_is_the_energy_of_differences():
    x = torch.randn(3, 4, 5).double()
    matrix = prior.smooth((3, 4, 5), precision=2.0, chroma=5.0)
    parts = (x.mean(0, keepdim=True).expand_as(x), x - x.mean(0, keepdim=True))
    energies = [
        p.diff(dim=1).square().sum() + p.diff(dim=2).square().sum() + 1e-3 * p.square().sum() for p in parts
    ]
    expected = 2.0 * (energies[0] + 6.0 * energies[1])
    torch.testing.assert_close(x.flatten() @ matrix @ x.flatten(), expected)


def test_constant_channels_cost_nothing_if_constant():
    matrix = prior.constant(torch.tensor([True, False]), 4, precision=10.0)
    flat = torch.tensor([3.0, 3, 3, 3, 1, 2, 3, 4]).double()
    assert float(flat @ matrix @ flat) == pytest.approx(0.0, abs=1e-9)
    uneven = flat.flip(0)
    assert float(uneven @ matrix @ uneven) == pytest.approx(50.0)


def test_the_search_refines_a_narrow_valley_that_looks_higher_on_the_grid():
    def misfit(x):
        return min(1e-6 + (x - 2.3) ** 2, 0.05 + 0.01 * (x - 7.0) ** 2)

    assert minimum(misfit, -3.0, 10.0, points=14) == pytest.approx(2.3, abs=1e-3)
    assert minimum(misfit, 2.0, 2.5) == pytest.approx(2.3, abs=1e-3)
