"""The lock layer: a secret fully connected layer that generates a norm's scale or shift from the key."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedkl.errors import LockError, SecretError
from fedkl.keys import Uniform, normal, secure_uniform
from fedkl.locking.activations import ACTIVATIONS, RANGES, Activation, represents
from fedkl.locking.chain import Chain, deepcopied

Initialization = Literal["unit", "published"]
Role = Literal["scale", "shift"]

# The bias at which the activation gives γ = 1, the usual start of an affine norm. Two cannot: sigmoid starts
# at 0.5, and tanh around 0, so that the signs of γ are random.
_SCALE_BIAS: dict[Activation, float] = {
    "softplus": math.log(math.e - 1),
    "relu": 1.0,
    "sigmoid": 0.0,
    "tanh": 0.0,
    "identity": 1.0,
}


class SingleParametrization(parametrize.ParametrizationList):
    """PyTorch's list of a tensor's parametrizations, for one lock layer.

    A locked norm runs it twice at every forward pass; what only other lists need takes half as long as the
    lock layer itself.
    """

    def forward(self) -> Tensor:
        """γ or β."""
        own: Any = self._parameters  # by way of dictionaries: nn.Module looks for an attribute in Python
        layer: Any = self._modules["0"]
        known: Tensor | None = layer.chain.recall(layer, own.get("original0"), own.get("original1"))
        if known is not None and known.dim() == layer.dimensions:
            return known
        value: Tensor = layer.forward(self.original0, self.original1)
        return value

    __call__ = forward


class LockLayer(nn.Module):
    """Generates γ = act(W k + b) (or β) of one norm, as a parametrization of its ``weight`` (or ``bias``).

    W has shape ``(elements of the norm's weight, length of k)``, b ``(elements,)``. Both are trained by the
    client like any parameter and are drawn from the operating system's CSPRNG. The input k is the client's
    key or, in a chain, the γ (for β: the β) that the previous lock generated.

    k is neither a parameter nor a buffer: no state_dict, `named_buffers` or broadcast can carry it.

    Args:
        chain: What gives k; this layer is to be the next in it.
        role: Whether the scale or the shift is generated; decides the initial bias.
        activation: The function act.
        initialization: ``"unit"``: rows of W scaled so that W k has unit variance over keys, b such that
            act(b) is 1 for γ where the activation can reach it; b = 0 elsewhere, as under tanh, whose γ get
            random signs, and for β. ``"published"``: PyTorch's default
            for a linear layer, U(±1/√length) for both.
        keep: W is drawn as ever, but b is such that γ (or β) starts at the value that the norm has, whatever
            the key. The activation must be able to represent it.

    Attributes:
        start: That value; None where it is drawn.

    Source:
        arXiv 2305.04095, section 3.2. Deviations: the initialization (the published one leaves half of the
        γ at exactly 0 under ReLU, where they stay) and the source of randomness.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        role: Role,
        activation: Activation,
        initialization: Initialization,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self.chain = chain
        self.position = len(chain)
        self.role = role
        self.activation = activation
        self.initialization = initialization
        self.start: Tensor | None = None  # neither a parameter nor a buffer: in no state
        self._keep = keep
        self._shape: torch.Size | None = None
        self.dimensions = 0  # of what is generated

    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The initial W and b for a norm tensor of this shape, dtype and device.

        Its values are used only if they are to be kept.
        """
        if self._shape is not None:
            raise SecretError(
                f"The {self.role} of a locked norm is generated from the key and cannot be assigned. "
                "Use lock.load_private_state(...), or lock.bake() for a plain model."
            )
        self._shape = value.shape
        self.dimensions = value.dim()
        if self.position == 0:
            self.chain.convert_key(lambda key: key.to(value))
        if self._keep:
            self.start_at(value)
        return self._initial(value)

    def start_at(self, value: Tensor) -> None:
        """Lets γ (or β) start at these values whenever W and b are drawn.

        Raises:
            LockError: They are of another shape, or the activation cannot represent them.
        """
        fits = value.shape == self._shape and value.is_floating_point()
        if not fits or not represents(self.activation, value):
            raise LockError(
                f"LockLayer: the {self.role} was to start at {value.dtype} values of shape "
                f"{tuple(value.shape)}; expected floating-point ones of shape {tuple(self._shape or ())} "
                f"that {self.activation} can give. Lock with activation='identity', or start='drawn'."
            )
        self.start = value.detach().clone().cpu()

    def redraw(self, weight: Tensor, bias: Tensor, *, uniform: Uniform, sums: Tensor | None = None) -> None:
        """Writes a new initial W and b into this layer's, from these random numbers.

        Args:
            weight: W.
            bias: b.
            uniform: Where W comes from.
            sums: What W k + b is to be; None: as at the start.
        """
        with torch.no_grad():
            for tensor, new in zip((weight, bias), self._initial(bias, uniform, sums), strict=True):
                tensor.copy_(new)

    def sums(self, weight: Tensor, bias: Tensor) -> Tensor:
        """W k + b as one vector, float64 on the CPU."""
        source = self.chain.source(self.position).detach().double().cpu()
        return weight.detach().double().cpu() @ source + bias.detach().double().cpu()

    def forward(self, weight: Tensor, bias: Tensor) -> Tensor:
        """γ or β, in the shape of the norm's tensor."""
        if self._shape is None:
            raise SecretError("A lock layer was called before it was registered on a norm.")
        value = self.chain.generate(self, weight, bias)
        return value if value.shape == self._shape else value.view(self._shape)

    def compute(self, k: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """act(W k + b) as one vector."""
        return ACTIVATIONS[self.activation](self.affine(k, weight, bias))

    def affine(self, k: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """W k + b as one vector."""
        # addmv gives what F.linear does, which makes a matrix of k and back, in two thirds of the time.
        if not torch.is_autocast_enabled(weight.device.type):
            return torch.addmv(bias, weight, k)
        # Under autocast the norm's weight must keep the dtype of its statistics.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmv(bias, weight, k)

    def _initial(
        self, like: Tensor, uniform: Uniform = secure_uniform, sums: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        source = self.chain.source(self.position).detach().double().cpu()
        weight, bias = (drawn.to(like) for drawn in self._drawn(like.numel(), source, uniform))
        if sums is None and self.start is not None:
            sums = RANGES[self.activation].inverse(self.start.double().flatten())
        if sums is not None:  # with W as it was rounded
            bias = (sums - weight.detach().double().cpu() @ source).to(like)
        return weight, bias

    def _drawn(self, rows: int, source: Tensor, uniform: Uniform) -> tuple[Tensor, Tensor]:
        columns = source.numel()
        if self.initialization == "published":
            bound = 1 / math.sqrt(columns)
            return bound * (2 * uniform(rows, columns) - 1), bound * (2 * uniform(rows) - 1)
        # A chain whose previous γ are all dead has norm 0: any finite W gives the same W k then.
        norm = source.norm().clamp_min(1e-6)
        start = _SCALE_BIAS[self.activation] if self.role == "scale" else 0.0
        return normal(uniform, rows, columns) / norm, torch.full((rows,), start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LockLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.position == 0:
            self.chain.convert_key(fn)
        return self

    def extra_repr(self) -> str:
        """Structure only, no values."""
        source = "key" if self.position == 0 else "previous lock"
        return f"{self.role} = {self.activation}(W k + b), k from {source}"

    def __deepcopy__(self, memo: dict[int, Any]) -> LockLayer:
        return deepcopied(self, memo)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SecretError("A lock layer cannot be pickled. Use lock.save(path, passphrase=...).")

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(2)
