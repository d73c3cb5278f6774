"""Vision transformers: the gradient of the positions gives each token's δ, and the image with it.

A token is z_t = W x_t + b + p_t, of patch x_t and position p_t. With δ_t = ∂L/∂z_t,

    ∂L/∂p_t = δ_t    and    ∂L/∂W = Σ_t δ_t x_tᵀ :

linear equations for the patches, whatever stands behind. Each LayerNorm takes the mean out of δ_t, so that δ
has at most rank D - 1 for tokens of D numbers: with fewer patches than D all of them follow. Else, and where
float32 leaves nothing of a weak direction, directions over the patches are free, and the image is taken that
is smoothest: least squared differences between neighboring pixels, across the patches' borders too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.attacks.algebraic.pixels import PixelLayer, pixel_layers
from fedkl.attacks.algebraic.sgd import check_sgd, rounding, sum_of_gradients
from fedkl.attacks.base import Attack, Needs, Reconstruction, register_attack
from fedkl.attacks.labels import known_labels
from fedkl.attacks.parallel import Progress
from fedkl.attacks.probing import as_taken, probe_of
from fedkl.errors import AttackError
from fedkl.protocol import Observation
from fedkl.types import Labels

_CLASS_TOKENS = 8  # at most, and registers and the like
_CERTAIN = 10.0  # times float32's errors: what a direction must have to be taken from the equations
_RIDGE = 1e-3  # pull to middle gray, relative to neighbors' pull: it makes the smoothest image unique
_STEPS = 500
_CLOSE = 1e-10


@register_attack
@dataclass(frozen=True, kw_only=True)
class Positions(Attack):
    """Patches of one image, from the gradients of the position embedding and of the patch projection.

    Both are found by shape: a linear layer or a convolution whose stride is its kernel on the image's pixels
    (public normalization may stand before it), and a learned position for every patch, those of class tokens
    before them. It accepts one image's gradient, or its weights after steps of SGD. `Reconstruction.loss` is
    the squared relative distance of the found image's gradient from the observed one, at the best scale:
    0 where the image explains the update, 1 where it explains nothing, between them after several steps.

    Source:
        Lu et al. 2022 (APRIL, CVPR, arXiv 2112.14087). They solve for the tokens from the gradients of the
        first block's attention, where no LayerNorm stands before it, and invert the projection; else they
        match gradients, with the positions' as a further term. Here the projection's own gradient stands in
        for the attention's, norms may stand anywhere, and what they take from the rank is filled in.
    """

    title: ClassVar[str] = "positions"
    reads_unaltered: ClassVar[bool] = True
    type: Literal["positions"] = "positions"

    @property
    def needs(self) -> Needs:
        """The positions' gradient sums δ over the images of a batch."""
        return Needs(batch=1)

    def _check(self, observation: Observation) -> None:
        check_sgd(observation, attack="Positions")
        _layers(observation)

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        layer, positions = _layers(observations[0])
        found = []
        for number, observation in enumerate(observations, start=1):
            values = _image(observation, layer, positions)
            images = values.reshape(1, *observation.image_shape).float()
            labels = _labels(observation)
            found.append(
                Reconstruction(
                    images=images,
                    labels=labels,
                    scaling="clip",
                    loss=_distance(observation, images, labels),
                    evaluations=1,
                    start=0,
                )
            )
            on_evaluation(number, len(observations) - number)
        return found


def _layers(observation: Observation) -> tuple[PixelLayer, str]:
    """The patch projection, and the name of the position embedding.

    Raises:
        AttackError: There is none whose gradient was observed.
    """
    parameters = dict(observation.model.named_parameters())
    for layer in pixel_layers(observation):
        patches, weight = len(layer.pixels), f"{layer.name}.weight"
        if patches == 1 or weight not in observation.gradient:
            continue
        for name, most in _embeddings(observation.model, patches).items():
            tokens, features = parameters[name].flatten(0, -2).shape
            sent = name in observation.gradient
            if sent and patches <= tokens <= most and features == len(parameters[weight]):
                return layer, name
    raise AttackError(
        "Positions: expected a vision transformer (patches of the image side by side through a linear layer "
        "or convolution, a learned position added to each) and the gradients of both, got another. Use the "
        "attack feature-inversion or ig."
    )


