"""Gradient matching: how far the gradient of a dummy batch is from the observed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from fedkl.attacks.matching.masks import Mask, read_masks
from fedkl.attacks.matching.stacks import Stacks
from fedkl.attacks.memory import at_once, kept_for_backward
from fedkl.attacks.priors import Prior
from fedkl.attacks.probing import probe_of
from fedkl.protocol import InTurn, Observation, rescales
from fedkl.protocol.differentiable import (
    change_of,
    check_differentiable,
    differentiable_update,
    transformed,
)
from fedkl.protocol.per_example import clipped_sum
from fedkl.protocol.procedure import loss_of

Weighting = Literal["none", "sqrt", "full"]
Distance = Literal["relative", "cosine", "grnn"]
_Tensors = dict[str, Tensor]

_EXPONENT: dict[Weighting, float] = {"none": 0.0, "sqrt": 0.5, "full": 1.0}
# Gradients below this fraction of the whole (e.g. of a bias before a norm) are float32 rounding noise.
_NOISE = 1e-10
_WAYS, _COPIES = 8, 4  # of what a step keeps, and of a problem's tensors, at once


def check_matchable(observation: Observation) -> None:
    """Raises AttackError where an update cannot be differentiated; see `check_differentiable`."""
    check_differentiable(observation.local, attack="Gradient matching")


class GradientMatching:
    """The distance between gradients, for many observations of one kind at once.

    A point is an image batch; where labels are to be found too, then label logits; then the tensors that the
    observation leaves free (`Observation.free`), each flattened. Problem i depends on row i only.

    Of a single image, masks of dropout before fully connected layers are read off the gradient: see
    `read_masks`. Other dropout of modules is off, and at the true images the distance is not 0: masks that
    are drawn anew for every evaluation leave a line search nothing to follow.

    Args:
        observations: What the server has, one per problem, all of one kind.
        labels: Class indexes per observation; None: every point carries logits, through a softmax.
        distance: Between the dummy gradient d and the observed g, over their layers l.
            ``"relative"``: Σ w_l ‖d_l − g_l‖² / Σ w_l ‖g_l‖², 1 for a dummy gradient of zero (DLG).
            ``"cosine"``: 1 − Σ w_l ⟨d_l, g_l⟩ / √(Σ w_l ‖d_l‖² · Σ w_l ‖g_l‖²) (Inverting Gradients).
            ``"grnn"``: Δ + √Δ with Δ = Σ ‖d_l − g_l‖², not divided by anything.
        weighting: w_l = ‖g_l‖^(−2·exponent) with exponent 0 (``"none"``, the original), 0.5 (``"sqrt"``) or
            1 (``"full"``). Deep sigmoid networks in PyTorch's default initialization have gradients of such
            different sizes that the early layers, which hold the image, hardly count without it.
        largest: Only this many layers, those with the largest gradients, count; None: all.
        prior: Added to the distance, a function of the image batch; see priors.py.
        dtype: Of the computation. L-BFGS needs float64; first-order methods do with float32.

    Raises:
        AttackError: What the client does cannot be differentiated.
    """

    silences: ClassVar[bool] = True  # whether dropout is read, or off

    def __init__(
        self,
        observations: Sequence[Observation],
        *,
        labels: Sequence[Tensor] | None,
        distance: Distance = "relative",
        weighting: Weighting = "none",
        largest: int | None = None,
        prior: Prior | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        first = observations[0]
        check_matchable(first)
        self._first = first
        self._trained = first.trained
        self._batches = first.local.batches(first.batch_size)
        self._prior = prior
        self._distance = _DISTANCES[distance]
        self.shape = (first.batch_size, *first.image_shape)
        self.classes = first.classes
        self.dtype = dtype
        self._model = differentiable(first, dtype)
        masks = self._read_masks(observations) if self.silences else {}
        self._known, self._buffers = self._stacked_state(observations, masks)
        self._observed = Stacks(
            {name: [o.gradient[name] for o in observations] for name in sorted(first.gradient)}, dtype=dtype
        )
        self._weights = _weights(self._observed, _EXPONENT[weighting], largest)
        if distance == "relative":
            self._weights = _normalized(self._weights, self._observed)
        self._aside: _Tensors = {}  # of each problem, for the terms of subclasses
        self._labels = None if labels is None else torch.stack(list(labels)).to(self.device)

    def _read_masks(self, observations: Sequence[Observation]) -> dict[str, list[Tensor]]:
        """Puts what the updates show of dropout into the model, and switches off the rest.

        Returns:
            By the buffer's name, the mask of each problem.
        """
        _silence(self._model)
        each = [read_masks(observation) for observation in observations]
        shown = set.intersection(*(set(masks) for masks in each))
        for name in shown:
            self._model.set_submodule(name, Mask(each[0][name].to(self.dtype)))
        return {f"{name}.mask": [masks[name] for masks in each] for name in shown}

    def _stacked_state(
        self, observations: Sequence[Observation], masks: Mapping[str, Sequence[Tensor]]
    ) -> tuple[Stacks, Stacks]:
        """Parameters and secrets, and buffers; the model's own tensors become views into them."""
        own, generated = dict(self._model.named_parameters()), set(self._first.generated)
        each = {
            id(o.model): (dict(o.model.named_parameters()), dict(o.model.named_buffers()))
            for o in observations
        }
        known: dict[str, list[Tensor]] = {
            name: [each[id(o.model)][0][name] for o in observations] for name in own if name not in generated
        }
        known |= {name: [o.secrets[name] for o in observations] for name in self._first.secrets}
        buffers = {
            name: [each[id(o.model)][1][name] for o in observations]
            for name, _ in self._model.named_buffers()
            if name not in masks
        }
        parameters = Stacks(known, dtype=self.dtype)
        for name, parameter in own.items():
            if name in parameters:  # it is replaced in every call, and need not be held twice
                parameter.data = parameters.first(name)
        return parameters, Stacks(buffers | {name: list(of) for name, of in masks.items()}, dtype=self.dtype)

    @cached_property
    def _most(self) -> int:
        """Problems at once."""
        return at_once(self._bytes(), device=self.device)

    def _bytes(self) -> int:
        """Of one problem at a time, about: the way forward and back, and back through both, of every step."""
        epochs = sum(map(len, self._batches)) / self.shape[0]
        kept = kept_for_backward(self._model, torch.zeros(self.shape, dtype=self.dtype, device=self.device))
        held = sum(each.bytes_of_one for each in (self._known, self._buffers, self._observed))
        clipped = 0 if self._first.local.per_example is None else self.shape[0]  # a gradient for every image
        return int(_WAYS * epochs * kept) + _COPIES * (len(self._batches) + clipped) * held

    @property
    def device(self) -> torch.device:
        """Where points must be."""
        return self._observed.first(next(iter(self._observed))).device

    @property
    def dimension(self) -> int:
        """Length of a point."""
        return sum(self._lengths())

    def starts(self, generators: Sequence[torch.Generator]) -> Float[Tensor, "problems d"]:
        """Random points, one per generator: N(0, 1) images and logits, the server's guess for the rest."""
        pixels, logits, *_ = self._lengths()
        noise = [torch.randn(pixels + logits, generator=g, dtype=self.dtype) for g in generators]
        guesses = [self._known[name].flatten(1) for name in self._first.free]
        return torch.cat([torch.stack(noise).to(self.device), *guesses], 1)

    def images(self, points: Float[Tensor, "problems d"]) -> Float[Tensor, "problems b c h w"]:
        """The image part of points."""
        return points[:, : self._lengths()[0]].reshape(-1, *self.shape)

    def logits(self, points: Float[Tensor, "problems d"]) -> Float[Tensor, "problems b k"]:
        """The label part of points."""
        pixels, logits, *_ = self._lengths()
        return points[:, pixels : pixels + logits].reshape(-1, self.shape[0], self.classes)

    def __call__(self, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients at points, for the problems of these indexes; a problem may come twice."""
        parts = [
            self._evaluated(some, numbers)
            for some, numbers in zip(
                torch.split(points, self._most), torch.split(index, self._most), strict=True
            )
        ]
        values, gradients = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(gradients)

    def _evaluated(self, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of so many as fit into the memory at once."""
        known, buffers, observed = (held.at(index) for held in (self._known, self._buffers, self._observed))
        weights, aside = (
            {name: tensor[index] for name, tensor in tensors.items()}
            for tensors in (self._weights, self._aside)
        )
        # Where the point's own logits serve, a placeholder.
        targets = points.new_zeros(len(points)) if self._labels is None else self._labels[index]
        gradients, values = vmap(grad_and_value(self._value), randomness="different")(
            points, known, buffers, observed, weights, aside, targets
        )
        return values.detach(), gradients.detach()

    def _lengths(self) -> tuple[int, ...]:
        """Numbers in a point: pixels, logits, and each free tensor."""
        logits = 0 if self._labels is not None else self.shape[0] * self.classes
        free = [self._known.first(name).numel() for name in self._first.free]
        return torch.Size(self.shape).numel(), logits, *free

    def _value(
        self,
        point: Tensor,
        known: _Tensors,
        buffers: _Tensors,
        observed: _Tensors,
        weights: _Tensors,
        aside: _Tensors,
        target: Tensor,
    ) -> Tensor:
        pixels, logits, *free = torch.split(point, list(self._lengths()))
        images = pixels.reshape(self.shape)
        if self._labels is None:
            target = logits.reshape(self.shape[0], self.classes).softmax(1)
        tensors = known | {
            name: part.reshape(known[name].shape) for name, part in zip(self._first.free, free, strict=True)
        }
        dummy = self._update(images, target, tensors, buffers, observed)
        value = self._distance(dummy, observed, weights)
        if aside:
            value = value + self._forward_terms(images, tensors, buffers, aside)
        return value if self._prior is None else value + self._prior(images)

    def _forward_terms(self, images: Tensor, tensors: _Tensors, buffers: _Tensors, aside: _Tensors) -> Tensor:
        """What a subclass that fills `_aside` adds to the distance, from the way forward."""
        raise NotImplementedError

    def _update(
        self,
        images: Tensor,
        target: Tensor,
        tensors: _Tensors,
        buffers: _Tensors,
        observed: _Tensors,
    ) -> _Tensors:
        """What a client with these images sends, of what is observed."""
        local, names = self._first.local, sorted(self._first.gradient)

        def gradient(part: _Tensors, batch: Tensor) -> _Tensors:
            whole = local.is_gradient  # indexing would only cost time
            x, y = (images, target) if whole else (images[batch], target[batch])
            if local.per_example is None:
                return self._gradient(part, x, y, tensors, buffers)
            return self._clipped(part, x, y, tensors, buffers, clip=local.per_example.clip)

        update = differentiable_update(
            local,
            batches=self._batches,
            trained={name: tensors[name] for name in (names if local.is_gradient else self._trained)},
            observed=names,
            private=self._first.unsent,
            gradient=gradient,
        )
        transform = self._first.transform
        if transform is None:
            return update
        seen = change_of(observed, procedure=local)
        changed = transformed(update, lambda change: transform(change, seen), procedure=local)
        return _rescaled(changed, observed) if self._open_factor else changed

    @property
    def _open_factor(self) -> bool:
        """Whether a factor depends on more than what is matched.

        That is on running statistics, which are sent with weights; or on noise, which was there before it.
        """
        seen = self._first
        if not rescales(seen.transform):
            return False
        sent = seen.train_mode and seen.local.algorithm == "fedavg"
        statistics = sent and any(tensor.is_floating_point() for tensor in seen.model.buffers())
        noisy = seen.local.per_example is not None and seen.local.per_example.noise_multiplier > 0
        return statistics or noisy or (isinstance(seen.transform, InTurn) and seen.transform.after_noise)

    def _clipped(
        self,
        of: _Tensors,
        images: Tensor,
        target: Tensor,
        tensors: _Tensors,
        buffers: _Tensors,
        *,
        clip: float,
    ) -> _Tensors:
        """The mean of gradients that are clipped one by one, over a batch's expected size.

        The client's noise has mean 0: its expectation is what is matched.
        """
        samples, local = self._first.batch_size, self._first.local

        def one(x: Tensor, y: Tensor) -> tuple[_Tensors, Tensor]:
            return self._gradient(of, x, y, tensors, buffers), x.new_zeros(())  # its loss is not needed

        total, _ = clipped_sum(one, images, target, clip=clip, like=of)
        expected = samples * local.sampling_rate(samples)
        return {name: tensor / expected for name, tensor in total.items()}

    def _gradient(
        self, of: _Tensors, images: Tensor, target: Tensor, tensors: _Tensors, buffers: _Tensors
    ) -> _Tensors:
        def loss(part: _Tensors) -> Tensor:
            state = tensors | part
            generated = self._first.generate(state) if self._first.generate is not None else {}
            own = {name: tensor for name, tensor in state.items() if name not in self._first.secrets}
            return loss_of(functional_call(self._model, {**own, **generated, **buffers}, (images,)), target)

        gradient: _Tensors = grad(loss)(of)
        return gradient


def _rescaled(dummy: _Tensors, observed: _Tensors) -> _Tensors:
    """Times the factor of least squares; as no factor is negative, of its size where they point apart."""
    product = torch.stack([(dummy[name] * observed[name]).sum() for name in observed]).sum()
    square = torch.stack([dummy[name].square().sum() for name in observed]).sum()
    factor = product.abs() / square.clamp_min(torch.finfo(square.dtype).tiny)
    return {name: factor * tensor for name, tensor in dummy.items()}


def _relative(dummy: _Tensors, observed: _Tensors, weights: _Tensors) -> Tensor:
    terms = [weights[name] * (dummy[name] - observed[name]).square().sum() for name in observed]
    return torch.stack(terms).sum()  # the weights are divided already


def _cosine(dummy: _Tensors, observed: _Tensors, weights: _Tensors) -> Tensor:
    """1 − cos as ½‖d/‖d‖ − g/‖g‖‖², which near 0 does not lose its digits to a difference from 1."""

    def size(tensors: _Tensors) -> Tensor:
        return torch.stack([weights[name] * tensors[name].square().sum() for name in observed]).sum().sqrt()

    d, g = size(dummy), size(observed)
    terms = [weights[name] * (dummy[name] / d - observed[name] / g).square().sum() for name in observed]
    return torch.stack(terms).sum() / 2


def _grnn(dummy: _Tensors, observed: _Tensors, weights: _Tensors) -> Tensor:
    terms = [weights[name] * (dummy[name] - observed[name]).square().sum() for name in observed]
    squared = torch.stack(terms).sum()
    # The derivative of a root is infinite at zero: where the gradient fits exactly, there is nothing to gain.
    return squared + (squared + torch.finfo(squared.dtype).tiny).sqrt()


_DISTANCES: dict[Distance, Callable[[_Tensors, _Tensors, _Tensors], Tensor]] = {
    "relative": _relative,
    "cosine": _cosine,
    "grnn": _grnn,
}


def _weights(observed: Mapping[str, Tensor], exponent: float, largest: int | None) -> _Tensors:
    names = list(observed)
    sizes = torch.stack([observed[name].flatten(1).square().sum(1) for name in names], 1)
    raw = torch.maximum(sizes, _NOISE * sizes.sum(1, keepdim=True)) ** -exponent
    if largest is not None and largest < len(names):
        chosen = sizes.topk(largest, dim=1).indices
        raw = raw * torch.zeros_like(raw).scatter(1, chosen, 1.0)
    return {name: raw[:, column] for column, name in enumerate(names)}


def _normalized(weights: _Tensors, observed: Mapping[str, Tensor]) -> _Tensors:
    """Weights with which the observed gradient has size 1."""
    size = torch.stack([weights[name] * observed[name].flatten(1).square().sum(1) for name in observed]).sum(
        0
    )
    return {name: weight / size for name, weight in weights.items()}


def differentiable(observation: Observation, dtype: torch.dtype) -> nn.Module:
    """A copy in the client's mode; train-mode norms lose their statistics: vmap cannot write them."""
    model = probe_of(observation.model, train_mode=observation.train_mode).to(dtype)
    for module in model.modules():
        if observation.train_mode and isinstance(module, nn.modules.batchnorm._NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


def _silence(model: nn.Module) -> None:
    """Switches dropout off, wherever modules do it."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
