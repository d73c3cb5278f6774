"""A convolution's input from nothing but the gradient of its weights, by linear algebra.

Of one image, a convolution with as many outputs as positions, or more, has a gradient

    ∂L/∂W_oik = Σ_p δ_op h_i,q(p,k)        that is  G = D Hᵀ, D: (out, positions), H: (in × kernel, positions)

of which neither factor is known. But rows of G span what columns of H span: wherever D has full column rank,
every patch of the input lies in a known subspace S of far fewer dimensions than a patch has numbers. Patches
overlap, so that this is a system of linear equations in the input, homogeneous and with many more equations
than unknowns:

    (1 − Π_S) (h_patch(p) − h_patch(p′)) = 0        for all positions p, p′

Its one solution is the input up to a factor. Behind a norm with statistics of the one image rows of D sum to
zero, and S has one dimension less: that is why only differences of patches are asked for. The padding is part
of the patches, and pins the offset of every channel, of which differences say nothing; convolutions without
padding are left out.

Nothing of the network above or below takes part: no label, no weight, no activation, no γ and no β. A lock
that leaves channels alive does not change what is found. What ends it is rank: dead channels (γ = 0), or
fewer outputs than positions times images.

Some channels suffice for the equations: (kernel · channels − positions)(positions − 1) of them for
channels · places unknowns. They give the coordinates of all positions in S, and with these every other
channel is a small least-squares problem.

Source:
    Subspace methods of blind channel identification: Moulines et al. 1995 (IEEE Trans. Signal Processing 43).
    That a gradient's row space holds the inputs is what SPEAR (Dimitrov et al. 2024) uses for linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fedkl.attacks.adaptive.gaussian import cholesky

_CHANNELS = 24  # at least: more are for large inputs, and a factor's cost is the cube of the unknowns
_EQUATIONS = 1.5  # for each unknown, at least
_UNKNOWNS = 10_000  # at most: a dense matrix of 0.8 GB, of which there are a few
_ITERATIONS = 4  # of the inverse iteration: the smallest eigenvalue is far below the next
_ROUNDING = 1e-6  # singular values below this share of the largest are rounding
_ZERO = 1e-9  # eigenvalues below this share of the mean are: of a float32 gradient's, with room to spare


@dataclass(frozen=True, kw_only=True, eq=False)
class BlindInput:
    """What a convolution got.

    Attributes:
        input: Of length 1, since its factor is not known; its sum is positive. Shape ``(in, places)``.
        gap: The least eigenvalue of the equations relative to the next one: about 0 where they have one
            solution, about 1 where they have none, and 1 where they have several.
    """

    input: Float[Tensor, "inputs places"] = field(repr=False)
    gap: float


def blind_input(
    gradient: Float[Tensor, "outputs inputs kernel"],
    *,
    reads: Int64[Tensor, "kernel positions"],
    places: int,
) -> BlindInput | None:
    """The input of a convolution from the gradient of its weights; None where rank or rounding forbids it.

    Args:
        gradient: In float64.
        reads: Which input place each kernel position reads at each output position; ``places``: the padding.
        places: Positions of the input.
    """
    outputs, inputs, kernel = gradient.shape
    positions = reads.shape[1]
    needed = channels_needed(outputs, inputs=inputs, reads=reads, places=places)
    if needed is None:
        return None
    _, strengths, rows = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    if strengths[positions - 2] <= _ROUNDING * strengths[0]:
        return None
    # A norm leaves one dimension less than positions. One too many, of rounding, does no harm.
    rank = min(positions, outputs)
    basis = rows[:rank].T.view(inputs, kernel, rank)
    chosen = gradient.square().sum((0, 2)).topk(needed).indices
    try:
        few, gap = _null_vector(basis[chosen], reads, places)
    except ArithmeticError:  # rounding: a failure of this layer, not of the whole audit
        return None
    coordinates = torch.linalg.lstsq(
        basis[chosen].flatten(0, 1), _centered(few, reads).flatten(0, 1)
    ).solution
    found = _all_channels(basis @ coordinates, reads, places)
    sign = torch.where(found.sum() < 0, -1.0, 1.0)
    return BlindInput(input=sign * found / found.norm(), gap=gap)


def channels_needed(
    outputs: int, *, inputs: int, reads: Int64[Tensor, "kernel positions"], places: int
) -> int | None:
    """How many of a convolution's input channels give enough equations; None where its shape forbids it.

    It takes an output for every position but one, overlapping patches, and padding.

    Args:
        outputs: Channels, live ones.
        inputs: Channels.
        reads: See `blind_input`.
        places: Likewise.
    """
    kernel, positions = reads.shape
    if kernel == 1 or positions == 1 or outputs < positions - 1 or not bool((reads == places).any()):
        return None
    for count in range(min(_CHANNELS, inputs), inputs + 1):
        equations = (kernel * count - positions) * (positions - 1)
        if count * places > _UNKNOWNS:
            return None
        if equations >= _EQUATIONS * count * places:
            return count
    return None


def _null_vector(
    basis: Float[Tensor, "inputs kernel rank"], reads: Tensor, places: int
) -> tuple[Float[Tensor, "inputs places"], float]:
    """Channels all of whose patches lie, but for a common one, in a subspace; by inverse iteration.

    The subspace is that of all channels, cut to these: its basis is made orthonormal first.
    """
    inputs, kernel, _ = basis.shape
    orthonormal, _ = torch.linalg.qr(basis.flatten(0, 1))
    outside = -(orthonormal @ orthonormal.T)
    outside.diagonal().add_(1)
    outside = outside.view(inputs, kernel, inputs, kernel)
    normal = basis.new_zeros(inputs, places + 1, inputs, places + 1)
    for place in reads.T:  # a patch reads a place once at most; the padding is left out below
        normal[:, place[:, None], :, place] += outside.permute(1, 3, 0, 2)
    count = basis.new_zeros(kernel, places + 1)
    count.scatter_add_(1, reads, torch.ones_like(reads, dtype=basis.dtype))
    weighted = torch.einsum("iajb,bq->iajq", outside, count)
    normal -= torch.einsum("ap,iajq->ipjq", count, weighted) / reads.shape[1]
    size = inputs * places
    system = normal[:, :-1, :, :-1].reshape(size, size)
    unit = system.diagonal().mean()
    damped = system.clone()
    damped.diagonal().add_(1e-13 * unit)
    factor = cholesky(damped)
    start = torch.ones(size, 2, dtype=basis.dtype)
    start[::2, 1] = 0
    vectors = start
    for _ in range(_ITERATIONS):
        vectors, _ = torch.linalg.qr(torch.cholesky_solve(vectors, factor))
    values, turn = torch.linalg.eigh(vectors.T @ system @ vectors)
    several = bool(values[1] < _ZERO * unit)
    gap = 1.0 if several else float(values[0].clamp_min(0) / values[1])
    return (vectors @ turn[:, 0]).view(inputs, places), gap


def _patches(h: Float[Tensor, "inputs places"], reads: Tensor) -> Float[Tensor, "inputs kernel positions"]:
    return torch.cat([h, h.new_zeros(len(h), 1)], 1)[:, reads]


def _centered(h: Tensor, reads: Tensor) -> Tensor:
    patches = _patches(h, reads)
    return patches - patches.mean(2, keepdim=True)


def _all_channels(
    differences: Float[Tensor, "inputs kernel positions"], reads: Tensor, places: int
) -> Float[Tensor, "inputs places"]:
    """Every channel from its patches' deviations from the mean patch: least squares, the same for each."""
    design = _centered(torch.eye(places, dtype=differences.dtype), reads).flatten(1)
    found: Tensor = torch.linalg.lstsq(design.T, differences.flatten(1).T).solution
    return found.T
