"""Gradient matching by an attacker who knows the lock, and reads its structure first."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkl.attacks.algebraic.structure import Structure, read_structure
from fedkl.attacks.base import register_attack
from fedkl.attacks.labels import head_names
from fedkl.attacks.matching.inverting import MEAN, STD, InvertingGradients
from fedkl.attacks.matching.objectives import GradientMatching, Weighting
from fedkl.attacks.matching.restarts import Incumbents
from fedkl.attacks.parallel import Progress
from fedkl.errors import ConfigError
from fedkl.metrics import Scaling
from fedkl.protocol import Observation

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_FLAT = 1e-3  # of the mean variance: channels below it are constant


@register_attack
@dataclass(frozen=True, kw_only=True)
class AdaptiveMatching(InvertingGradients):
    """Inverting Gradients with what the gradient's structure and sent norm statistics say.

    * A free γ is 0 where a zero row of the gradient says so, and does not start at 0 elsewhere.
    * γ and β that the observation leaves free start from γ = 1, β = 0 and, with `restarts`, by turns from the
      server's own draw.
    * The head's input, which a single image's gradient gives away, is matched too.
    * So are mean and standard deviation before every norm whose running statistics are sent.

    Attributes:
        weighting: See `InvertingGradients`.
        support: Whether the zero rows decide where a private γ is zero.
        features: Weight of ‖h(x) − h‖² / ‖h‖², with the head's input h; 0: left out.
        statistics: Weight of ((μ − μ*) / σ*)² + (σ / σ* − 1)², averaged over channels and norms, where they
            were sent; 0: left out.
        above_first: Share of the iterations in which only layers behind the last private γ count, where there
            are any; not with `largest`.

    Source:
        The statistics term: Yin et al. 2021 (GradInversion), section 3.3, here divided by σ*. What γ's
        support and the head's input add is this package's own.
    """

    title: ClassVar[str] = "matching that knows the lock"
    knows_locks: ClassVar[bool] = True
    type: Literal["adaptive-matching"] = "adaptive-matching"  # type: ignore[assignment]
    weighting: Weighting = "sqrt"
    support: bool = True
    features: float = 0.1
    statistics: float = 0.0
    above_first: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.features, self.statistics)
        if not all(0 <= weight < math.inf for weight in weights) or not 0 <= self.above_first < 1:
            raise ConfigError(
                "AdaptiveMatching: expected finite features and statistics ≥ 0 and 0 ≤ above_first < 1, got "
                f"features={self.features}, statistics={self.statistics}, above_first={self.above_first}."
            )
        if self.above_first and self.largest is not None:
            raise ConfigError(
                "AdaptiveMatching: largest and above_first choose layers both, and may leave none. Set one."
            )

    def _matching(self, observations: list[Observation], labels: list[Tensor] | None) -> GradientMatching:
        unique = {id(observation): observation for observation in observations}
        read = {place: read_structure(observation) for place, observation in unique.items()}
        starts = []
        for number, observation in enumerate(observations):
            neutral = number % self.restarts % 2 == 0
            starts.append(self._started(observation, read[id(observation)], neutral=neutral))
        return _Matching(starts, [read[id(o)] for o in observations], labels=labels, attack=self)

    def _started(self, observation: Observation, structure: Structure, *, neutral: bool) -> Observation:
        """The same observation, with another start of what is free and γ's support in the model."""
        model, found = observation.model, set(observation.free)
        # What stays as it is is not copied.
        shared = [t for name, t in (*model.named_parameters(), *model.named_buffers()) if name not in found]
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in found.intersection(parameters) if neutral else ():
                owner, _, part = name.rpartition(".")
                if not isinstance(model.get_submodule(owner), _LAYERS):
                    parameters[name].fill_(1.0 if part == "weight" else 0.0)
            for name, support in structure.support.items() if self.support else ():
                if name in observation.free and name in parameters:  # what was granted is right as it is
                    parameters[name].copy_(_supported(parameters[name], support))
        return replace(observation, model=model)

    def _scaling(self, observation: Observation) -> Scaling:
        return "clip" if self.statistics and observation.statistics else observation.scaling

    def _descend(self, matching: GradientMatching, starts: Tensor, on_evaluation: Progress) -> Incumbents:
        first = int(self.iterations * self.above_first)
        if not first or not isinstance(matching, _Matching) or not matching.only_above(True):
            return super()._descend(matching, starts, on_evaluation)
        found = replace(self, iterations=first, above_first=0.0)._descend(matching, starts, on_evaluation)
        matching.only_above(False)
        pixels = torch.Size(matching.shape).numel()
        begin = torch.cat([(found.points[:, :pixels] - MEAN) / STD, found.points[:, pixels:]], 1)
        rest = replace(self, iterations=self.iterations - first, above_first=0.0)
        return rest._descend(matching, begin, lambda step, running: on_evaluation(first + step, running))


