"""The first fully connected layer: what its gradient says of each image, and the images from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkl.attacks.algebraic.feature_inversion import FeatureInversion, invert, own_data
from fedkl.attacks.algebraic.pixels import PixelLayer, pixel_layers
from fedkl.attacks.algebraic.sgd import rounding, sum_of_gradients
from fedkl.attacks.base import Reconstruction
from fedkl.attacks.labels import known_labels
from fedkl.attacks.parallel import Progress
from fedkl.attacks.probing import as_taken, probe_of
from fedkl.errors import AttackError
from fedkl.protocol import Observation


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstLinear:
    """A linear layer with a bias that gets one row per image.

    Attributes:
        name: Its qualified name.
        pixels: How its inputs are the pixels; None: they are features of them.
    """

    name: str
    pixels: PixelLayer | None = field(repr=False)

    def gradient(self, observation: Observation) -> Float[Tensor, "outputs inputs_and_1"]:
        """Σ δ (x, 1)ᵀ over the images: the weight's gradient and, as last column, the bias's."""
        weight, bias = (sum_of_gradients(observation, f"{self.name}.{part}") for part in ("weight", "bias"))
        return torch.cat([weight, bias[:, None]], 1)

    def error(self, observation: Observation) -> float:
        """Float32's errors in `gradient`, as a Frobenius norm."""
        return sum(rounding(observation, f"{self.name}.{part}") for part in ("weight", "bias"))


def first_linear(observation: Observation, *, attack: str) -> FirstLinear:
    """The one that gets the image; where there is none, the first behind convolutions.

    Raises:
        AttackError: There is none whose gradient was observed; or it is behind convolutions, and images
            cannot be found from what it got.
    """
    seen = observation.gradient.keys()

    def observed(name: str) -> bool:
        return {f"{name}.weight", f"{name}.bias"} <= seen

    for layer in pixel_layers(observation):
        if len(layer.pixels) == 1 and observed(layer.name):
            return FirstLinear(name=layer.name, pixels=layer)
    names = [name for name in _row_by_row(observation) if observed(name)]
    if not names:
        raise AttackError(
            f"{attack}: expected a fully connected layer with a bias that gets one row per image, and the "
            "gradient of both, got none. Use the attack positions for transformers, closed-form or ig else."
        )
    _check_features(observation, names[0], attack=attack)
    return FirstLinear(name=names[0], pixels=None)


def _check_features(observation: Observation, name: str, *, attack: str) -> None:
    mixing = observation.train_mode and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in observation.model.modules()
    )
    if observation.free or (mixing and observation.batch_size > 1):
        raise AttackError(
            f"{attack}: '{name}' gets features of the image, which are inverted one by one: expected no "
            "batch statistics of several images, and no free parameters. Use the attack feature-inversion."
        )
    own_data(observation, attack=attack)


def _row_by_row(observation: Observation) -> list[str]:
    """Names of linear layers that are called once, with one row for an image, in the order of the run."""
    model, rows = probe_of(observation.model), list[tuple[str, bool]]()

    def noting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, args: rows.append(
            (name, bool(args) and args[0].dim() == 2 and len(args[0]) == 1)
        )

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(noting(name))
    with torch.no_grad():
        model(as_taken(model, torch.zeros(1, *observation.image_shape)))
    called = [name for name, _ in rows]
    return [name for name, fits in rows if fits and called.count(name) == 1]


def reconstructions(
    observations: Sequence[Observation],
    inputs: Sequence[Float[Tensor, "found inputs"]],
    *,
    losses: Sequence[float],
    layer: FirstLinear,
    evaluations: int,
    on_evaluation: Progress,
) -> list[Reconstruction]:
    """Images from what the layer got; NaN for those that were not found.

    Args:
        observations: Of one kind.
        inputs: For each, of so many images as were found.
        losses: What is reported as such, for each.
        layer: Whose inputs.
        evaluations: What is reported as such.
        on_evaluation: Told of the way from features to images.
    """
    images = _images(observations, inputs, layer, on_evaluation)
    found = []
    for observation, own, loss in zip(observations, images, losses, strict=True):
        batch = torch.full((observation.batch_size, *observation.image_shape), torch.nan)
        batch[: len(own)] = own
        single = observation.batch_size == 1 and observation.labels is None
        found.append(
            Reconstruction(
                images=batch,
                labels=_label(observation) if single else observation.labels if len(batch) == 1 else None,
                scaling="clip",
                loss=loss,
                evaluations=evaluations,
                start=0,
            )
        )
    return found


def unexplained(
    gradient: Float[Tensor, "outputs inputs_and_1"], inputs: Float[Tensor, "found inputs"]
) -> float:
    """The share of Σ δ (x, 1)ᵀ, squared, outside the span of some (x, 1): 1 where there are none."""
    rows = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    basis = torch.linalg.qr(rows.T).Q
    outside = gradient - gradient @ basis @ basis.T
    return float(outside.square().sum() / gradient.square().sum())


def _images(
    observations: Sequence[Observation],
    inputs: Sequence[Tensor],
    layer: FirstLinear,
    on_evaluation: Progress,
) -> list[Tensor]:
    shape = observations[0].image_shape
    if layer.pixels is not None:
        return [layer.pixels.values(rows[:, None]).reshape(-1, *shape).float() for rows in inputs]
    each = [(o, row[None]) for o, rows in zip(observations, inputs, strict=True) for row in rows.float()]
    if not each:
        return [torch.empty(0, *shape) for _ in inputs]
    read = [{layer.name: row / row.norm()} for _, row in each]
    got = invert([o for o, _ in each], read, attack=FeatureInversion(), on_evaluation=on_evaluation)
    flat = torch.cat([image for image, _ in got])
    return list(torch.split(flat, [len(rows) for rows in inputs]))


def _label(observation: Observation) -> Tensor | None:
    try:
        return known_labels([observation])[0]
    except AttackError:  # the head's gradient is not seen
        return None
