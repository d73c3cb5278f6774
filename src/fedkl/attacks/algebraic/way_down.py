"""From the head of a chain down to the image, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedkl.attacks import smoothness as prior
from fedkl.attacks.algebraic import blind
from fedkl.attacks.algebraic.chain import Block, Chain
from fedkl.attacks.algebraic.convolution import FLOAT32, ConvolutionSystem, Evidence, Solution
from fedkl.attacks.algebraic.moments import Standardized, standardized
from fedkl.attacks.algebraic.rank import counted
from fedkl.attacks.algebraic.search import minimum

_BLIND_STARTS = 5
_FLAT = 1e6
_PASSES = 4  # over a norm with saturated positions
_HOPELESS = 1e30
_MISFIT = 4.0  # from here on the variances are corrected
_RANGE = (-2.0, 9.0)
_GUESS = 1.0  # in the middle of what was found under sigmoid keys
_POINTS = 16
_NEARBY = (0.1, 0.01)


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """What is known at a block's output, of one image.

    Attributes:
        h: The values, flattened.
        variance: Of their error.
        delta: ∂L/∂h.
    """

    h: Float[Tensor, " values"]
    variance: Float[Tensor, " values"]
    delta: Float[Tensor, " values"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Passed:
    """What passing one block gave.

    Attributes:
        block: The block.
        input: Its input, flattened.
        misfit: Of the forward and backward equations; see `Solution`.
        norm: What was found about its norm, if it has one.
        below: The state at the output of the block below.
        factor: What the solution was multiplied with.
    """

    block: Block
    input: Tensor
    misfit: tuple[float, float]
    norm: Standardized | None
    below: State
    factor: float = 1.0


class Output(NamedTuple):
    """What a block's activation got, of one image: z and the variance of its error, both (C, H, W)."""

    z: Tensor
    variance: Tensor


class _Unscaled(NamedTuple):
    """What is found behind a norm, but for one factor: `variance` is that of the solution's input."""

    solution: Solution
    known: Standardized | None
    variance: Tensor


