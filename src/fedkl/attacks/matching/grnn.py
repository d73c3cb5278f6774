"""GRNN, Generative Regression Neural Network: optimize a generator of image and label, not the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedkl.attacks.base import Attack, Reconstruction, register_attack
from fedkl.attacks.matching.objectives import GradientMatching, Weighting, check_matchable
from fedkl.attacks.matching.restarts import Incumbents, best_of_restarts
from fedkl.attacks.parallel import Progress
from fedkl.attacks.priors import squared_variation, weighted
from fedkl.errors import AttackError
from fedkl.protocol import Observation

_SMALLEST = 4  # side of the first feature map
_WIDTH = 32  # channels of the last one


@register_attack
@dataclass(frozen=True, kw_only=True)
class GRNN(Attack):
    """RMSprop on the weights of a generator whose image has the observed gradient.

    Labels are used if the observation grants them, as in the FedKL study; otherwise a second head of the
    generator gives them, through a softmax, as in the original. What the observation leaves free is found
    along by the same optimizer, as the FedKL study does with the key. A sigmoid keeps pixels in [0, 1].

    Like a box, that bounds the scale of the images but does not pin it: behind a train-mode norm, the rule
    for scale and offset is that of `Observation.scaling`.

    Attributes:
        iterations: Steps, one evaluation each. The original: 1,000; the FedKL study: 20,000.
        restarts: Starts per image; the attacker's own loss chooses.
        lr: Of RMSprop. The original: 1e-4, with which LeNet on MNIST was at a median of 25 dB after 1,000
            iterations, and with 1e-3 beyond 45 dB (four trials each, PyTorch's initialization).
        momentum: Of RMSprop, in [0, 1). The original: 0.99.
        latent: Length of the generator's noise. The original: 128; the FedKL study: 1,024. It costs nothing:
            see `GeneratorStack`. It sets the step of the first features, which is lr · ‖z‖₁.
        tv: Weight of total variation, twice the mean squared difference of neighbors. The original: 1e-3 for
            LeNet, 1e-6 for ResNets.
        weighting: Of the layers in the distance; see `GradientMatching`. The original: ``"none"``.

    Source:
        Ren et al. 2022 (GRNN), sections 3 and 4, and its public code. Deviations: `lr` by default; the
        best iterate by the attacker's own loss, not the last; the generator's first layer is not kept,
        see `GeneratorStack`; image sides may also be 5, 6 or 7 times a power of two, e.g. 28.
    """

    title: ClassVar[str] = "GRNN"
    type: Literal["grnn"] = "grnn"
    iterations: int = 1000
    restarts: int = 1
    lr: float = 1e-3
    momentum: float = 0.99
    latent: int = 128
    tv: float = 1e-6
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        others = [*self._positive("lr"), *self._not_negative("tv")]
        if not 0 <= self.momentum < 1:
            others.append(f"momentum in [0, 1), got {self.momentum}")
        self._require(*others, iterations=1, restarts=1, latent=1)

    @property
    def most_evaluations(self) -> int:
        """Of each start."""
        return self.iterations

    def _check(self, observation: Observation) -> None:
        check_matchable(observation)
        _sides(observation.image_shape)

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        repeated = [o for o in observations for _ in range(self.restarts)]
        granted = [o.labels for o in repeated if o.labels is not None]
        labels = granted if len(granted) == len(repeated) else None
        matching = _Regression(
            repeated,
            labels=labels,
            distance="grnn",
            weighting=self.weighting,
            prior=weighted(_mean_variation, self.tv),
            dtype=torch.float32,
        )
        seeded = [g for g in generators for _ in range(self.restarts)]
        stack = GeneratorStack(matching, seeded, latent=self.latent, with_labels=labels is None)
        return best_of_restarts(
            matching,
            self._descend(matching, stack, on_evaluation),
            labels,
            restarts=self.restarts,
            scaling=observations[0].scaling,
            evaluations=self.iterations,
            unit=matching.at_zero(),
        )

    def _descend(
        self, matching: GradientMatching, stack: GeneratorStack, on_evaluation: Progress
    ) -> Incumbents:
        optimizer = torch.optim.RMSprop(stack.parameters, lr=self.lr, momentum=self.momentum)
        points = stack.points()
        best = Incumbents(points)
        index = torch.arange(len(points), device=points.device)
        for step in range(1, self.iterations + 1):
            values, gradients = matching(points.detach(), index)
            finite = best.offer(points.detach(), values, gradients)
            optimizer.zero_grad()
            torch.autograd.backward([points], [torch.where(finite[:, None], gradients, 0)])
            optimizer.step()
            on_evaluation(step, len(points))
            points = stack.points()
        return best


class _Regression(GradientMatching):
    def at_zero(self) -> Float[Tensor, " problems"]:
        """The distance of a dummy gradient of zero."""
        sizes = [self._weights[name] * g.flatten(1).square().sum(1) for name, g in self._observed.items()]
        squared = torch.stack(sizes).sum(0)
        return squared + squared.sqrt()


class GeneratorStack:
    """One generator per problem, side by side as stacked tensors: row i depends on generator i only.

    Noise z → fully connected → GLU → blocks of (×2 nearest upsampling, 3×3 convolution, norm over the batch
    and positions, GLU) → sigmoid; and for labels z → linear. z is fixed, so that an element of the first
    layer's weights has the gradient δ_i z_j, and RMSprop, which divides by the gradient's running size, moves
    it by lr · sign(z_j) u_i, with the same u_i for all j. The output W z then moves by lr · ‖z‖₁ u_i: W is
    not needed, the layer's output can be optimized itself with a step ‖z‖₁ times as large. This is exact for
    one image (but for RMSprop's ε) and saves 73 % of the generator's weights with a latent of 128, 96 % with
    1,024. For several images it takes their noise vectors as orthogonal, and label logits likewise.

    Norms use the statistics of the problem's own batch, as the original's do; with one image, of its
    positions.

    Args:
        matching: Says what points are, and what starts what the observations leave free.
        generators: Sources of the weights, one per problem.
        latent: Length of z.
        with_labels: Whether points have label logits.
    """

    def __init__(
        self,
        matching: GradientMatching,
        generators: Sequence[torch.Generator],
        *,
        latent: int,
        with_labels: bool,
    ) -> None:
        self._shape = matching.shape
        self._start, ups = _sides(matching.shape[1:])
        self._widths = [_WIDTH * 2**k for k in reversed(range(ups))]
        self._with_labels = with_labels
        known = torch.Size(matching.shape).numel() + with_labels * matching.shape[0] * matching.classes
        # What is free starts at the server's guess: nothing random, and nothing drawn from `generators`.
        free = matching.starts([torch.Generator() for _ in generators])[:, known:]
        drawn = [self._drawn(g, latent, matching.classes) for g in generators]
        stacked = {name: torch.stack([d[name] for d in drawn]).to(matching.device) for name in drawn[0]}
        self._reach = stacked.pop("reach")
        self._tensors = stacked | {"free": free.clone()}
        for tensor in self._tensors.values():
            tensor.requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        """All weights, and what the observations leave free."""
        return list(self._tensors.values())

    def points(self) -> Float[Tensor, "problems d"]:
        """Points for gradient matching, differentiable by the weights."""
        t, reach = self._tensors, self._reach
        features = reach[:, :, None, None] * t["features"] + t["bias"][:, None, :, None]
        x = F.glu(features, 2).reshape(len(reach), -1, self._widths[0], self._start, self._start)
        for block in range(len(self._widths)):
            x = _up(x, t[f"kernel{block}"], t[f"gain{block}"], t[f"shift{block}"])
        parts = [x.sigmoid().flatten(1)]
        if self._with_labels:
            parts.append((reach[:, :, None] * t["logits"] + t["prior"][:, None]).flatten(1))
        return torch.cat([*parts, t["free"]], 1)

    def _drawn(self, generator: torch.Generator, latent: int, classes: int) -> dict[str, Tensor]:
        """One problem's weights in PyTorch's default initialization."""

        def uniform(*shape: int, inputs: int) -> Tensor:
            return (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(inputs)

        batch, channels, area = self._shape[0], 2 * self._widths[0], self._start**2
        z = torch.randn(batch, latent, generator=generator)
        reach = z.abs().sum(1)
        # A transposed convolution of a single position counts its outputs as inputs.
        features = z @ uniform(latent, channels * area, inputs=channels * area)
        drawn = {
            "reach": reach,
            "features": (features / reach[:, None]).reshape(batch, channels, area),
            "bias": uniform(channels, inputs=channels * area),
        }
        if self._with_labels:
            drawn["logits"] = z @ uniform(latent, classes, inputs=latent) / reach[:, None]
            drawn["prior"] = uniform(classes, inputs=latent)
        outputs = [*self._widths[1:], self._shape[1]]
        for block, (width, output) in enumerate(zip(self._widths, outputs, strict=True)):
            drawn[f"kernel{block}"] = uniform(2 * output, 9, width, inputs=9 * width)
            drawn[f"gain{block}"] = torch.ones(2 * output)
            drawn[f"shift{block}"] = torch.zeros(2 * output)
        return drawn


def _up(x: Tensor, kernel: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Upsampling, convolution, norm and GLU of (problems, batch, channels, side, side).

    A 3×3 convolution of an image in which every pixel is repeated 2×2 is a 4×4 transposed convolution of
    stride 2 whose taps are sums of the nine: less than half of the work.
    """
    problems, batch, _, side, _ = x.shape
    channels = kernel.shape[1]
    taps = (_TAPS.to(kernel) @ kernel).reshape(problems, 1, channels * 16, -1)
    columns = (taps @ x.flatten(3)).reshape(problems * batch, channels * 16, side * side)
    x = F.fold(columns, (2 * side, 2 * side), 4, padding=1, stride=2)
    x = x.reshape(problems, batch, channels, 2 * side, 2 * side)
    # Statistics over each problem's own batch and positions: problems are channels here.
    x = x.transpose(0, 1).flatten(1, 2)
    x = F.batch_norm(x, None, None, gain.flatten(), shift.flatten(), training=True)
    return F.glu(x.reshape(batch, problems, channels, 2 * side, 2 * side).transpose(0, 1), 2)


def _sides(image_shape: Sequence[int]) -> tuple[int, int]:
    """Side of the first feature map, and the doublings from there to the image."""
    _, height, width = image_shape
    side, ups = height, 0
    while side % 2 == 0 and side >= 2 * _SMALLEST:
        side, ups = side // 2, ups + 1
    if height != width or ups == 0 or side >= 2 * _SMALLEST:
        raise AttackError(
            f"GRNN: expected square images with a side of 4, 5, 6 or 7 times a power of two from 2 on, got "
            f"{height}×{width}. Pad the images, or use another attack."
        )
    return side, ups


_TAP = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
_TAPS = torch.kron(_TAP, _TAP)


def _mean_variation(images: Tensor) -> Tensor:
    """Twice the mean squared differences of neighbors, vertical plus horizontal, as in the public code."""
    _, channels, side, _ = images.shape
    return 4 / (channels * side * (side - 1)) * squared_variation(images)
