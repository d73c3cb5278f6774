"""Finds modules of the user's that call a norm or a linear layer as a function, out of a lock's reach."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedkl.locking import norms

_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_NAMES = (*_NORMS, "linear")
_FUNCTIONS = {getattr(owner, name): name for owner in (torch, F) for name in _NAMES if hasattr(owner, name)}


def functional_norm_problems(model: nn.Module) -> list[str]:
    """One line for every module whose own code names a norm of `torch.nn.functional`.

    The code is read, not run: what it names through a local import or from another function is not seen.

    Args:
        model: The model; not changed.
    """
    remedy = "its scale and shift cannot be generated; use the module (e.g. nn.LayerNorm), or name the layers"
    found = _calling(model, _NORMS)
    return [f"{where} calls {calls} as a function: {remedy} to lock" for where, calls in found]


def functional_linear_problems(model: nn.Module) -> list[str]:
    """The same for linear layers, whose input a norm could not be put on.

    Args:
        model: The model; not changed.
    """
    remedy = "it is not seen whether that is the head; pass example_inputs=, or use the module"
    return [f"{where} calls {calls} as a function: {remedy}" for where, calls in _calling(model, ("linear",))]


def _calling(model: nn.Module, functions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Modules whose own code names some functions, and which of them."""
    calls: dict[type, list[str]] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if norms.norm_tensors(module) is not None or norms.is_unregistered_norm(module):
            continue
        if kind not in calls:
            named = {one for method in _methods(kind) for one in _functions_named_in(method)}
            calls[kind] = sorted(named.intersection(functions))
        if calls[kind]:
            where = f"'{name}' ({kind.__name__})" if name else f"the model itself ({kind.__name__})"
            yield where, ", ".join(calls[kind])


def _methods(kind: type) -> Iterator[Callable[..., Any]]:
    for _, method in inspect.getmembers(kind, inspect.isfunction):
        if not (method.__module__ or "").startswith("torch."):
            yield inspect.unwrap(method)


def _functions_named_in(method: Callable[..., Any]) -> Iterator[str]:
    """Follows global names, free variables and attributes of modules, e.g. ``F.layer_norm``."""
    code = getattr(method, "__code__", None)
    if code is None:
        return
    scope = {**method.__globals__, **inspect.getclosurevars(method).nonlocals}
    named = [scope.get(name) for name in code.co_names + code.co_freevars]
    if not set(_NAMES).intersection(code.co_names) and not any(map(_is_one, named)):
        return
    value: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            value = scope.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = getattr(value, instruction.argval, None)
        else:
            value = None
        if _is_one(value):
            yield _FUNCTIONS[value]


def _is_one(value: Any) -> bool:
    return inspect.isroutine(value) and value in _FUNCTIONS
