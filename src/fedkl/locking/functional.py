"""Finds modules of the user's that call a norm as a function, with γ and β out of a lock's reach."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedkl.locking import norms

_NAMES = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_FUNCTIONS = {getattr(owner, name): name for owner in (torch, F) for name in _NAMES if hasattr(owner, name)}


def functional_norm_problems(model: nn.Module) -> list[str]:
    """One line for every module whose own code names a norm of `torch.nn.functional`.

    The code is read, not run: what it names through a local import or from another function is not seen.

    Args:
        model: The model; not changed.
    """
    calls: dict[type, list[str]] = {}
    problems = []
    for name, module in model.named_modules():
        kind = type(module)
        if norms.norm_tensors(module) is not None or norms.is_unregistered_norm(module):
            continue
        if kind not in calls:
            calls[kind] = sorted({norm for method in _methods(kind) for norm in _norms_named_in(method)})
        if calls[kind]:
            where = f"'{name}' ({kind.__name__})" if name else f"the model itself ({kind.__name__})"
            problems.append(
                f"{where} calls {', '.join(calls[kind])} as a function: its scale and shift cannot be "
                "generated; use the module (e.g. nn.LayerNorm), or name the layers to lock"
            )
    return problems


def _methods(kind: type) -> Iterator[Callable[..., Any]]:
    for _, method in inspect.getmembers(kind, inspect.isfunction):
        if not (method.__module__ or "").startswith("torch."):
            yield inspect.unwrap(method)


def _norms_named_in(method: Callable[..., Any]) -> Iterator[str]:
    """Follows global names, free variables and attributes of modules, e.g. ``F.layer_norm``."""
    code = getattr(method, "__code__", None)
    if code is None:
        return
    scope = {**method.__globals__, **inspect.getclosurevars(method).nonlocals}
    named = [scope.get(name) for name in code.co_names + code.co_freevars]
    if not set(_NAMES).intersection(code.co_names) and not any(map(_is_norm, named)):
        return
    value: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            value = scope.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = getattr(value, instruction.argval, None)
        else:
            value = None
        if _is_norm(value):
            yield _FUNCTIONS[value]


def _is_norm(value: Any) -> bool:
    return inspect.isroutine(value) and value in _FUNCTIONS
