"""The linear algebra of one convolution: its input from what is known at its output.

For a convolution u = W * h + b with input h, and δ = ∂L/∂u at its output, two relations are linear in h:

    forward     (W * h)_op = u_op − b_o                       one equation per output value
    backward    Σ_p δ_op h_i,q(p,k) = ∂L/∂W_oik               one equation per weight

Behind a norm with statistics per channel only x̂ = (u − μ_o) / σ_o and σ_o δ are known. Both relations stay
linear in (h, σ, μ), now homogeneous, so that the input comes out up to one common factor:

    forward     (W * h)_op − σ_o x̂_op − μ_o = 0               (b is absorbed by μ)
    backward    Σ_p (σ_o δ_op) h_i,q(p,k) − σ_o ∂L/∂W_oik = 0

The backward matrix is the same for every input channel, and the forward matrix is sparse, so that the normal
equations are cheap to set up. They are solved by Cholesky's method in float64: it squares the condition
number, but the data are float32, whose rounding counts for more until the condition number passes 10⁹.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from fedkl.attacks.algebraic.chain import Layer

FLOAT32 = 1e-7
"""Relative size of float32 rounding, as a standard deviation."""

STATISTICS = 3e-7
"""Size of the error of a norm's mean and variance, where they are read from running statistics."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What is known at a convolution's output, with the variance of each equation's error.

    Attributes:
        output: u − b, or x̂ behind a norm; shape ``(out, positions)``.
        variance: Of its error, same shape; infinite where nothing is known.
        delta: ∂L/∂u, or σ ∂L/∂u behind a norm; shape ``(out, positions)``.
        gradient: ∂L/∂W; shape ``(out, in, kernel positions)``.
        gradient_variance: Of the backward equations' error; shape ``(out,)``.
        homogeneous: Whether a norm follows.
    """

    output: Tensor
    variance: Tensor
    delta: Tensor
    gradient: Tensor
    gradient_variance: Tensor
    homogeneous: bool

    def inflated(self, misfit: tuple[float, float]) -> Evidence:
        """The same with larger variances, where equations were missed by more than their errors explain."""
        forward, backward = (max(each, 1.0) for each in misfit)
        return replace(
            self,
            variance=self.variance * forward,
            gradient_variance=self.gradient_variance * backward,
        )

    def placed(self, sigma: Tensor, offset: Tensor) -> Evidence:
        """The same behind a norm whose σ and μ − b, of shape ``(out,)``, are known: no factor is lost.

        They come from running statistics in float32, divided by the momentum: their errors count.
        """
        power = self.gradient.square().mean((1, 2))
        size = torch.where(sigma > 0, sigma, 1.0)
        relative = STATISTICS / size.square().clamp_max(1.0)
        error = (relative.unsqueeze(1) * size.unsqueeze(1) * (1 + self.output.abs())).square()
        return replace(
            self,
            output=size.unsqueeze(1) * self.output + offset.unsqueeze(1),
            variance=self.variance * size.square().unsqueeze(1) + error,
            delta=self.delta / size.unsqueeze(1),
            gradient_variance=self.gradient_variance + relative.square() * power,
            homogeneous=False,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A convolution's input.

    Attributes:
        input: Shape ``(in, height × width)``; behind a norm up to one factor.
        sigma: σ_o behind a norm, in the same unit; ones otherwise.
        misfit: Mean squared error of the equations, forward and backward, in units of their variance.
        delta: The `Evidence`'s.
        factor: The system's Cholesky factor, with the unknowns' scales, for their variance.
    """

    input: Tensor
    sigma: Tensor
    misfit: tuple[float, float]
    delta: Tensor
    factor: tuple[Tensor, Tensor]

    def variance(self) -> Tensor:
        """Of the input's error, shape ``(in, height × width)``."""
        cholesky, scale = self.factor
        inverse = torch.cholesky_inverse(cholesky).diagonal() * scale.square()
        return inverse[: self.input.numel()].view_as(self.input) * max(*self.misfit, 1.0)


