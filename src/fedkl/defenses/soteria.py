"""Soteria: the gradient of one linear layer, pruned where its inputs say most of the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedkl.defenses.base import register_defense
from fedkl.defenses.changing import Draws, UpdateDefense
from fedkl.errors import ConfigError, shown
from fedkl.locking import copied
from fedkl.protocol import Rescaling, Sending, Transform
from fedkl.protocol.differentiable import plain_attention
from fedkl.types import NamedTensors

_IMAGES = 32  # the mask is of so many of the client's images at most
_AT_ONCE = 16  # features that are differentiated together
_TINY = 1e-12
_RARE = 14.0  # a column of noise is taken for more with a probability of exp(-14) at most


@register_defense
@dataclass(frozen=True, kw_only=True)
class Soteria(UpdateDefense):
    """Clients prune columns of one linear layer's weight gradient, those that say most of the image.

    With r the layer's inputs and X an image, the columns of the features i with the smallest
    Σ ‖∂r_i/∂X‖ / |r_i| are set to zero, summed over the batch: there is one mask for it. A feature that is
    zero for an image counts as 0, and its column is zero anyway. The rest of the update is sent as it is.

    ‖∂r_i/∂X‖ is exact where the layer has at most `probes` inputs, one row of them per image; otherwise the
    root mean square of so many random directional derivatives, whose relative standard error is
    1 / √(2 `probes`): 9 % with 64.

    The server sees which columns are zero. One that knows the defense ignores these: the other columns, the
    bias and all other layers are what they were.

    Attributes:
        layer: Name of the linear layer; None: the last but one, or the only one.
        percentile: How much is pruned, in percent of the features, in [0, 100].
        probes: How many derivatives are taken at most.

    Source:
        Sun et al. 2021 (CVPR), section 4, perturbs the features of the largest |r_i| · ‖∂r_i/∂X‖⁻¹. Its code
        divides as here; it adds 0.1 to r_i for one of its attacks, nothing for the other, as here.
        Deviations: the network is in eval mode. Where weights are sent, the mask of the received network is
        applied to the change; theirs is applied to every step. Of more than 32 images, the mask is that of
        the first 32. Their networks have one linear layer; Balunović et al. 2022 (ICLR), "Bayesian framework
        for gradient leakage", defend the last but one, and reconstruct the images without it.
    """

    unaware: ClassVar[str] = "unknown to the server"
    type: Literal["soteria"] = "soteria"
    layer: str | None = None
    percentile: float = 80.0
    probes: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100 or self.probes < 1:
            got = f"{self.percentile} and {self.probes}"
            raise ConfigError(f"Soteria: expected a percentile in [0, 100] and probes ≥ 1, got {got}.")

    @property
    def looks_at_images(self) -> bool:
        """For what is pruned."""
        return True

    def changed(self, change: NamedTensors, *, draws: Draws, client: Sending) -> NamedTensors:
        """Sets the pruned columns to zero.

        Raises:
            ConfigError: The network has no such layer, never calls it, or its weight is not in the change;
                or the network or the images are not at hand.
        """
        if client.network is None or client.sample is None:
            raise ConfigError(
                "Soteria: expected the client's network and images at hand, which say what is pruned, got "
                "neither. In Flower, give them to the mod: TransformMod(defense, network=…, sample=…)."
            )
        layer = self._defended(client.network)
        weight = f"{layer}.weight"
        if weight not in change:
            raise ConfigError(
                f"Soteria: expected {shown(weight)} to be sent under a name of its own, it is not: it is "
                "frozen, private or tied. Choose another layer."
            )
        images, _ = client.sample(_IMAGES)
        features = _inputs_of(client.network, layer, received=client.received)
        score = _scores(features, images, probes=self.probes, draws=draws)
        return {**change, weight: change[weight] * _kept(score, self.percentile).to(change[weight])}

    @property
    def public_transform(self) -> Transform:
        """Prunes what was seen to be pruned."""
        return SeenColumns(self.layer)

    def transform_under_noise(self, deviation: float) -> Transform:
        """Prunes columns that are no longer than the noise makes them: these say nothing, pruned or not."""
        return SeenColumns(self.layer, noise=deviation)

    def describe(self) -> str:
        """Where, and how much."""
        where = "the last but one linear layer" if self.layer is None else self.layer
        return f"{self.type} ({self.percentile:g} % of {where})"

    def _defended(self, network: nn.Module) -> str:
        linear = _linear(network)
        layer = linear[-2:][0] if self.layer is None and linear else self.layer
        if layer in linear:
            return str(layer)
        known = ", ".join(linear) or "none"
        raise ConfigError(
            f"Soteria: expected the name of a linear layer, got {shown(str(self.layer))}. There are: {known}."
        )


@dataclass(frozen=True)
class SeenColumns(Rescaling):
    """Ignores columns of the defended weight that are seen to be zero, or noise; all else is as it was.

    Attributes:
        layer: The layer's name; None: the last but one linear layer. Which that is, names do not say: of any
            matrix, such columns say nothing.
        noise: Standard deviation of what was added to every entry since.
    """

    layer: str | None
    noise: float = 0.0

    def __call__(self, change: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The change, without these columns."""
        return {
            name: tensor * self._told(observed[name])
            if (tensor.ndim == 2 if self.layer is None else name == f"{self.layer}.weight")
            else tensor
            for name, tensor in change.items()
        }

    def _told(self, observed: Tensor) -> Tensor:
        """The columns with more in them than noise; the bound: Laurent and Massart 2000, lemma 1."""
        share = _RARE / max(1, len(observed))
        most = self.noise**2 * (1 + 2 * math.sqrt(share) + 2 * share)
        return observed.square().mean(0) > most if self.noise else observed.ne(0).any(0)

    def altered(self, model: nn.Module) -> Collection[str]:
        """The defended weight."""
        names = _linear(model)[-2:][:1] if self.layer is None else [self.layer]
        return [f"{name}.weight" for name in names]


