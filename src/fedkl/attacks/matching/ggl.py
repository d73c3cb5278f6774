"""GGL, Generative Gradient Leakage: search a generator's latent space for the observed gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from fedkl.attacks.base import Attack, Reconstruction, register_attack
from fedkl.attacks.generators.files import ImageGenerator, generator_for
from fedkl.attacks.labels import known_labels
from fedkl.attacks.matching.objectives import GradientMatching, Weighting, check_matchable
from fedkl.errors import AttackError
from fedkl.protocol import Observation
from fedkl.types import Labels

_AT_ONCE = 2**26  # numbers of all candidates' gradients that are held at once: 256 MB
_WORST = float(np.finfo(np.float32).max)  # CMA-ES ranks; it cannot rank NaN, and warns of infinities


@register_attack
@dataclass(frozen=True, kw_only=True)
class GGL(Attack):
    """Gradient-free search (CMA-ES) in the latent space of a class-conditional generator; one image.

    Labels are used if the observation grants them, otherwise inferred. The image of a candidate u is
    G(bound · tanh(u / bound), label), its loss the squared distance of its gradient from the observed one.
    Public transforms of a defense are applied to its gradient too.

    Attributes:
        generator: One of `fedkl.attacks.generators.files.SHIPPED`, the path of a generator's file, or the
            folder of a BigGAN-deep. None: the shipped one, if exactly one draws images of the observation's
            shape and classes.
        truncation: Whose statistics the norms of a BigGAN-deep use; other generators have none. The
            original: 1.
        optimizer: ``"cma"``, or ``"adam"`` on u by gradient, from N(0, I).
        generations: Of CMA-ES.
        population: Candidates of a generation. The original: 500 × 50 evaluations.
        iterations: Of Adam. The original: 2,500.
        lr: Of Adam. The original: 0.1.
        restarts: Searches per image; the attacker's own loss chooses.
        bound: Latent values stay within ±bound. The original: 1.
        weighting: Of the layers in the objective; see `GradientMatching`. The original: ``"none"``.

    Source:
        Li et al. 2022 (GGL), section 4 and public code. Deviations: the loss is divided by the observed
        gradient's size instead of the number of layers (ranks, and so CMA-ES, do not change); CMA-ES starts
        at 0 with step 1, so that the first generation is the generator's own prior, and its own population
        is the 50 of a round; a search ends early where CMA-ES finds no more progress; the result is the best
        candidate seen; the bound is wider, because our generators draw from N(0, I), of which ±1 would cut a
        third off; the Adam variant has no schedule, as the code for ILSVRC. The generators are our own.
    """

    title: ClassVar[str] = "GGL"
    type: Literal["ggl"] = "ggl"
    generator: str | None = None
    truncation: float = 1.0
    optimizer: Literal["cma", "adam"] = "cma"
    generations: int = 500
    population: int = 50
    iterations: int = 2500
    lr: float = 0.1
    restarts: int = 1
    bound: float = 3.0
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        others = self._positive("lr", "bound")
        if not 0 < self.truncation <= 1:
            others.append(f"0 < truncation ≤ 1, got {self.truncation}")
        if self.optimizer not in ("cma", "adam"):
            others.append(f"optimizer cma or adam, got '{self.optimizer}'")
        self._require(*others, generations=1, population=4, iterations=1, restarts=1)

    @property
    def most_evaluations(self) -> int:
        """Of each start; CMA-ES may stop earlier."""
        return self.generations * self.population if self.optimizer == "cma" else self.iterations

    def _check(self, observation: Observation) -> None:
        check_matchable(observation)
        if observation.batch_size != 1:
            raise AttackError(
                f"GGL searches for one image behind a gradient, got a batch of {observation.batch_size}. "
                "Use batch_size = 1, or another attack."
            )
        if observation.free:
            raise AttackError(
                f"GGL searches for an image only; to be found besides: {', '.join(observation.free)}. "
                "Leave out the arms that regress, or use another attack."
            )
        self._prior(observation)
        known_labels([observation])

    def _prior(self, observation: Observation) -> ImageGenerator:
        shape, classes = observation.image_shape, observation.classes
        return generator_for(self.generator, image_shape=shape, classes=classes, truncation=self.truncation)

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Callable[[int, int], None],
    ) -> list[Reconstruction]:
        known = known_labels(observations)
        device = next(iter(observations[0].gradient.values())).device
        prior = self._prior(observations[0]).to(device)
        repeated = [o for o in observations for _ in range(self.restarts)]
        labels = [y.to(device) for y in known for _ in range(self.restarts)]
        draw = _Drawing(prior, observations[0].image_shape, self.bound)
        seeded = [g for g in generators for _ in range(self.restarts)]
        search = self._evolve if self.optimizer == "cma" else self._descend
        found = search(draw, repeated, labels, seeded, on_evaluation)
        with torch.no_grad():
            images = torch.stack([draw(f.u[None], y) for f, y in zip(found, labels, strict=True)])
        images[torch.tensor([math.isinf(f.loss) for f in found], device=device)] = torch.nan
        return self._best(found, images, labels)

    def _evolve(
        self,
        draw: _Drawing,
        observations: list[Observation],
        labels: list[Labels],
        generators: list[torch.Generator],
        on_evaluation: Callable[[int, int], None],
    ) -> list[_Found]:
        searches = [
            _Search(draw, _Candidates([o], labels=[y], weighting=self.weighting, dtype=torch.float32), y, es)
            for o, y, es in zip(observations, labels, map(self._strategy(draw), generators), strict=True)
        ]
        for generation in range(1, self.generations + 1):
            running = [search for search in searches if not search.strategy.stop()]
            if not running:
                break
            for search in running:
                search.step()
            on_evaluation(generation * self.population, len(running))
        return [search.found for search in searches]

    def _strategy(self, draw: _Drawing) -> Callable[[torch.Generator], Any]:
        import cma  # with pyplot: takes a second

        def strategy(generator: torch.Generator) -> Any:
            seed = int(torch.randint(2**62, (), generator=generator))
            normal = np.random.default_rng(seed).standard_normal
            options = {
                "popsize": self.population,
                "randn": lambda *shape: normal(shape),
                "seed": math.nan,  # leaves NumPy's global generator alone
                "verbose": -9,
            }
            return cma.CMAEvolutionStrategy(np.zeros(draw.latent), 1.0, options)

        return strategy

    def _descend(
        self,
        draw: _Drawing,
        observations: list[Observation],
        labels: list[Labels],
        generators: list[torch.Generator],
        on_evaluation: Callable[[int, int], None],
    ) -> list[_Found]:
        matching = _Candidates(observations, labels=labels, weighting=self.weighting, dtype=torch.float32)
        start = torch.stack([torch.randn(draw.latent, generator=generator) for generator in generators])
        u = start.to(matching.device).requires_grad_()
        optimizer = torch.optim.Adam([u], lr=self.lr)
        index = torch.arange(len(u), device=matching.device)
        losses, best = torch.full((len(u),), torch.inf, device=u.device), u.detach().clone()
        for iteration in range(1, self.iterations + 1):
            images = draw(u, torch.cat(labels))
            values, slopes = matching(matching.points(images.detach()), index)
            better = values < losses
            losses, best = torch.where(better, values, losses), torch.where(better[:, None], u.detach(), best)
            # A search that left the finite numbers stays where it is; its company goes on.
            finite = torch.nan_to_num(slopes, 0.0, 0.0, 0.0)[:, : images[0].numel()]
            (u.grad,) = torch.autograd.grad(images.flatten(1), u, finite)
            optimizer.step()
            on_evaluation(iteration, len(u))
        return [
            _Found(u=point, loss=float(loss), evaluations=self.iterations)
            for point, loss in zip(best, losses, strict=True)
        ]

    def _best(
        self, found: Sequence[_Found], images: Float[Tensor, "n 1 c h w"], labels: Sequence[Labels]
    ) -> list[Reconstruction]:
        results: list[Reconstruction] = []
        for first in range(0, len(found), self.restarts):
            chosen = min(range(first, first + self.restarts), key=lambda i: found[i].loss)
            results.append(
                Reconstruction(
                    images=images[chosen],
                    labels=labels[chosen],
                    scaling="clip",
                    loss=found[chosen].loss,
                    evaluations=found[chosen].evaluations,
                    start=chosen - first,
                )
            )
        return results


class _Found(NamedTuple):
    """Best candidate of a search, its loss (inf: never a finite one), and the evaluations of the search."""

    u: Float[Tensor, " latent"]
    loss: float
    evaluations: int


class _Drawing:
    """The generator as a function of unbounded points, in the size and channels that the network expects."""

    def __init__(self, prior: ImageGenerator, shape: tuple[int, int, int], bound: float) -> None:
        self.latent = prior.latent
        self._prior = prior
        self._shape = shape
        self._bound = bound

    def __call__(self, u: Float[Tensor, "n latent"], labels: Labels) -> Float[Tensor, "n c h w"]:
        z = self._bound * (u / self._bound).tanh()
        images: Tensor = self._prior(z, labels.expand(len(u)))
        if images.shape[2:] != self._shape[1:]:
            images = F.interpolate(images, self._shape[1:], mode="area")
        return images.expand(-1, *self._shape)


class _Candidates(GradientMatching):
    """Gradient matching of many candidate images with one observation each, or all with one."""

    def points(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Points of images; what the observations leave free is at the server's guess."""
        guesses = [self._known[name].flatten(1).expand(len(images), -1) for name in self._first.free]
        return torch.cat([images.flatten(1), *guesses], 1)

    def losses(self, images: Float[Tensor, "n c h w"], label: Labels) -> Float[Tensor, " n"]:
        """Losses against the first observation, whose weights serve all candidates; without gradients.

        Shared weights make `vmap` of the gradient several times as fast on a CPU as a copy for
        each candidate.
        """
        shared = [
            *(
                {name: held.first(name) for name in held}
                for held in (self._known, self._buffers, self._observed)
            ),
            *({name: t[0] for name, t in tensors.items()} for tensors in (self._weights, self._aside)),
        ]
        size = sum(self._observed.first(name).numel() for name in self._observed)
        value: Callable[..., Tensor] = vmap(
            self._value, (0, *[None] * 6), chunk_size=max(1, _AT_ONCE // size)
        )
        with torch.no_grad():
            return value(self.points(images), *shared, label)


class _Search:
    """One CMA-ES of one observation, asked and told a whole generation at a time."""

    def __init__(self, draw: _Drawing, matching: _Candidates, label: Labels, strategy: Any) -> None:
        self.strategy = strategy
        self.found = _Found(u=torch.zeros(draw.latent, device=matching.device), loss=math.inf, evaluations=0)
        self._draw, self._matching, self._label = draw, matching, label

    def step(self) -> None:
        """One generation."""
        asked = self.strategy.ask()
        u = torch.tensor(np.stack(asked), dtype=torch.float32, device=self._matching.device)
        with torch.no_grad():
            losses = self._matching.losses(self._draw(u, self._label), self._label)
        losses = torch.where(losses.isfinite(), losses, torch.inf)
        self.strategy.tell(asked, losses.clamp(max=_WORST).tolist())
        best = int(losses.argmin())
        loss, evaluations = float(losses[best]), self.found.evaluations + len(u)
        self.found = (
            _Found(u[best], loss, evaluations)
            if loss < self.found.loss
            else self.found._replace(evaluations=evaluations)
        )