def reads_of(
    kernel: Sequence[int],
    *,
    places: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Int64[Tensor, "kernel positions"]:
    """Which input place each kernel position of a convolution reads at each output position; −1: the padding.

    Args:
        kernel: Height and width.
        places: Height and width of the input, whose places are numbered row by row.
        stride: As in PyTorch.
        padding: With zeros.
        dilation: As in PyTorch.
    """
    height, width = places
    numbered = torch.arange(1, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    sizes = (tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    columns = F.unfold(numbered, *sizes)[0]
    return columns.round().long() - 1


class ConvolutionSystem:
    """The two relations of one convolution as matrices.

    Args:
        layer: The convolution.
        input_shape: ``(channels, height, width)``.
    """

    def __init__(self, layer: Layer, *, input_shape: tuple[int, ...]) -> None:
        self.outputs, self.inputs = layer.weight.shape[:2]
        self.places = input_shape[1] * input_shape[2]
        # Which input place each kernel position reads at each output position; −1: the padding.
        self.reads: Int64[Tensor, "kernel positions"] = reads_of(
            layer.weight.shape[2:],
            places=input_shape[1:],
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
        )
        # The same with the padding as one more place, behind all others.
        self.padded_reads = torch.where(self.reads < 0, self.places, self.reads)
        self.forward = self._forward_matrix(layer.weight.flatten(2))

    def _forward_matrix(self, weight: Float[Tensor, "outputs inputs kernel"]) -> Any:
        from scipy.sparse import csr_matrix  # takes a while to import

        kernel, positions = self.reads.shape
        shape = (self.outputs, self.inputs, kernel, positions)
        rows = torch.arange(self.outputs).view(-1, 1, 1, 1) * positions + torch.arange(positions)
        columns = torch.arange(self.inputs).view(-1, 1, 1) * self.places + self.reads
        real = (self.reads >= 0).expand(shape)
        entries = weight.unsqueeze(-1).expand(shape)[real]
        where = (rows.expand(shape)[real].numpy(), columns.expand(shape)[real].numpy())
        size = (self.outputs * positions, self.inputs * self.places)
        return csr_matrix((entries.numpy(), where), shape=size)

    def backward(self, delta: Float[Tensor, "outputs positions"]) -> Float[Tensor, "outputs kernel places"]:
        """The matrix that takes one input channel to its part of ∂L/∂W."""
        kernel, positions = self.reads.shape
        shape = (self.outputs, kernel, positions)
        matrix = delta.new_zeros(self.outputs, kernel, self.places + 1)
        matrix.scatter_(2, self.padded_reads.expand(shape), delta.unsqueeze(1).expand(shape))
        return matrix[..., :-1]

    def transpose(self, delta: Float[Tensor, "outputs positions"]) -> Float[Tensor, "inputs places"]:
        """∂L/∂h from ∂L/∂u."""
        found = torch.from_numpy(self.forward.T @ delta.flatten().numpy())
        return found.view(self.inputs, self.places)

    def apply(self, h: Float[Tensor, "inputs places"]) -> Float[Tensor, "outputs positions"]:
        """W * h."""
        return torch.from_numpy(self.forward @ h.flatten().numpy()).view(self.outputs, -1)

    def solve(self, evidence: Evidence, *, prior: Tensor, mean: float = 0.0) -> Solution:
        """The least-squares input, with a Gaussian prior.

        Args:
            evidence: What is known at the output.
            prior: The prior's precision matrix, shape ``(in × places, in × places)``.
            mean: The prior's mean of every input value.

        Raises:
            ArithmeticError: The equations cannot be solved, e.g. since nothing is known.
        """
        backward = self.backward(evidence.delta)
        normal, right = self._normal(evidence, backward, prior)
        n = self.inputs * self.places
        right[:n] += mean * prior.sum(1)
        if evidence.homogeneous:
            pinned = evidence.gradient.abs().amax((1, 2)).gt(0).to(right)
            block = normal[n : n + self.outputs, n : n + self.outputs]
            weight = block.diagonal().mean()  # any positive weight gives the same direction
            block += weight * torch.outer(pinned, pinned)
            right[n : n + self.outputs] = weight * pinned * pinned.sum()
        scale = normal.diagonal().clamp_min(1e-300).rsqrt()
        normal.mul_(scale).mul_(scale.unsqueeze(1)).diagonal().add_(1e-14)
        factor, failed = torch.linalg.cholesky_ex(normal)
        if int(failed):
            raise ArithmeticError("The normal equations are not positive definite.")
        found = torch.cholesky_solve((right * scale).unsqueeze(1), factor).squeeze(1) * scale
        return self._solution(found, evidence, backward, (factor, scale))

    def _normal(self, evidence: Evidence, backward: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """The normal equations of (h, σ, μ), or of h where no norm follows."""
        from scipy.sparse import diags

        n, outputs = self.inputs * self.places, self.outputs
        precise = evidence.variance.reciprocal()
        strict = evidence.gradient_variance.reciprocal()
        size = n + 2 * outputs if evidence.homogeneous else n
        normal, right = prior.new_zeros(size, size), prior.new_zeros(size)
        head = normal[:n, :n]
        weighted = diags(precise.flatten().numpy()) @ self.forward
        head.copy_(torch.from_numpy((self.forward.T @ weighted).toarray())).add_(prior)
        strong = backward * strict.view(-1, 1, 1)
        block = backward.flatten(0, 1).T @ strong.flatten(0, 1)
        for i in range(self.inputs):
            part = slice(i * self.places, (i + 1) * self.places)
            head[part, part] += block
        across = torch.einsum("okq,oik->iqo", strong, evidence.gradient).reshape(n, outputs)
        if not evidence.homogeneous:
            target = (precise * evidence.output).flatten().numpy()
            right += torch.from_numpy(self.forward.T @ target) + across.sum(1)
            return normal, right
        values = (evidence.output, torch.ones_like(evidence.output))
        statistics = torch.cat([_block_diagonal(each) for each in values], 1)
        mixed = -torch.from_numpy(weighted.T @ statistics.numpy())
        mixed[:, :outputs] -= across
        corner = statistics.T @ (precise.reshape(-1, 1) * statistics)
        corner.diagonal()[:outputs] += strict * evidence.gradient.square().sum((1, 2))
        normal[:n, n:], normal[n:, :n], normal[n:, n:] = mixed, mixed.T, corner
        return normal, right

    def _solution(
        self, found: Tensor, evidence: Evidence, backward: Tensor, factor: tuple[Tensor, Tensor]
    ) -> Solution:
        n, outputs = self.inputs * self.places, self.outputs
        h = found[:n].view(self.inputs, self.places)
        sigma, mu = torch.ones(outputs).double(), torch.zeros(outputs).double()
        if evidence.homogeneous:
            sigma, mu = found[n : n + outputs], found[n + outputs :]
        gap = self.apply(h) - sigma.unsqueeze(1) * evidence.output - mu.unsqueeze(1)
        known = evidence.variance.isfinite()
        forward = (gap.square() / evidence.variance)[known].mean()
        miss = torch.einsum("okq,iq->oik", backward, h) - sigma.view(-1, 1, 1) * evidence.gradient
        live = evidence.gradient_variance.isfinite()
        behind = (miss.square() / evidence.gradient_variance.view(-1, 1, 1))[live].mean()
        misfit = (float(forward), float(behind))
        return Solution(input=h, sigma=sigma, misfit=misfit, delta=evidence.delta, factor=factor)


def _block_diagonal(rows: Float[Tensor, "outputs positions"]) -> Float[Tensor, "equations outputs"]:
    """One column per row, with its values where its own equations are."""
    return (rows.unsqueeze(2) * torch.eye(len(rows)).to(rows).unsqueeze(1)).flatten(0, 1)
