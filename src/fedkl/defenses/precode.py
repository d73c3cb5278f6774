"""PRECODE: a variational bottleneck in front of the classifier, whose noise runs through the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import rng
from fedkl.defenses.base import Defense, register_defense
from fedkl.defenses.server_view import ServerView
from fedkl.errors import ConfigError
from fedkl.keys import Key
from fedkl.locking import Split, copied
from fedkl.protocol import Knowledge

NAME = "bottleneck"
"""What the module is called inside the linear layer that it stands before."""

_EXACT = 1e-2  # relative; the rounding of weights after a step of 0.001 is up to here, two images are above


@register_defense
@dataclass(frozen=True, kw_only=True)
class PRECODE(Defense):
    """The network gets a variational bottleneck before its last linear layer; all of it is public.

    z = μ + σ ⊙ ε with (μ, σ) from a linear encoder of the features and ε ~ N(0, 1) anew in every pass; a
    linear decoder gives the features back. The loss gets β KL(N(μ, σ²) ‖ N(0, 1)) in bits, by the gradient
    only, so that whatever loss a client has, it need not know; see `Bottleneck`.

    The claim is that an attack that matches gradients never meets the ε of the client. But the gradient of a
    linear layer is δ rᵀ, and that of its bias δ: of one image and one step the server reads z, and the
    features that gave μ and σ, and has ε = (z − μ) / σ. Of more images it takes z = μ. What comes before the
    bottleneck gets the noise through δ only: attacks that divide by δ (rows of a linear layer) do not notice.

    Nothing is changed in what is sent. For Flower, or a loop of one's own: ``with_bottleneck(model)`` in
    place of the model, on all clients and on the server.

    Attributes:
        size: K, the length of z.
        beta: β, of the KL term.

    Source:
        Scheliga et al. 2022 (WACV), section 3, and its public code: σ = softplus, K = 256, β = 1e-3.
        Deviations: ε is drawn in eval mode too, where a gradient is taken, since audited clients may train
        so; the bottleneck starts from the same weights for all clients, as `torch.nn.Linear` draws them, from
        a fixed seed. ε comes from PyTorch's global generator, as theirs: who knows its seed knows ε.
        Attackers that know the defense: Balunović et al. 2022 (ICLR) read the image off the first linear
        layer; Scheliga et al. 2022 (arXiv 2208.04767) leave the random gradients out. Reading ε is ours.
    """

    unaware: ClassVar[str] = "the server draws noise too"
    type: Literal["precode"] = "precode"
    size: int = 256
    beta: float = 1e-3

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.beta < math.inf:
            got = f"{self.size} and {self.beta}"
            raise ConfigError(f"PRECODE: expected a size ≥ 1 and a finite beta ≥ 0, got {got}.")

    @property
    def changes_network(self) -> bool:
        """It does, and hides nothing."""
        return True

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """Extends a copy of the model; nothing is private.

        Raises:
            ConfigError: It has no linear layer, or has a bottleneck.
        """
        return Split(with_bottleneck(model, size=self.size, beta=self.beta))

    def server_view(
        self,
        victim: Split,
        model: nn.Module,
        *,
        granted: Knowledge,
        generator: torch.Generator | None = None,
    ) -> ServerView:
        """The network at z = μ; as it is for a server that does not know of the defense."""
        view = super().server_view(victim, model, granted=granted, generator=generator)
        if granted.defense:
            for bottleneck in _bottlenecks(view.model).values():
                bottleneck.noise = torch.zeros_like(bottleneck.encoder.bias[: self.size])
        return view

    def informed(self, model: nn.Module, seen: Mapping[str, Tensor]) -> nn.Module:
        """With the ε of the client, where the update is of one image and one step."""
        for name, bottleneck in _bottlenecks(model).items():
            features, latent = (_input_of(f"{name}.{layer}", seen) for layer in ("encoder", "decoder"))
            if features is not None and latent is not None:
                mean, deviation = bottleneck.statistics(features[None])
                bottleneck.noise = ((latent - mean[0]) / deviation[0]).detach()
        return model

    def describe(self) -> str:
        """How large, and β."""
        return f"{self.type} (size {self.size}, beta {self.beta:g})"


def with_bottleneck(model: nn.Module, *, size: int = 256, beta: float = 1e-3) -> nn.Module:
    """A copy of a model with a bottleneck before its last linear layer; names of its tensors stay.

    Args:
        model: Not changed.
        size: Length of z.
        beta: Of the KL term.

    Raises:
        ConfigError: It has no linear layer, or has a bottleneck.

    >>> model = with_bottleneck(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), size=3)
    >>> sorted(model.state_dict())[:3]
    ['1.bias', '1.bottleneck.decoder.bias', '1.bottleneck.decoder.weight']
    """
    extended = copied(model, subject="PRECODE", error=ConfigError)
    linear = [module for module in extended.modules() if isinstance(module, nn.Linear)]
    if not linear or any(isinstance(module, Bottleneck) for module in extended.modules()):
        got = "one that has a bottleneck" if linear else "one without"
        raise ConfigError(f"PRECODE: expected a plain model with a linear layer, got {got}.")
    head = linear[-1]
    bottleneck = Bottleneck(head.in_features, size=size, beta=beta)
    head.add_module(NAME, bottleneck.to(head.weight))
    head.register_forward_pre_hook(_before)
    return extended


def _bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Bottleneck)}


def _input_of(layer: str, seen: Mapping[str, Tensor]) -> Tensor | None:
    """What a linear layer got, r, if its gradient is δ rᵀ and its bias's δ; else None."""
    weight, bias = (seen.get(f"{layer}.{part}") for part in ("weight", "bias"))
    if weight is None or bias is None:
        return None
    found = weight.T @ bias / bias.square().sum()
    fits = torch.dist(torch.outer(bias, found), weight) < _EXACT * weight.norm()
    return found if bool(fits) else None


