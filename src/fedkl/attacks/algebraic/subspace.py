"""Inputs of a convolution from nothing but the gradient of its weights, by linear algebra.

Of B images, a convolution with as many outputs as positions of all of them, or more, has a gradient

    ∂L/∂W_oik = Σ_bp δ_bop h_bi,q(p,k)
    G = D Hᵀ,       D: (out, images × positions), H: (in × kernel, images × positions)

of which neither factor is known. But rows of G span what columns of H span: wherever D has full column rank,
every patch of an input lies in a known subspace S of far fewer dimensions than a patch has numbers. Patches
overlap, so that this is a system of linear equations in an input, homogeneous and with many more equations
than unknowns:

    (1 − Π_S) (h_patch(p) − h_patch(p′)) = 0        for all positions p, p′

Its solutions are the inputs and all mixtures of them: a space of B dimensions. Behind a norm with statistics
of the batch rows of D sum to zero, and S has one dimension less: that is why only differences of patches are
asked for. The padding is part of the patches, and pins the offset of every channel, of which differences say
nothing; convolutions without padding are left out.

For one image that is the end: its input is known but for a factor. Inputs of several are told apart by what
a ReLU leaves of them: no negative value, and zeros at about half of all places. Mixtures without negative
values are a cone, of which the inputs are edges; other edges have few zeros. Linear programs find edges.

Nothing of the network above or below takes part: no label, no weight, no activation, no γ and no β. A lock
that leaves channels alive does not change what is found. What ends it is rank: dead channels (γ = 0), or
fewer outputs than positions times images.

Some channels suffice for the equations: (kernel · channels − B positions)(positions − 1) of them for
channels · places unknowns. They give the coordinates of all positions in S, and with these every other
channel is a small least-squares problem.

Source:
    Subspace methods of blind channel identification: Moulines et al. 1995 (IEEE Trans. Signal Processing 43).
    That a gradient's row space holds the inputs, and that zeros tell those of a batch apart, is what SPEAR
    (Dimitrov et al. 2024) uses for linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fedkl.attacks.gaussian import cholesky

_CHANNELS = 24  # at least: more are for large inputs, and a factor's cost is the cube of the unknowns
_EQUATIONS = 1.5  # for each unknown, at least
_UNKNOWNS = 10_000  # at most: a dense matrix of 0.8 GB, of which there are a few
_ITERATIONS = 4  # of the inverse iteration: the smallest eigenvalue is far below the next
_ROUNDING = 1e-6  # singular values below this share of the largest are rounding
_PLACES = 4000  # at most, where inputs are told apart: those with the largest values
_SLACK = 1e-4  # of the mean value: what is less than that below zero, or above it, is zero
_ZEROS = 0.2  # share of places at which an input is zero, at least
_TRIES = 5  # linear programs for each image, at most, and as many with the opposite goal
_ZERO = 1e-9  # eigenvalues below this share of the mean are: of a float32 gradient's, with room to spare


@dataclass(frozen=True, kw_only=True, eq=False)
class BlindInputs:
    """What a convolution got.

    Attributes:
        inputs: In no order, each of length 1, since its factor is not known; its sum is positive. Shape
            ``(images, in, places)``.
        gap: The largest eigenvalue of the equations that belongs to a solution, relative to the next one:
            about 0 where they have as many solutions as there are images, about 1 where they have fewer, and
            1 where they have more.
    """

    inputs: Float[Tensor, "images inputs places"] = field(repr=False)
    gap: float


def blind_inputs(
    gradient: Float[Tensor, "outputs inputs kernel"],
    *,
    reads: Int64[Tensor, "kernel positions"],
    places: int,
    images: int = 1,
) -> BlindInputs | None:
    """The inputs of a convolution from the gradient of its weights; None where rank or rounding forbids it.

    Also where those of several images are not told apart, as they have negative values or too few zeros.

    Args:
        gradient: In float64.
        reads: Which input place each kernel position reads at each output position; ``places``: the padding.
        places: Positions of an input.
        images: Behind the gradient.
    """
    outputs, inputs, kernel = gradient.shape
    patches = images * reads.shape[1]
    needed = channels_needed(outputs, inputs=inputs, reads=reads, places=places, images=images)
    if needed is None:
        return None
    _, strengths, rows = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    if strengths[patches - 2] <= _ROUNDING * strengths[0]:
        return None
    # A norm leaves one dimension less than patches. One too many, of rounding, does no harm.
    rank = min(patches, outputs)
    basis = rows[:rank].T.view(inputs, kernel, rank)
    chosen = gradient.square().sum((0, 2)).topk(needed).indices
    try:
        few, gap = _null_vectors(basis[chosen], reads, places, images)
    except ArithmeticError:  # rounding: a failure of this layer, not of the whole audit
        return None
    differences = torch.cat([_centered(one, reads).flatten(0, 1) for one in few], 1)
    coordinates = torch.linalg.lstsq(basis[chosen].flatten(0, 1), differences).solution
    mixed = torch.stack(
        [_all_channels(basis @ own, reads, places) for own in coordinates.split(reads.shape[1], 1)]
    )
    found = mixed if images == 1 else _told_apart(mixed)
    if found is None:
        return None
    signs = torch.where(found.sum((1, 2), keepdim=True) < 0, -1.0, 1.0)
    return BlindInputs(inputs=signs * found / found.flatten(1).norm(dim=1)[:, None, None], gap=gap)


def channels_needed(
    outputs: int, *, inputs: int, reads: Int64[Tensor, "kernel positions"], places: int, images: int = 1
) -> int | None:
    """How many of a convolution's input channels give enough equations; None where its shape forbids it.

    It takes an output for every position of every image, but one, overlapping patches, and padding.

    Args:
        outputs: Channels, live ones.
        inputs: Channels.
        reads: See `blind_inputs`.
        places: Likewise.
        images: Likewise.
    """
    kernel, positions = reads.shape
    patches = images * positions
    if kernel == 1 or positions == 1 or outputs < patches - 1 or not bool((reads == places).any()):
        return None
    for count in range(min(_CHANNELS, inputs), inputs + 1):
        equations = (kernel * count - patches) * (positions - 1)
        if count * places > _UNKNOWNS:
            return None
        if equations >= _EQUATIONS * count * places:
            return count
    return None


def _null_vectors(
    basis: Float[Tensor, "inputs kernel rank"], reads: Tensor, places: int, images: int
) -> tuple[Float[Tensor, "images inputs places"], float]:
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
    vectors = torch.randn(size, images + 1, dtype=basis.dtype, generator=torch.Generator().manual_seed(0)).to(
        basis.device
    )
    for _ in range(_ITERATIONS):
        vectors, _ = torch.linalg.qr(torch.cholesky_solve(vectors, factor))
    values, turn = torch.linalg.eigh(vectors.T @ system @ vectors)
    several = bool(values[images] < _ZERO * unit)
    gap = 1.0 if several else float(values[images - 1].clamp_min(0) / values[images])
    return (vectors @ turn[:, :images]).T.view(images, inputs, places), gap


def _told_apart(
    mixed: Float[Tensor, "images inputs places"],
) -> Float[Tensor, "images inputs places"] | None:
    """Non-negative inputs with many zeros from as many mixtures of them; None where they are not all found.

    A linear program over the cone's cross-section ends at an edge. Its goal is one that edges found so far
    have no part in, so that it finds another one.
    """
    from scipy.optimize import linprog  # takes a while to import

    images = len(mixed)
    points = mixed.flatten(1).T.cpu()
    lengths = points.norm(dim=1)
    largest = lengths.topk(min(_PLACES, len(lengths)))
    rows = points[largest.indices[largest.values > _SLACK * largest.values[0]]]
    axes, turn = torch.linalg.qr(rows)  # mixtures may be nearly alike: orthogonal ones are as good
    values, total = axes.numpy(), axes.sum(0).numpy()
    goals, edges = np.random.default_rng(0), np.zeros((0, images))
    for _ in range(_TRIES * images):
        goal = goals.standard_normal(images)
        goal -= np.linalg.lstsq(edges.T, goal, rcond=None)[0] @ edges if len(edges) else 0
        for cost in (goal, -goal):
            best = linprog(
                cost,
                A_ub=-values,
                b_ub=np.full(len(values), _SLACK),
                A_eq=total[None],
                b_eq=[len(values)],  # the mean value is 1
                bounds=(None, None),
            )
            if best.success and ((values @ best.x) < 2 * _SLACK).mean() >= _ZEROS:
                wider = np.vstack([edges, best.x / np.linalg.norm(best.x)])
                edges = wider if np.linalg.svd(wider)[1][-1] > _SLACK else edges
            if len(edges) == images:
                found: Tensor = points @ torch.linalg.solve(turn, torch.from_numpy(edges.T).to(points))
                return found.T.reshape(*mixed.shape).to(mixed)
    return None


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