def _linear(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


_Features = Callable[[Tensor], Tensor]


def _inputs_of(network: nn.Module, layer: str, *, received: Mapping[str, Tensor]) -> _Features:
    """What a layer gets, as a function of the images, of the network as it was received."""
    probe, caught = copied(network, subject="Soteria", error=ConfigError), list[Tensor]()
    probe.eval()
    probe.get_submodule(layer).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    own = {**dict(probe.named_parameters()), **dict(probe.named_buffers())}
    tensors = {name: received.get(name, tensor).to(tensor).detach() for name, tensor in own.items()}

    def features(images: Tensor) -> Tensor:
        caught.clear()
        torch.func.functional_call(probe, tensors, (images,))
        if not caught:
            raise ConfigError(f"Soteria: the network never calls {shown(layer)}. Choose another layer.")
        return caught[0]

    return features


def _scores(features: _Features, images: Tensor, *, probes: int, draws: Draws) -> Float[Tensor, " features"]:
    """Σ ‖∂r_i/∂X‖ / |r_i| over the images."""
    with torch.no_grad():
        representation = features(images).detach()
    exact = representation.ndim == 2 and representation.shape[-1] <= probes
    sizes = _row_norms(features, images) if exact else _probed(features, images, probes=probes, draws=draws)
    return (sizes / representation.abs().clamp_min(_TINY)).flatten(0, -2).sum(0)


def _row_norms(features: _Features, images: Tensor) -> Float[Tensor, "images features"]:
    representation, pullback = torch.func.vjp(features, images)  # type: ignore[misc]

    def row_norms(feature: Tensor) -> Tensor:
        (slopes,) = pullback(feature.expand_as(representation))
        norms: Tensor = slopes.flatten(1).norm(dim=1)
        return norms

    each = torch.eye(representation.shape[1], dtype=representation.dtype, device=representation.device)
    return torch.vmap(row_norms, chunk_size=_AT_ONCE)(each).T


def _probed(
    features: _Features, images: Tensor, *, probes: int, draws: Draws
) -> Float[Tensor, "images *rows features"]:
    """E (J u)_i² = ‖J_i‖² for normal u; images do not see each other in eval mode."""
    with plain_attention():
        squares = [
            torch.func.jvp(features, (images,), (draws.normal(images),))[1].square() for _ in range(probes)
        ]
    return torch.stack(squares).mean(0).sqrt()


def _kept(score: Float[Tensor, " features"], percentile: float) -> Bool[Tensor, " features"]:
    return score >= torch.quantile(score, percentile / 100)
