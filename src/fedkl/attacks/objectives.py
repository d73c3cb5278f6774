"""Gradient matching: how far the gradient of a dummy batch is from the observed one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, stack_module_state, vmap
from torch.nn import functional as F

from fedkl.attacks.base import Observation

Weighting = Literal["none", "sqrt", "full"]

_EXPONENT: dict[Weighting, float] = {"none": 0.0, "sqrt": 0.5, "full": 1.0}
# Gradients below this fraction of the whole (e.g. of a bias before a norm) are float32 rounding noise.
_NOISE = 1e-10


class GradientMatching:
    """The squared distance between gradients, for many observations of one architecture at once.

    The objective of problem i is Σ_l w_l ‖∂L/∂θ_l(x, y) − g_l‖² / Σ_l w_l ‖g_l‖², in float64. A point is an
    image batch or, where labels are to be found too, an image batch and label logits.

    Args:
        observations: What the server has, one per problem, all of one kind.
        labels: Class indexes per observation; None: every point carries logits, through a softmax.
        weighting: w_l = ‖g_l‖^(−2·exponent) with exponent 0 (``"none"``, the original), 0.5 (``"sqrt"``) or
            1 (``"full"``). Deep sigmoid networks in PyTorch's default initialization have gradients of such
            different sizes that the early layers, which hold the image, hardly count without it.
        box: Weight of the mean squared excess of the pixels over [0, 1], the attacker's prior; 0: none.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        *,
        labels: Sequence[Tensor] | None,
        weighting: Weighting,
        box: float = 0.0,
    ) -> None:
        first = observations[0]
        self._box = box
        self.shape = (first.batch_size, *first.image_shape)
        self.classes = first.classes
        models = [_differentiable(observation) for observation in observations]
        self._model = models[0]
        parameters, buffers = stack_module_state(models)
        self._parameters = {name: p.detach() for name, p in parameters.items()}
        self._buffers = dict(buffers)
        names = sorted(first.gradient)
        self._observed = {
            name: torch.stack([o.gradient[name] for o in observations]).double() for name in names
        }
        self._weights = _weights(self._observed, _EXPONENT[weighting])
        self._labels = None if labels is None else torch.stack(list(labels))

    @property
    def dimension(self) -> int:
        """Length of a point."""
        return self._pixels + (0 if self._labels is not None else self.shape[0] * self.classes)

    @property
    def _pixels(self) -> int:
        return torch.Size(self.shape).numel()

    def images(self, points: Float[Tensor, "problems d"]) -> Float[Tensor, "problems b c h w"]:
        """The image part of points."""
        return points[:, : self._pixels].reshape(-1, *self.shape)

    def logits(self, points: Float[Tensor, "problems d"]) -> Float[Tensor, "problems b k"]:
        """The label part of points."""
        return points[:, self._pixels :].reshape(-1, self.shape[0], self.classes)

    def __call__(self, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients at points, for the problems of these indexes; a problem may come twice."""
        select = {name: p[index] for name, p in self._parameters.items()}
        buffers = {name: b[index] for name, b in self._buffers.items()}
        observed = {name: g[index] for name, g in self._observed.items()}
        weights = {name: w[index] for name, w in self._weights.items()}
        targets = self._targets(points, index)
        gradients, values = vmap(grad_and_value(self._distance))(
            points, select, buffers, observed, weights, targets
        )
        return values.detach(), gradients.detach()

    def _targets(self, points: Tensor, index: Tensor) -> Tensor:
        """Labels as indexes; a placeholder where the point's own logits serve."""
        return points.new_zeros(len(points)) if self._labels is None else self._labels[index]

    def _distance(
        self,
        point: Tensor,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        observed: dict[str, Tensor],
        weights: dict[str, Tensor],
        target: Tensor,
    ) -> Tensor:
        images = point[: self._pixels].reshape(self.shape)
        if self._labels is None:
            target = point[self._pixels :].reshape(self.shape[0], self.classes).softmax(1)

        def loss(public: dict[str, Tensor]) -> Tensor:
            state = {**parameters, **public, **buffers}
            return F.cross_entropy(functional_call(self._model, state, (images,)), target)

        dummy = grad(loss)({name: parameters[name] for name in observed})
        terms = [weights[name] * (dummy[name] - observed[name]).square().sum() for name in observed]
        outside = F.relu(-images) + F.relu(images - 1)
        return torch.stack(terms).sum() + self._box * outside.square().mean()


def _weights(observed: dict[str, Tensor], exponent: float) -> dict[str, Tensor]:
    sizes = {name: g.flatten(1).square().sum(1) for name, g in observed.items()}
    total = torch.stack(list(sizes.values())).sum(0)
    raw = {name: torch.maximum(size, _NOISE * total) ** -exponent for name, size in sizes.items()}
    norm = torch.stack([raw[name] * sizes[name] for name in sizes]).sum(0)
    return {name: weight / norm for name, weight in raw.items()}


def _differentiable(observation: Observation) -> nn.Module:
    """A float64 copy in the client's mode; train-mode norms lose their statistics: vmap cannot write them."""
    model = copy.deepcopy(observation.model).double().train(observation.train_mode)
    for module in model.modules():
        if observation.train_mode and isinstance(module, nn.modules.batchnorm._NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model