class Descent:
    """Goes down a chain.

    Args:
        chain: The network.
        gradient: The observed gradient by parameter name.
        smoothness: 1 / variance of the difference between neighboring pixels, where the unit is a typical
            deviation of the first layer's output.
        chroma: How much less colors differ between neighbors than brightness, as a factor of that.
        statistics: Mean and biased variance of the inputs of norms, by their names, where they are known.
    """

    def __init__(
        self,
        chain: Chain,
        gradient: Mapping[str, Tensor],
        *,
        smoothness: float,
        chroma: float,
        statistics: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        self.chain = chain
        self._statistics = {
            name: (mean.double().cpu(), variance.double().cpu())
            for name, (mean, variance) in statistics.items()
        }
        self._gradient = {name: g.detach().double().cpu() for name, g in gradient.items()}
        self._systems: dict[str, ConvolutionSystem] = {}
        self._priors: dict[str, Tensor] = {}
        self._sigma: dict[int, Tensor] = {}
        self._smoothness, self._chroma = smoothness, chroma

    def head(self) -> State:
        """The head's input h, from ∂L/∂b = p − y and ∂L/∂W = (p − y) hᵀ, by least squares over the rows."""
        layer = self.chain.blocks[-1].layer
        slope = self._gradient[f"{layer.name}.bias"]
        h = self._gradient[f"{layer.name}.weight"].T @ slope / slope.square().sum()
        return State(h=h, variance=(FLOAT32 * h).square(), delta=layer.weight.T @ slope)

    def run(self, generator: torch.Generator) -> list[Passed]:
        """Passes all blocks below the head, from above.

        Args:
            generator: Of the starts of the blind top, where the head's gradient is not observed.
        """
        passed = self.to_first(generator)
        # A blind top that is itself the first block has already found the image.
        if not passed or passed[-1].block is not self.chain.blocks[0]:
            passed.append(self._pass(0, self.state(passed)))
        return passed

    def to_first(self, generator: torch.Generator) -> list[Passed]:
        """Passes all blocks below the head but the first, from above; that one too where it is a blind top.

        Args:
            generator: As in `run`.
        """
        place, passed = len(self.chain.blocks) - 2, []
        if not self.sees_head:
            passed.append(self._blind_top(generator))
            place -= 1
        for lower in range(place, 0, -1):
            passed.append(self._pass(lower, self.state(passed)))
        return passed

    def state(self, passed: list[Passed]) -> State:
        """The state below what has been passed: at first the head's."""
        return passed[-1].below if passed else self.head()

    def first_output(self, generator: torch.Generator) -> Output:
        """What the first block's activation got, without going through that block.

        Args:
            generator: As in `run`.
        """
        state, first = self.state(self.to_first(generator)), self.chain.blocks[0]
        z, slope = first.activation.undo(state.h)
        variance = state.variance / slope.square() + (FLOAT32 * z).square()
        return Output(z=z.view(first.output_shape), variance=variance.view(first.output_shape))

    @property
    def sees_head(self) -> bool:
        """Whether the head's gradient was observed, and tells what it gets."""
        head = self.chain.blocks[-1].layer.name
        return not self.chain.covered and all(
            f"{head}.{part}" in self._gradient for part in ("weight", "bias")
        )

    def _blind_top(self, generator: torch.Generator) -> Passed:
        """The last convolution's input and output gradient, from its own gradient alone."""
        place = len(self.chain.blocks) - 2
        block, system = self.chain.blocks[place], self._system(place)
        gradient, bias = (self._gradient[f"{block.layer.name}.{part}"] for part in ("weight", "bias"))
        found = blind.solved(system, gradient.flatten(2), bias, generator=generator, starts=_BLIND_STARTS)
        below = State(
            h=found.input.flatten(),
            variance=found.variance.flatten() + (FLOAT32 * found.input.flatten()).square(),
            delta=system.transpose(found.delta).flatten(),
        )
        return Passed(block=block, input=below.h, misfit=(0.0, found.misfit), norm=None, below=below)

    def _pass(self, place: int, state: State) -> Passed:
        block = self.chain.blocks[place]
        if not block.layer.is_convolution:
            return self._pass_linear(block, state)
        if self.scale_is_lost(block) and place > 0:
            return self._searched(place, state)
        unit = self._pixel_unit if self.scale_is_lost(block) else _one
        solution, known = self._solve(place, state, unit)
        variance = solution.variance() if place > 0 else torch.zeros_like(solution.input)
        return self._passed(place, solution, known, factor=unit(solution), variance=variance)

    def scale_is_lost(self, block: Block) -> bool:
        """Whether a norm of unknown statistics follows."""
        return block.norm is not None and block.norm.name not in self._statistics

    def _pass_linear(self, block: Block, state: State) -> Passed:
        """The input of a linear layer from ∂L/∂W = δ hᵀ."""
        delta = state.delta * block.activation.undo(state.h)[1]
        gradient = self._gradient[f"{block.layer.name}.weight"]
        h = gradient.T @ delta / delta.square().sum().clamp_min(1e-300)
        below = State(h=h, variance=(FLOAT32 * h).square(), delta=block.layer.weight.T @ delta)
        return Passed(block=block, input=h, misfit=(0.0, 0.0), norm=None, below=below)

    def _searched(self, place: int, state: State) -> Passed:
        """Passes a norm above another block: the lost factor is the one that the block below fits best.

        The factor is sought as the largest |h| that it gives: in logits up to the activation's bound, in
        octaves where it has none. ε makes the solution depend a little on the factor: solve again, and seek
        again nearby. Where dead channels leave the block below with fewer equations than unknowns, any factor
        fits: then there is nothing to seek, and what lies below is a guess.
        """
        unscaled = self._unscaled(place, state)
        if not self._tells_factor(place - 1):
            return self._scaled(place, unscaled, _GUESS)
        found = minimum(partial(self._misfit_at, place, unscaled), *_RANGE, points=_POINTS)
        for nearby in _NEARBY:
            sigma = unscaled.solution.sigma * self._factor(place, unscaled, found)
            unscaled = self._unscaled(place, state, sigma=sigma, variance=unscaled.variance)
            misfit = partial(self._misfit_at, place, unscaled)
            found = minimum(misfit, found - nearby, found + nearby)
        return self._scaled(place, unscaled, found)

    def _tells_factor(self, place: int) -> bool:
        """False where dead channels leave a block fewer equations than unknowns."""
        block = self.chain.blocks[place]
        inputs = torch.ones(block.layer.weight.shape[1], dtype=torch.bool)
        varying = self._live(place - 1) if place > 0 else inputs
        if bool(varying.all() & self._live(place).all()):
            return True
        equations, unknowns = counted(block, alive=int(self._live(place).sum()), varying=int(varying.sum()))
        return equations >= unknowns

    def _live(self, place: int) -> Tensor:
        """Which output channels of a block are not constant, as far as the zero rows of its gradient tell."""
        block = self.chain.blocks[place]
        if block.norm is None or block.elementwise is not None:
            return torch.ones(block.layer.weight.shape[0], dtype=torch.bool)
        return self._gradient[f"{block.layer.name}.weight"].flatten(1).any(1)

    def _unscaled(
        self, place: int, state: State, *, sigma: Tensor | None = None, variance: Tensor | None = None
    ) -> _Unscaled:
        """Solves a block behind a norm; the variance is worked out unless it is given."""
        solution, known = self._solve(place, state, _boundless, passes=1, sigma=sigma)
        return _Unscaled(solution, known, solution.variance() if variance is None else variance)

    def _factor(self, place: int, unscaled: _Unscaled, position: float) -> float:
        bound = self.chain.blocks[place - 1].activation.high
        largest = bound / (1 + math.exp(-position)) if math.isfinite(bound) else 2.0**position
        return largest / float(unscaled.solution.input.abs().max())

    def _scaled(self, place: int, unscaled: _Unscaled, position: float) -> Passed:
        factor = self._factor(place, unscaled, position)
        return self._passed(
            place, unscaled.solution, unscaled.known, factor=factor, variance=unscaled.variance
        )

    def _misfit_at(self, place: int, unscaled: _Unscaled, position: float) -> float:
        return self._misfit(place - 1, self._scaled(place, unscaled, position).below)

    def _misfit(self, place: int, state: State) -> float:
        """How badly a block fits a state at its output. Its σ of the last time serves for ε."""
        unit = self._pixel_unit if place == 0 else _boundless
        if not self.scale_is_lost(self.chain.blocks[place]):
            unit = _one
        sigma = self._sigma.get(place)
        try:
            solution, known = self._solve(place, state, unit, passes=1, sigma=sigma, corrected=False)
        except ArithmeticError:
            return _HOPELESS
        if known is not None:
            self._sigma[place] = solution.sigma * unit(solution)
        return sum(solution.misfit)

    def _solve(
        self,
        place: int,
        state: State,
        unit: Callable[[Solution], float],
        *,
        passes: int = _PASSES,
        sigma: Tensor | None = None,
        corrected: bool = True,
    ) -> tuple[Solution, Standardized | None]:
        """A block's input and, behind a norm, its γ and β; `unit` gives the factor that the norm lost."""
        block, system = self.chain.blocks[place], self._system(place)
        z, slope = block.activation.undo(state.h)
        variance = state.variance / slope.square() + (FLOAT32 * z).square()
        values = [each.view(system.outputs, -1) for each in (z, variance, state.delta * slope)]
        gradient = self._gradient[f"{block.layer.name}.weight"].flatten(2)
        if block.norm is None:
            plain = _evidence(*values, layer_bias=block.layer.bias, gradient=gradient)
            solution = system.solve(plain, prior=self._prior(place), mean=0.5)
            if corrected and max(solution.misfit) > _MISFIT:
                solution = system.solve(plain.inflated(solution.misfit), prior=self._prior(place), mean=0.5)
            return solution, None
        known = standardized(*values, gradient=gradient)
        seen = self._statistics.get(block.norm.name)
        if seen is not None:
            sigma = seen[1].sqrt()
        if sigma is not None:
            known = known.of_size(sigma, eps=block.norm.eps)
        centre = 0.0 if seen is None else 0.5

        def evidence(known: Standardized) -> Evidence:
            plain = known.evidence(gradient)
            return plain if seen is None else plain.placed(seen[1].sqrt(), seen[0] - block.layer.bias)

        solution = system.solve(evidence(known), prior=self._prior(place), mean=centre)
        for _ in range(passes - 1):
            spread = solution.sigma * unit(solution) if seen is None else seen[1].sqrt()
            refined = known.refined(system.apply(solution.input), spread, eps=block.norm.eps)
            if not refined.differs(known):
                break
            known = refined
            solution = system.solve(evidence(known), prior=self._prior(place), mean=centre)
        if corrected and max(solution.misfit) > _MISFIT:
            inflated = evidence(known).inflated(solution.misfit)
            solution = system.solve(inflated, prior=self._prior(place), mean=centre)
        return solution, known

    def _passed(
        self,
        place: int,
        solution: Solution,
        known: Standardized | None,
        *,
        factor: float,
        variance: Tensor,
    ) -> Passed:
        """The state below, with the solution and σ multiplied by the factor."""
        sigma = (solution.sigma * factor).unsqueeze(1)
        delta = solution.delta / torch.where(sigma == 0, 1.0, sigma)
        below = State(
            h=(solution.input * factor).flatten(),
            variance=(variance * factor**2).flatten(),
            delta=self._system(place).transpose(delta).flatten(),
        )
        return Passed(
            block=self.chain.blocks[place],
            input=below.h,
            misfit=solution.misfit,
            norm=known,
            below=below,
            factor=factor,
        )

    def _pixel_unit(self, solution: Solution) -> float:
        """The factor by which the image fills [0, 1]; the scale of a norm's input is not otherwise known."""
        pixels = self._to_pixels(solution.input)
        low, high = torch.quantile(pixels.flatten(), torch.tensor([0.005, 0.995]).double()).tolist()
        return 1 / max(float(high - low), 1e-12)

    def _to_pixels(self, values: Tensor) -> Tensor:
        shape = self.chain.blocks[0].input_shape
        return values.view(shape) / self.chain.scale

    def image(self, last: Passed) -> Tensor:
        """Pixels from the lowest block's input."""
        return (last.input.view(self.chain.blocks[0].input_shape) - self.chain.shift) / self.chain.scale

    def _system(self, place: int) -> ConvolutionSystem:
        block = self.chain.blocks[place]
        if block.layer.name not in self._systems:
            self._systems[block.layer.name] = ConvolutionSystem(block.layer, input_shape=block.input_shape)
        return self._systems[block.layer.name]

    def _prior(self, place: int) -> Tensor:
        block = self.chain.blocks[place]
        if block.layer.name not in self._priors:
            shape = block.input_shape
            made = prior.smooth(
                shape,
                precision=self._smoothness if place == 0 else 1.0,
                chroma=self._chroma if place == 0 else 0.0,
            )
            if place > 0:
                made += prior.constant(~self._live(place - 1), shape[1] * shape[2], precision=_FLAT)
            self._priors[block.layer.name] = made
        return self._priors[block.layer.name]


def _evidence(
    z: Tensor, variance: Tensor, delta: Tensor, *, layer_bias: Tensor, gradient: Tensor
) -> Evidence:
    """Of a convolution without a norm."""
    return Evidence(
        output=z - layer_bias.unsqueeze(1),
        variance=variance,
        delta=delta,
        gradient=gradient,
        gradient_variance=(FLOAT32**2 * gradient.square().mean((1, 2))).clamp_min(1e-300),
        homogeneous=False,
    )


def _one(solution: Solution) -> float:
    return 1.0


def _boundless(solution: Solution) -> float:
    """As if ε were 0."""
    return 1e9