def _embeddings(model: nn.Module, patches: int) -> dict[str, float]:
    """Parameters that may be positions, the likelier first, and how many tokens each has at most.

    Those of shape ``(1, tokens, features)`` and the tables of embeddings; then those of any other shape that
    are no layer's weight. They may be an attention's, so they have about as many tokens as there are patches.
    """
    tables = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    shapes = {name: p.shape for name, p in model.named_parameters() if p.dim() > 1}
    usual = sorted(name for name, s in shapes.items() if name in tables or (len(s) == 3 and s[0] == 1))
    layers = {f"{name}.weight" for name, _ in model.named_modules()}
    free = sorted(shapes.keys() - usual - layers)
    others = dict.fromkeys(free, float(patches + _CLASS_TOKENS))
    return dict.fromkeys(usual, math.inf) | others


def _image(observation: Observation, layer: PixelLayer, positions: str) -> Float[Tensor, " values"]:
    patches, weight = len(layer.pixels), f"{layer.name}.weight"
    # Class tokens and the like come first.
    slopes = sum_of_gradients(observation, positions).flatten(0, -2)[-patches:]
    gradient = sum_of_gradients(observation, weight).flatten(1)
    left, size, right = torch.linalg.svd(slopes)
    error = rounding(observation, positions)
    known = int((size > _CERTAIN * error).sum())
    inputs = left[:, :known] @ (right[:known] @ gradient / size[:known, None])
    return _smoothest(inputs, left[:, known:], layer, observation.image_shape)


def _smoothest(
    inputs: Float[Tensor, "patches inputs"],
    free: Float[Tensor, "patches directions"],
    layer: PixelLayer,
    shape: tuple[int, int, int],
) -> Float[Tensor, " values"]:
    """The smoothest image among inputs + free c, for any c, by conjugate gradients.

    Args:
        inputs: Of the layer, as far as they are known.
        free: Orthonormal.
        layer: Says what pixels they are.
        shape: Of the image.
    """
    values = layer.values(inputs)
    if not free.shape[1]:
        return values
    zero = layer.values(torch.zeros_like(inputs))

    def image(c: Tensor) -> Tensor:
        return layer.values(free @ c) - zero

    def pull(flat: Tensor) -> Tensor:
        forces = (_roughness(flat.reshape(shape)) + _RIDGE * flat.reshape(shape)).flatten()
        return free.T @ (forces[layer.pixels] / layer.scale)

    c = torch.zeros(free.shape[1], inputs.shape[1], dtype=inputs.dtype)
    residual = -pull(values - 0.5)
    direction, size = residual, residual.square().sum()
    enough = _CLOSE**2 * size
    for _ in range(_STEPS):
        if size <= enough:
            break
        force = pull(image(direction))
        step = size / (direction * force).sum()
        c, residual = c + step * direction, residual - step * force
        size, before = residual.square().sum(), size
        direction = residual + size / before * direction
    return values + image(c)


def _roughness(image: Float[Tensor, "channels height width"]) -> Float[Tensor, "channels height width"]:
    """Gradient of ½ Σ (differences between neighbors)²."""
    padded = F.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    return 4 * image - around


def _labels(observation: Observation) -> Labels | None:
    try:
        return known_labels([observation])[0]
    except AttackError:  # the head's gradient is not seen
        return None


def _distance(observation: Observation, images: Tensor, labels: Labels | None) -> float:
    """1 - cos² between the gradients; without a label, of the one that fits best."""
    model = probe_of(observation.model, train_mode=observation.train_mode)
    own = dict(model.named_parameters())
    names = sorted(observation.gradient.keys() & own)
    parameters = [own[name] for name in names]
    observed = torch.cat([sum_of_gradients(observation, name).flatten() for name in names])
    scores = model(as_taken(model, images))
    candidates = torch.arange(observation.classes)[:, None] if labels is None else labels[None]
    distances = []
    for label in candidates:
        loss = F.cross_entropy(scores, label.to(scores.device))
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        flat = torch.cat([part.flatten().cpu().double() for part in gradients])
        distances.append(1 - float((F.normalize(flat, dim=0) @ F.normalize(observed, dim=0)).square()))
    return min(distances)
