"""The state of a `torch.optim.Optimizer` by parameter name, to lend one optimizer to many clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedkl.errors import shown
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec

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


def slots_of(optimizer: Literal["sgd", "adam"], *, momentum: float = 0.0) -> tuple[str, ...]:
    """What PyTorch's optimizer keeps for each parameter that it has stepped."""
    if optimizer == "adam":
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if momentum else ()


def state_specs(
    places: Iterable[str], *, named: Mapping[str, TensorSpec], slots: Sequence[str]
) -> dict[str, TensorSpec]:
    """What a flattened state must be: a parameter has all slots, or none if it was never stepped.

    Args:
        places: The names that came.
        named: The optimizer's parameters.
        slots: See `slots_of`.
    """
    stepped = {place.partition("/")[2] for place in places}
    return {
        f"{slot}/{name}": _step_spec() if slot == "step" else spec
        for name, spec in named.items()
        if name in stepped
        for slot in slots
    }


def _step_spec() -> TensorSpec:
    double = torch.get_default_dtype() == torch.float64  # as PyTorch's optimizers choose it
    return TensorSpec(shape=(), dtype=torch.float64 if double else torch.float32)


def misfits(tensors: NamedTensors, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Every name, shape and dtype that is not exactly what was expected; empty if all are."""
    problems = [f"'{name}' is missing" for name in specs if name not in tensors]
    problems += [f"{shown(name)} is unexpected" for name in tensors if name not in specs]
    for name, spec in specs.items():
        came = TensorSpec.of(tensors[name]) if name in tensors else spec
        if came != spec:
            expected = f"expected {spec.dtype} of shape {spec.shape}"
            problems.append(f"'{name}' is {came.dtype} of shape {came.shape}, {expected}")
        elif name in tensors and _counts_steps(name) and not 0 <= float(tensors[name]) <= _MOST_STEPS:
            problems.append(f"'{name}' is no number of steps")
    return problems


_MOST_STEPS = 2.0**53  # of which Adam takes powers


def _counts_steps(place: str) -> bool:
    return place.removeprefix("optimizer/").startswith("step/")
