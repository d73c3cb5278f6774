"""Exact disaggregation of small batches behind a ReLU, by the zeros that it leaves in the slopes.

For B images the gradient of a linear layer is G = Σ_b δ_b x_bᵀ: rank B, and known as G = L R only up to an
invertible B × B matrix. Behind a ReLU δ_b is zero wherever the layer's output is not positive. A direction q
with L q = δ_b is orthogonal to all rows of L where δ_b is zero: B - 1 of them say what q is. Rows are drawn
at random, and the B independent directions with most zeros kept, until ReLU and slopes agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedkl.attacks.algebraic.first_linear import FirstLinear, first_linear, reconstructions
from fedkl.attacks.algebraic.sgd import check_sgd
from fedkl.attacks.base import Attack, Needs, Reconstruction, register_attack
from fedkl.attacks.parallel import Progress
from fedkl.attacks.probing import probe_of
from fedkl.errors import AttackError
from fedkl.protocol import Observation

_MOST = 24  # images: the chance of a draw falls with 2^-B
_AT_ONCE = 4096
_ZERO = 1e-4  # of entries of unit rows times unit directions; float32 leaves about 1e-6
_CERTAIN = 10.0  # times float32's errors
_SPARE = 1  # zeros beyond those that a draw has made
_NEW = 0.05  # sine of the angle to the directions that were found before
_WRONG = 0.01  # share of outputs where an image and its slopes disagree, at most


@register_attack
@dataclass(frozen=True, kw_only=True)
class Disaggregation(Attack):
    """A batch's inputs of the first fully connected layer, exactly, where a ReLU stands behind it.

    Images are claimed only where their own outputs W x + b are positive exactly where their slopes are not
    zero; others are NaN. `Reconstruction.loss` is the share of outputs where these differ, over the batch:
    about 0 where the batch was taken apart, 1 where it was not. It accepts a gradient, or weights after one
    step of SGD. Behind convolutions the inputs are features: `FeatureInversion`, with images of the server's
    own, takes them to images.

    Attributes:
        draws: Sets of rows at most.

    Source:
        Dimitrov et al. 2024 (SPEAR, NeurIPS, arXiv 2403.03945). Deviations: the bias's gradient is a column
        of G, which fixes the factors of the x_b; small rows, of few images, are drawn more often; directions
        are refined on all of their zeros; the sparsest independent ones are taken, without a search among
        others.
    """

    title: ClassVar[str] = "exact disaggregation"
    reads_unaltered: ClassVar[bool] = True
    type: Literal["disaggregation"] = "disaggregation"
    draws: int = 200_000

    def __post_init__(self) -> None:
        self._require(draws=1)

    @property
    def divisible(self) -> bool:
        """Where features are inverted, one regression serves all observations."""
        return False

    @property
    def needs(self) -> Needs:
        """Few images."""
        return Needs(batch=_MOST)

    def _check(self, observation: Observation) -> None:
        check_sgd(observation, attack="Disaggregation")
        local = observation.local
        layer = first_linear(observation, attack="Disaggregation")
        one_step = local.step_count(observation.batch_size) == 1
        if not one_step or not _before_relu(observation, layer.name):
            raise AttackError(
                f"Disaggregation: expected one step, and a ReLU right behind '{layer.name}', got several "
                "steps or another function. Use the attack linear-rows."
            )

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        layer = first_linear(observations[0], attack="Disaggregation")
        inputs, losses = [], []
        for observation, generator in zip(observations, generators, strict=True):
            found, wrong = self._apart(observation, layer, generator)
            inputs.append(found[wrong <= _WRONG])
            losses.append(float(wrong.mean()) if len(wrong) else 1.0)
            on_evaluation(len(inputs), len(observations) - len(inputs))
        return reconstructions(
            observations,
            inputs,
            losses=losses,
            layer=layer,
            evaluations=self.draws,
            on_evaluation=on_evaluation,
        )

    def _apart(
        self, observation: Observation, layer: FirstLinear, generator: torch.Generator
    ) -> tuple[Float[Tensor, "found inputs"], Float[Tensor, " found"]]:
        """The layer's inputs, and of each the share of outputs that contradict it; none, or those of all."""
        problem = _Problem.of(observation, layer)
        best = problem.gradient[:0, :-1], problem.gradient[:0, 0]
        if problem.rows is None:
            return best
        images, rows = observation.batch_size, problem.rows
        if images == 1:
            return problem.solved(rows.new_ones(1, 1))
        kept = rows.new_empty(0, images)
        small = rows.norm(dim=1)
        unit = F.normalize(rows, dim=1)
        for _ in range(-(-self.draws // _AT_ONCE)):
            chance = torch.rand(_AT_ONCE, len(rows), generator=generator)
            drawn = (chance.log() * small).topk(images - 1).indices
            drawn_directions = torch.linalg.qr(unit[drawn].mT, mode="complete").Q[..., -1]
            before, kept = kept, _sparsest(torch.cat([kept, drawn_directions]), unit)
            if len(kept) < images or torch.equal(before, kept):
                continue
            found = problem.solved(torch.stack([_refined(direction, unit) for direction in kept]))
            if not len(best[1]) or float(found[1].mean()) < float(best[1].mean()):
                best = found
            if float(best[1].max()) < _WRONG:
                break
        return best


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """One gradient, and what it is checked by.

    Attributes:
        gradient: Σ δ (x, 1)ᵀ.
        rows: L, without rows that are about zero; None where the rank is below the number of images.
        right: R, orthonormal.
        weight: Of the layer.
        bias: Of the layer.
        alive: Which rows are not about zero.
    """

    gradient: Float[Tensor, "outputs inputs_and_1"]
    rows: Float[Tensor, "alive images"] | None
    right: Float[Tensor, "images inputs_and_1"]
    weight: Float[Tensor, "outputs inputs"]
    bias: Float[Tensor, " outputs"]
    alive: Tensor

    @classmethod
    def of(cls, observation: Observation, layer: FirstLinear) -> _Problem:
        gradient, images = layer.gradient(observation), observation.batch_size
        error = layer.error(observation)
        alive = gradient.norm(dim=1) > _CERTAIN * error / len(gradient) ** 0.5
        _, power, right = torch.linalg.svd(gradient[alive], full_matrices=False)
        enough = len(power) >= images and float(power[images - 1]) > _CERTAIN * error
        weight, bias = (
            observation.model.get_parameter(f"{layer.name}.{part}").detach().cpu().double()
            for part in ("weight", "bias")
        )
        right = right[:images]
        rows = gradient[alive] @ right.T if enough else None
        return cls(gradient=gradient, rows=rows, right=right, weight=weight, bias=bias, alive=alive)

    def solved(self, directions: Float[Tensor, "images images"]) -> tuple[Tensor, Tensor]:
        """Inputs, and of each the share of live outputs where its ReLU and its slope disagree."""
        slopes = (self.gradient @ self.right.T @ directions.T)[self.alive]
        augmented = torch.linalg.solve(directions.T, self.right)
        inputs = augmented[:, :-1] / augmented[:, -1:]
        passes = (inputs @ self.weight.T + self.bias > 0)[:, self.alive]
        active = slopes.T.abs() > _ZERO * self.gradient[self.alive].norm(dim=1)
        return inputs, (passes != active).double().mean(1)


def _sparsest(candidates: Tensor, rows: Tensor) -> Tensor:
    """Independent directions with most zeros, and with more than drawn rows have made."""
    count = ((candidates @ rows.T).abs() < _ZERO).sum(1)
    enough = count >= candidates.shape[1] - 1 + _SPARE
    candidates, count = candidates[enough], count[enough]
    chosen, basis = list[int](), candidates.new_empty(0, candidates.shape[1])
    for place in count.argsort(descending=True, stable=True).tolist():
        rest = candidates[place] - candidates[place] @ basis.T @ basis
        if float(rest.norm()) > _NEW:
            chosen.append(place)
            basis = torch.cat([basis, F.normalize(rest, dim=0)[None]])
        if len(chosen) == candidates.shape[1]:
            break
    return candidates[chosen]


def _refined(direction: Tensor, rows: Tensor) -> Tensor:
    """The direction most orthogonal to all rows that it is about orthogonal to."""
    near = rows[(rows @ direction).abs() < _ZERO]
    right: Tensor = torch.linalg.svd(near)[2]
    return right[-1]


class _Activations(TorchFunctionMode):
    """Notes whether a layer's output goes into a ReLU."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight, self._output = weight, torch.empty(0)
        self.found: bool = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and args[1] is self._weight:
            self._output = result
        elif func in (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_):
            self.found = self.found or args[0] is self._output
        return result


def _before_relu(observation: Observation, name: str) -> bool:
    model = probe_of(observation.model)
    weight = model.get_parameter(f"{name}.weight")
    with torch.no_grad(), _Activations(weight) as activations:
        model(torch.zeros(1, *observation.image_shape).to(weight))
    return bool(activations.found)
