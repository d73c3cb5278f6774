"""The input of a fully connected layer, read off rows of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedkl.attacks.algebraic.first_linear import FirstLinear, first_linear, reconstructions, unexplained
from fedkl.attacks.algebraic.sgd import check_sgd
from fedkl.attacks.base import Attack, Reconstruction, register_attack
from fedkl.attacks.parallel import Progress
from fedkl.errors import AttackError
from fedkl.protocol import Kept, Observation
from fedkl.protocol.differentiable import change_of

_AGREE, _UNSURE = 1e-5, 1e-4  # relative: rows of one image agree to 2e-7, of several to 2e-4 at best
_CERTAIN = 10.0  # times float32's errors


@register_attack
@dataclass(frozen=True, kw_only=True)
class LinearRows(Attack):
    """Divides rows of ∂L/∂W by their entries of ∂L/∂b: what one image drives is that layer's input, exactly.

    With u = W x + b and δ = ∂L/∂u, ∂L/∂W = Σ δ xᵀ and ∂L/∂b = Σ δ over the images. Of one image every row
    says x; the largest δ rounds least, and is taken. Of a batch, behind a ReLU, some
    rows get something of one image only: those that agree with another one. Images without two such rows
    are not found, and are NaN. It needs no labels and no learning rate, and accepts a gradient, or weights
    after steps of SGD: each image's x is the same in all steps, where the layer is the first.

    Of a pruned update of one image, each input is read off the row with the largest δ that was kept, and not
    clipped. Inputs that were kept in no row are the small ones, and are taken for 0.

    Behind convolutions the inputs are features: `FeatureInversion`, with images of the server's own, takes
    them to images. `Reconstruction.loss` is the share of the layer's gradient that they do not explain.

    Source:
        Phong et al. 2017, "Privacy-preserving deep learning via additively homomorphic encryption"; batches:
        Boenisch et al. 2021 (arXiv 2112.02918), Fowl et al. 2022 (arXiv 2110.13057), who change the model for
        it. Here the model is as it is, and rows of one image are known by their agreement.
    """

    title: ClassVar[str] = "rows of a linear layer"
    reads_unaltered: ClassVar[bool] = True
    type: Literal["linear-rows"] = "linear-rows"

    @property
    def divisible(self) -> bool:
        """Where features are inverted, one regression serves all observations."""
        return False

    def _check(self, observation: Observation) -> None:
        pruned = isinstance(observation.transform, Kept)
        check_sgd(replace(observation, transform=None) if pruned else observation, attack="LinearRows")
        if observation.batch_size > 1 and observation.classes == 2:
            raise AttackError(
                "LinearRows: expected one image, or more than two classes: with two all images have parallel "
                "slopes, and rows of several agree too. Use the attack disaggregation."
            )
        layer = first_linear(observation, attack="LinearRows")
        if pruned and (observation.batch_size > 1 or layer.pixels is None):
            raise AttackError(
                "LinearRows: of a pruned update, expected one of one image, and a linear layer that gets the "
                f"image itself, got {observation.batch_size} images and the layer '{layer.name}'. Use the "
                "attack ig."
            )

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        layer = first_linear(observations[0], attack="LinearRows")
        inputs = [_read(observation, layer) for observation in observations]
        losses = [
            unexplained(layer.gradient(observation), rows)
            for observation, rows in zip(observations, inputs, strict=True)
        ]
        return reconstructions(
            observations, inputs, losses=losses, layer=layer, evaluations=0, on_evaluation=on_evaluation
        )


def _read(observation: Observation, layer: FirstLinear) -> Float[Tensor, "found inputs"]:
    transform = observation.transform
    if isinstance(transform, Kept):
        return _kept_inputs(observation, layer, transform.exact)
    return _inputs(observation, layer)


def _inputs(observation: Observation, layer: FirstLinear) -> Float[Tensor, "found inputs"]:
    gradient = layer.gradient(observation)
    weight, bias = gradient[:, :-1], gradient[:, -1]
    error = layer.error(observation) / len(bias) ** 0.5 / bias.abs()
    rows = weight / bias[:, None]
    if observation.batch_size == 1:
        best = error.argmin()
        return rows[best][None] if bool(error[best].isfinite()) else rows[:0]
    size = rows.norm(dim=1)
    sure = _CERTAIN * error < _UNSURE * size  # false where a row is no number
    return agreeing(
        rows[sure], torch.maximum(_AGREE * size, _CERTAIN * error)[sure], most=observation.batch_size
    )


def _kept_inputs(
    observation: Observation, layer: FirstLinear, exact: Callable[[Tensor], Tensor]
) -> Float[Tensor, "found inputs"]:
    """Of one image; none where no row has its δ."""
    gradient = layer.gradient(observation)
    weight, bias = gradient[:, :-1], gradient[:, -1:]
    names = [f"{layer.name}.{part}" for part in ("weight", "bias")]
    sent = change_of({name: observation.gradient[name].cpu() for name in names}, procedure=observation.local)
    kept, driven = (exact(sent[name]) for name in names)
    seen = kept & driven[:, None]
    best = (seen * bias.abs()).argmax(0, keepdim=True)
    inputs = torch.where(seen, weight / bias, 0).gather(0, best)
    return inputs if bool(seen.any()) else inputs[:0]


def agreeing(
    rows: Float[Tensor, "rows inputs"], errors: Float[Tensor, " rows"], *, most: int
) -> Float[Tensor, "found inputs"]:
    """One row of each group that agrees, of the largest groups first.

    Args:
        rows: As they were read.
        errors: Of each, as a distance; the row with the smallest speaks for its group.
        most: So many at most.
    """
    close = torch.cdist(rows, rows) < errors[:, None] + errors
    found, left = list[int](), torch.ones(len(rows), dtype=torch.bool)
    for row in close.sum(1).argsort(descending=True).tolist():
        group = (close[row] & left).nonzero().flatten()
        if bool(left[row]) and len(group) > 1:
            found.append(int(group[errors[group].argmin()]))
        left &= ~close[row]
    return rows[found[:most]]
