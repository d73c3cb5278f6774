"""The server: it holds the public state and changes it by the average of the clients' updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkl.errors import UpdateError
from fedkl.federated.aggregation import weighted_average
from fedkl.types import NamedTensors
from fedkl.update import PublicUpdate


class Server:
    """An honest-but-curious server.

    Args:
        state: The initial public state.
        lr: Learning rate for averaged gradients (FedSGD); not used for weights.
        momentum: Nesterov momentum for averaged gradients.
        weight_decay: L2 weight decay for averaged gradients.
    """

    def __init__(
        self,
        state: NamedTensors,
        *,
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self._state = {name: tensor.detach().clone() for name, tensor in state.items()}
        self._lr = lr
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._velocity: dict[str, Tensor] = {}

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of the public state."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def aggregate(self, updates: Sequence[PublicUpdate], *, lr: float | None = None) -> None:
        """Applies one round's updates: the averaged weights replace the state, or a gradient step is taken.

        Args:
            updates: One per client that took part.
            lr: Learning rate of this round for gradients; the server's own if None.

        Raises:
            UpdateError: The updates do not belong together, or do not fit the state.
        """
        average = weighted_average(updates)
        unknown = sorted(set(average) - set(self._state))
        if unknown:
            raise UpdateError(f"Server: the update holds unknown tensors: {', '.join(unknown)}.")
        if updates[0].kind == "weights":
            self._state.update(average)
            return
        with torch.no_grad():
            for name, mean in average.items():
                gradient = mean + self._weight_decay * self._state[name]
                velocity = self._velocity.setdefault(name, torch.zeros_like(gradient))
                velocity.mul_(self._momentum).add_(gradient)
                self._state[name] -= (self._lr if lr is None else lr) * (gradient + self._momentum * velocity)
