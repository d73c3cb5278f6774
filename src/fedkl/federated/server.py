"""The server: it holds the public state and changes it by the average of the clients' updates."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedkl.errors import ConfigError, TrainingError, UpdateError, gathered, shown
from fedkl.federated.optimizer_state import (
    flattened,
    misfits,
    put_state,
    slots_of,
    state_specs,
    take_state,
    unflattened,
)
from fedkl.types import NamedTensors, under
from fedkl.update import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """Averaged weights replace the global ones (FedAvg); it has no meaning for gradients."""

    type: Literal["averaging"] = "averaging"


@dataclass(frozen=True, kw_only=True)
class ServerSGD:
    """SGD on the server; its gradient for averaged weights is their difference (FedAvgM, Hsu et al. 2019).

    Attributes:
        lr: Server learning rate. With 1 and without momentum, averaged weights replace the global ones.
        momentum: In [0, 1).
        nesterov: Nesterov's momentum.
        weight_decay: L2 weight decay.
    """

    type: Literal["sgd"] = "sgd"
    lr: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and 0 <= self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            raise ConfigError(
                "ServerSGD: expected lr > 0, momentum in [0, 1) and weight_decay ≥ 0, got "
                f"lr={self.lr}, momentum={self.momentum}, weight_decay={self.weight_decay}."
            )
        if self.nesterov and self.momentum == 0:
            raise ConfigError("ServerSGD: nesterov=True needs a momentum > 0, got momentum=0.")


@dataclass(frozen=True, kw_only=True)
class ServerAdam:
    """Adam on the server (FedAdam, Reddi et al. 2021), with PyTorch's bias correction.

    Attributes:
        lr: Server learning rate.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        epsilon: τ of the source: how far the steps adapt; its default is the source's.
    """

    type: Literal["adam"] = "adam"
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        betas = (self.beta1, self.beta2)
        if not (0 < self.lr < math.inf and all(0 <= b < 1 for b in betas) and 0 < self.epsilon < math.inf):
            raise ConfigError(
                "ServerAdam: expected lr > 0, betas in [0, 1) and epsilon > 0, got "
                f"lr={self.lr}, beta1={self.beta1}, beta2={self.beta2}, epsilon={self.epsilon}."
            )


_OPTIMIZER = "optimizer/"  # before the names of the optimizer's tensors in a snapshot
_SNAPSHOT_REMEDY = "Restore what a server of the same model, defense and optimizer gave."

AnyServerOptimizer = Averaging | ServerSGD | ServerAdam


class Server:
    """An honest-but-curious server.

    Args:
        state: The initial public state.
        trained: Names in it that are trained; the others are buffers and are replaced by their average.
        optimizer: What it does with the average.

    Raises:
        UpdateError: A trained name is not in the state.
    """

    def __init__(
        self,
        state: NamedTensors,
        *,
        trained: Collection[str],
        optimizer: AnyServerOptimizer | None = None,
    ) -> None:
        unknown = sorted(set(trained) - set(state))
        if unknown:
            raise UpdateError(f"Server: these trained tensors are not in the state: {', '.join(unknown)}.")
        self._state = {name: _copied(tensor) for name, tensor in state.items()}
        self._trained = {name: nn.Parameter(self._state[name]) for name in trained}  # share memory
        self._optimizer = _built(optimizer or Averaging(), self._trained)
        self._slots = _slots(optimizer or Averaging())
        self._kind = type(optimizer or Averaging()).__name__

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of the public state."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def apply_weights(self, average: NamedTensors) -> None:
        """Moves the global weights to, or towards, the clients' averaged weights.

        Raises:
            UpdateError: The average holds unknown tensors.
            TrainingError: The optimizer's step overflows. Nothing was changed.
        """
        self._check_known(average, self._state)
        before = self.snapshot() if self._optimizer is not None else {}
        buffers = [name for name in average if self._optimizer is None or name not in self._trained]
        for name in buffers:
            self._state[name].copy_(average[name])
        if self._optimizer is not None:
            known = {name: tensor for name, tensor in average.items() if name in self._trained}
            gradient = {name: self._state[name] - tensor for name, tensor in known.items()}
            self._step(self._optimizer, gradient, before=before)

    def apply_gradient(self, average: NamedTensors, *, lr_factor: float = 1.0) -> None:
        """Takes one step along the clients' averaged gradient.

        Args:
            average: By parameter name.
            lr_factor: Of the schedule.

        Raises:
            UpdateError: The average holds tensors that are not trained, or the server has no optimizer.
            TrainingError: The optimizer's step overflows. Nothing was changed.
        """
        self._check_known(average, self._trained)
        if self._optimizer is None:
            raise UpdateError("Server: averaging gives no step for gradients. Use ServerSGD or ServerAdam.")
        for group in self._optimizer.param_groups:
            group["lr"] = self._optimizer.defaults["lr"] * lr_factor
        self._step(self._optimizer, average, before=self.snapshot())

    def _step(
        self, optimizer: torch.optim.Optimizer, gradient: NamedTensors, *, before: NamedTensors
    ) -> None:
        """One step, or, where it overflows, the state of `before`: clients would be blamed for it later."""
        for name, tensor in gradient.items():
            self._trained[name].grad = tensor
        optimizer.step()
        optimizer.zero_grad()
        spoilt = [
            name
            for name, parameter in self._trained.items()
            if not all(bool(t.isfinite().all()) for t in (parameter, *_tensors_of(optimizer, parameter)))
        ]
        if spoilt:
            self.restore(before)
            problems = [f"{shown(name)} or its moments become non-finite" for name in spoilt]
            subject = (
                f"Server: a step of {self._kind} with learning rate {optimizer.param_groups[0]['lr']:g}."
            )
            remedy = (
                "Nothing was changed. Lower the server's learning rate (fedsgd without a server: local.lr)."
            )
            raise TrainingError(gathered(subject, problems, remedy))

    def _check_known(self, average: NamedTensors, known: Collection[str]) -> None:
        unknown = sorted(set(average) - set(known))
        if unknown:
            names = ", ".join(map(shown, unknown[:10]))
            raise UpdateError(f"Server: the update holds unknown tensors: {names}.")

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs: the public state and the optimizer's, nothing private."""
        tensors = {f"state/{name}": tensor for name, tensor in self._state.items()}
        if self._optimizer is not None:
            moments = take_state(self._optimizer, self._trained)
            put_state(self._optimizer, self._trained, moments)
            tensors |= {f"{_OPTIMIZER}{place}": value for place, value in flattened(moments).items()}
        return {place: _copied(tensor) for place, tensor in tensors.items()}

    @property
    def state_bytes(self) -> int:
        """Size of the public state."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._state.values())

    def check(self, snapshot: NamedTensors) -> None:
        """Checks that a snapshot is one of a server like this: exactly its names, shapes and dtypes.

        Raises:
            UpdateError: It is not.
        """
        state = {name: TensorSpec.of(tensor) for name, tensor in self._state.items()}
        trained = {name: state[name] for name in self._trained}
        moments = state_specs(under(snapshot, _OPTIMIZER), named=trained, slots=self._slots)
        specs = {f"state/{name}": spec for name, spec in state.items()}
        specs |= {f"{_OPTIMIZER}{place}": spec for place, spec in moments.items()}
        problems = misfits(snapshot, specs)
        if problems:
            raise UpdateError(gathered("Server: a snapshot of another server.", problems, _SNAPSHOT_REMEDY))

    def restore(self, snapshot: NamedTensors) -> None:
        """Takes over what `snapshot` gave.

        Raises:
            UpdateError: It does not fit; nothing was changed.
        """
        self.check(snapshot)
        for name, tensor in self._state.items():
            tensor.copy_(snapshot[f"state/{name}"])
        if self._optimizer is not None:
            put_state(self._optimizer, self._trained, unflattened(under(snapshot, _OPTIMIZER)))


def _tensors_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """What an optimizer keeps for a parameter."""
    return [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _built(options: AnyServerOptimizer, trained: dict[str, nn.Parameter]) -> torch.optim.Optimizer | None:
    parameters = list(trained.values())
    match options:
        case Averaging():
            return None
        case ServerSGD():
            return torch.optim.SGD(
                parameters,
                lr=options.lr,
                momentum=options.momentum,
                nesterov=options.nesterov,
                weight_decay=options.weight_decay,
            )
        case ServerAdam():
            betas = (options.beta1, options.beta2)
            return torch.optim.Adam(parameters, lr=options.lr, betas=betas, eps=options.epsilon)


def _slots(options: AnyServerOptimizer) -> tuple[str, ...]:
    match options:
        case Averaging():
            return ()
        case ServerSGD():
            return slots_of("sgd", momentum=options.momentum)
        case ServerAdam():
            return slots_of("adam")