def _before(head: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    given: Tensor = head.get_submodule(NAME)(args[0])
    return given


class Bottleneck(nn.Module):
    """Features in, features out: D(μ + σ ⊙ ε) with (μ, σ) = E(features), E and D linear.

    ε is drawn where a gradient can be taken or in train mode; an evaluation (eval mode and no gradient) has
    z = μ. The backward pass adds the gradient of β KL / batch to those of μ and σ, as if the loss, a mean
    over the batch, had it.

    Attributes:
        noise: The ε that a server takes for the client's where it takes a gradient. None: ε is drawn.
    """

    noise: Tensor | None

    def __init__(self, features: int, *, size: int, beta: float) -> None:
        super().__init__()
        self.encoder = _linear(features, 2 * size)
        self.decoder = _linear(size, features)
        self.beta = beta
        self.register_buffer("noise", None, persistent=False)

    def forward(self, features: Float[Tensor, "batch *rows features"]) -> Tensor:
        """The features again, as far as z tells them."""
        latent, deviation = self.statistics(features)
        if torch.is_grad_enabled() or (self.training and self.noise is None):
            noise = torch.randn_like(deviation) if self.noise is None else self.noise
            latent = latent + deviation * noise
        decoded: Tensor = self.decoder(latent)
        return decoded

    def statistics(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """μ and σ of z."""
        mean, raw = self.encoder(features).chunk(2, -1)
        mean, deviation = _WithKL.apply(mean, F.softplus(raw), self.beta)  # type: ignore[no-untyped-call]
        return mean, deviation


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Initialized as `torch.nn.Linear` is, always the same."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # type: ignore[no-untyped-call]
    generator = rng.generator(0, "bottleneck", inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


class _WithKL(torch.autograd.Function):
    """μ and σ as they are; their gradients get those of β KL(N(μ, σ²) ‖ N(0, 1)) in bits, over the batch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, deviation: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        return mean.clone(), deviation.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Any) -> None:
        mean, deviation, beta = inputs
        ctx.save_for_backward(mean, deviation)
        ctx.weight = beta / len(mean) / math.log(2)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        mean, deviation = ctx.saved_tensors
        of_mean, of_deviation = slopes
        return (
            of_mean + ctx.weight * mean,
            of_deviation + ctx.weight * (deviation - 1 / deviation),
            None,
        )

    @staticmethod
    def jvp(ctx: Any, mean: Tensor, deviation: Tensor, _: None) -> tuple[Tensor, Tensor]:
        return mean.clone(), deviation.clone()
