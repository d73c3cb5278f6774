"""The state of a `torch.optim.Optimizer` by parameter name, to lend one optimizer to many clients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedkl.types import NamedTensors

OptimizerState = Mapping[str, NamedTensors]
"""By parameter name, then by slot, e.g. ``momentum_buffer``."""


def take_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """Takes the state out of an optimizer, which is left without; tensors are handed over, not copied.

    Args:
        optimizer: It holds tensors only per parameter, as SGD and Adam do.
        named: Its parameters.
    """
    state = {
        name: {slot: value for slot, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
        for name, parameter in named.items()
        if parameter in optimizer.state
    }
    optimizer.state.clear()
    return {name: slots for name, slots in state.items() if slots}


def put_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], state: OptimizerState
) -> None:
    """Puts copies of a state into an optimizer instead of its own."""
    optimizer.state.clear()
    for name, slots in state.items():
        parameter = named[name]
        optimizer.state[parameter] = {
            # Adam's count of steps stays on the CPU, wherever the parameter is
            slot: value.clone() if slot == "step" else value.to(parameter.device, copy=True)
            for slot, value in slots.items()
        }


def flattened(state: OptimizerState) -> dict[str, Tensor]:
    """The state as one level of names, ``<slot>/<parameter>``, for a file."""
    return {f"{slot}/{name}": value for name, slots in state.items() for slot, value in slots.items()}


def unflattened(tensors: NamedTensors) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flattened`.

    >>> unflattened(flattened({"fc.weight": {"step": torch.ones(())}}))
    {'fc.weight': {'step': tensor(1.)}}
    """
    state: dict[str, dict[str, Tensor]] = {}
    for place, value in tensors.items():
        slot, _, name = place.partition("/")
        state.setdefault(name, {})[slot] = value
    return state
