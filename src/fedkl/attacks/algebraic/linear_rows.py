"""The input of a fully connected layer, read off one row of its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedkl.attacks.base import Attack, Needs, Reconstruction, register_attack
from fedkl.attacks.labels import known_labels
from fedkl.attacks.parallel import Progress
from fedkl.errors import AttackError
from fedkl.protocol import Observation


@register_attack
@dataclass(frozen=True, kw_only=True)
class LinearRows(Attack):
    """Divides a row of ∂L/∂W by its entry of ∂L/∂b: for one image that is the layer's input, exactly.

    With u = W x + b and δ = ∂L/∂u, ∂L/∂W = δ xᵀ and ∂L/∂b = δ. The row with the largest |δ| is taken, for the
    least rounding. It needs a network that gives the image itself to a fully connected layer with a bias, as
    a perceptron does; nothing behind that layer matters.

    Source:
        Phong et al. 2017, "Privacy-preserving deep learning via additively homomorphic encryption".
    """

    title: ClassVar[str] = "rows of a linear layer"
    type: Literal["linear-rows"] = "linear-rows"

    @property
    def needs(self) -> Needs:
        """Rows of several images are mixtures of them."""
        return Needs(batch=1)

    def _check(self, observation: Observation) -> None:
        _layer(observation)
        if not observation.local.is_gradient or observation.transform is not None:
            raise AttackError(
                "LinearRows: expected the gradient of one step as it is, got several steps or a transformed "
                "update. Use the attack learned."
            )

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        return [
            Reconstruction(
                images=_input(observation).reshape(1, *observation.image_shape).float(),
                labels=observation.labels if observation.labels is None else known_labels([observation])[0],
                scaling="clip",
                loss=0.0,
                evaluations=0,
                start=0,
            )
            for observation in observations
        ]


def _layer(observation: Observation) -> str:
    """The name of the layer that sees the image.

    Raises:
        AttackError: There is none whose gradient was observed.
    """
    size = math.prod(observation.image_shape)
    for name, module in observation.model.named_modules():
        if next(module.children(), None) is None and next(module.parameters(), None) is not None:
            seen = {f"{name}.weight", f"{name}.bias"} <= observation.gradient.keys()
            if isinstance(module, nn.Linear) and module.in_features == size and seen:
                return str(name)
            break
    raise AttackError(
        f"LinearRows: expected a network whose first layer is fully connected with {size} inputs and a bias, "
        "and its gradient, got another. Use the attack closed-form for convolutions."
    )


def _input(observation: Observation) -> Tensor:
    name = _layer(observation)
    weight, bias = (observation.gradient[f"{name}.{part}"].double() for part in ("weight", "bias"))
    row = int(bias.abs().argmax())
    return weight[row] / bias[row]