class _Matching(GradientMatching):
    """Gradient matching with terms on the way forward.

    Args:
        observations: One per problem.
        structures: What was read off each.
        labels: Class indexes per observation; None: every point carries logits.
        attack: Its settings.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        structures: Sequence[Structure],
        *,
        labels: Sequence[Tensor] | None,
        attack: AdaptiveMatching,
    ) -> None:
        super().__init__(
            observations,
            labels=labels,
            distance="cosine",
            weighting=attack.weighting,
            largest=attack.largest,
            prior=attack._prior(),
            dtype=torch.float32,
        )
        self._factors = {"features": attack.features, "statistics": attack.statistics}
        self._all_weights = self._weights
        self._above = _above(observations[0])
        inputs = [s.head_input for s in structures if s.head_input is not None and bool(s.head_input.any())]
        if attack.features and len(inputs) == len(structures):
            self._aside["features"] = torch.stack(inputs).to(self.dtype)
        if attack.statistics:
            for name in observations[0].statistics:
                for part in (0, 1):
                    values = [o.statistics[name][part] for o in observations]
                    self._aside[f"{name}.{part}"] = torch.stack(values).to(self.dtype)
        self._fixed = self._dead_places(structures) if attack.support else None
        self._inputs: dict[str, Tensor] = {}
        self._head = head_names(observations[0])[0].removesuffix(".weight")
        self._norms = [name for name in observations[0].statistics if f"{name}.0" in self._aside]
        for name in [*self._norms, *([self._head] if "features" in self._aside else [])]:
            self._model.get_submodule(name).register_forward_pre_hook(self._noting(name))

    def only_above(self, only: bool) -> bool:
        """Lets only layers behind the last private γ count, or all; says whether there are such layers."""
        if not self._above or len(self._above) == len(self._all_weights):
            return False
        self._weights = {
            name: weight if not only or name in self._above else torch.zeros_like(weight)
            for name, weight in self._all_weights.items()
        }
        return True

    def __call__(self, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients; γ of dead channels does not move."""
        values, gradients = super().__call__(points, index)
        return values, gradients if self._fixed is None else gradients.masked_fill(self._fixed[index], 0.0)

    def _noting(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inputs[name] = args[0]

        return note

    def _dead_places(self, structures: Sequence[Structure]) -> Tensor | None:
        if not self._first.free:
            return None
        rows = []
        pixels, logits, *_ = self._lengths()
        for structure in structures:
            parts = [torch.zeros(pixels + logits, dtype=torch.bool, device=self.device)]
            for name in self._first.free:
                live = structure.support.get(name)
                blank = torch.zeros(self._known.first(name).numel(), dtype=torch.bool, device=self.device)
                parts.append(blank if live is None else ~live)
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    def _forward_terms(
        self, images: Tensor, tensors: dict[str, Tensor], buffers: dict[str, Tensor], aside: dict[str, Tensor]
    ) -> Tensor:
        generated = self._first.generate(tensors) if self._first.generate is not None else {}
        own = {name: tensor for name, tensor in tensors.items() if name not in self._first.secrets}
        functional_call(self._model, {**own, **generated, **buffers}, (images,))
        value = images.new_zeros(())
        if "features" in aside:
            gap = self._inputs[self._head].flatten() - aside["features"]
            value = value + self._factors["features"] * gap.square().sum() / aside["features"].square().sum()
        for name in self._norms:
            share = self._factors["statistics"] / len(self._norms)
            value = value + share * _misfit(self._inputs[name], aside[f"{name}.0"], aside[f"{name}.1"])
        self._inputs.clear()
        return value


def _misfit(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """How far the statistics of a norm's input are from known ones, in units of these."""
    channels = x.transpose(0, 1).flatten(1)
    true = variance + _FLAT * variance.mean()
    own = channels.var(1, correction=0) + _FLAT * variance.mean()
    return ((channels.mean(1) - mean).square() / true + ((own / true).sqrt() - 1).square()).mean()


def _supported(values: Tensor, support: Tensor) -> Tensor:
    """γ that is zero outside its support, and not within: its typical positive value instead."""
    positive = values > 0
    typical = values[positive].mean() if bool(positive.any()) else torch.ones_like(values[0])
    return torch.where(support, torch.where(values == 0, typical, values), 0.0)


def _above(observation: Observation) -> set[str]:
    """Observed parameters behind the last private one, in the order of the model."""
    names = [name for name, _ in observation.model.named_parameters()]
    private = [place for place, name in enumerate(names) if name not in observation.gradient]
    return set(names[max(private) + 1 :]) if private else set(names)
