"""What tells one subject from another: its numbers and its code, as text that is the same in every process.

Of code its source counts, without comments and layout, and what it names: global variables, functions and
classes, and what these name in turn, as long as it is the user's own. What is installed is told by its name.
Left out is what differs from process to process, an address in a repr, say, and what code looks up or imports
only while it runs: by a string (`getattr`), from a file, from the environment.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import hashlib
import inspect
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cached_property, partial
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ADDRESS = " at 0x"  # in a repr that differs from process to process
_DEEPEST = 20  # containers and objects within one another
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range, PurePath, torch.dtype)
_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}  # instructions
_OF_MODULES = {*vars(nn.Module()), "training"}  # attributes that every module has
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD = Path(sysconfig.get_path("stdlib")).resolve()


def fingerprint(
    network: nn.Module,
    *,
    trains: object,
    settings: object,
    tensors: Mapping[str, Tensor],
    values: bool = True,
) -> str:
    """SHA-256, hexadecimal.

    Args:
        network: Its tensors count, its modules with their settings, and their code.
        trains: What a client does: a Procedure, or a function with what it names.
        settings: What else counts.
        tensors: By name, likewise.
        values: Whether values of the network's tensors count; else their names and forms, and which are
            frozen.
    """
    telling = _Telling(trains, formal=None if values else network)
    told = [telling.value(each) for each in (settings, tensors, trains, network)]
    return hashlib.sha256("\n".join([*told, *telling.code()]).encode(errors="backslashreplace")).hexdigest()


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, hexadecimal."""
    told = [f"{name}: {_bits(tensor)}" for name, tensor in sorted(tensors.items())]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


class _Telling:
    """Text of values, and of the code that they lead to.

    Args:
        root: Its package is the user's own, even where it is installed.
        formal: The network of whose tensors the values do not count; None: they count of all.
    """

    def __init__(self, root: object, *, formal: nn.Module | None = None) -> None:
        self._formal = formal
        while isinstance(root, partial):
            root = root.func
        root = inspect.unwrap(root) if callable(root) else root
        self._root = _package(getattr(root, "__module__", None))
        self._told: dict[int, tuple[object, str]] = {}  # objects too: an id is given again
        self._open: list[int] = []
        self._code: dict[int, FunctionType | type] = {}

    def code(self) -> list[str]:
        """Functions and classes that the values told before lead to, in an order that is always the same."""
        found, done = set(), 0
        while done < len(self._code):  # telling one may add others
            for each in list(self._code.values())[done:]:
                done += 1
                text = self._class(each) if isinstance(each, type) else self._function(each)
                found.add(f"{each.__qualname__}: {text}")
        return sorted(found)

    def value(self, value: object) -> str:
        """A value; of what leads back to itself, and of what is too deep, the type."""
        if isinstance(value, _PLAIN):
            return repr(value)
        if id(value) in self._told:
            return self._told[id(value)][1]
        if id(value) in self._open or len(self._open) > _DEEPEST:
            return type(value).__qualname__
        self._open.append(id(value))
        text = self._composed(value)
        self._open.pop()
        self._told[id(value)] = value, text
        return text

    def _composed(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return _bits(value)
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, nn.Module):
            return self._network(value)
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self.value, value))}]"
        if isinstance(value, (set, frozenset)):  # in any order: others would be told as they come
            return f"{{{sorted(repr(each) for each in value if isinstance(each, _PLAIN))}}}"
        return self._code_or_object(value)

    def _code_or_object(self, value: Any) -> str:
        if isinstance(value, partial):
            return f"partial {self.value([value.func, value.args, value.keywords])}"
        if isinstance(value, MethodType):
            return f"method {self.value([value.__func__, value.__self__])}"
        if isinstance(value, FunctionType):
            return self._reference(value)
        if isinstance(value, ModuleType):
            return "module" if self._is_own(value.__name__) else value.__name__  # of a script: its path
        if isinstance(value, Enum):
            return f"{self.value(type(value))} {value.name} {self.value(value.value)}"
        if isinstance(value, type):
            if self._is_own(value.__module__):
                self._code[id(value)] = value
            return value.__qualname__
        wrapped = getattr(value, "__dict__", {}).get("__wrapped__")  # a cache around a function, say
        if wrapped is not None:
            return f"{type(value).__qualname__} {self.value(wrapped)}"
        if self._is_own(type(value).__module__):
            return f"{self.value(type(value))} {self._mapping(_fields(value))}"
        with contextlib.suppress(Exception):  # of another library: it may raise anything
            if _ADDRESS not in (text := repr(value)):
                return text
        return f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}"  # a function in C, say

    def _mapping(self, values: Mapping[Any, Any]) -> str:
        named = sorted(((self.value(key), value) for key, value in values.items()), key=lambda each: each[0])
        return f"{{{', '.join(f'{key}: {self.value(value)}' for key, value in named)}}}"

    def _array(self, array: np.ndarray[Any, Any]) -> str:
        if array.dtype.hasobject:
            return f"array {array.shape} {self.value(array.ravel().tolist())}"
        return f"array {array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"

    def _network(self, network: nn.Module) -> str:
        state = {**dict(network.named_buffers()), **network.state_dict()}
        if network is self._formal:
            state = _forms(state, network)
        parts = [re.sub(r" at 0x[0-9a-f]+", "", repr(network)), self._mapping(state)]
        kinds = {kind: self._is_own(kind.__module__) for kind in map(type, network.modules())}
        others = (kind for kind, own in kinds.items() if not own and _package(kind.__module__) != "torch")
        parts += [_source(kind) for kind in others]
        for module in network.modules():
            told = {k: v for k, v in vars(module).items() if k not in _OF_MODULES}
            if not kinds[type(module)]:
                told = {k: v for k, v in told.items() if isinstance(v, _PLAIN)}
            hooks = [list(vars(module)[name].values()) for name in _HOOKS]
            parts.append(f"{self.value(type(module))} {self._mapping(told)} {self.value(hooks)}")
        return "\n".join(parts)

    def _reference(self, function: FunctionType) -> str:
        """A function where it is named: what it carries along; what it does is told by itself."""
        own = self._is_own(function.__globals__.get("__name__"))
        carried = dict(vars(function))
        told = [carried.pop("__wrapped__", None)]
        if own:
            self._code[id(function)] = function
            held = list(_held(function))
            told += [function.__defaults__, function.__kwdefaults__, carried, held]
        return f"{function.__qualname__} {self.value(told)}"

    def _function(self, function: FunctionType) -> str:
        codes = list(_codes(function.__code__))
        steps = [(step.opname, step.argval) for code in codes for step in dis.get_instructions(code)]
        set_by_itself = {name for operation, name in steps if operation == "STORE_GLOBAL"}
        named = {name for operation, name in steps if operation in _GLOBALS} - set_by_itself
        attributes = {name for code in codes for name in code.co_names}
        text = _source(function.__code__)
        if not text or function.__name__ == "<lambda>":  # whose source is the line, with others in it
            text += self.value([(each.co_code, _constants(each)) for each in codes])
        return f"{text} {self._named(named, function.__globals__, attributes)}"

    def _named(
        self, names: set[str], where: Mapping[str, object], attributes: set[str], depth: int = 0
    ) -> str:
        """Variables of a module; of a module among them those that may be meant."""
        found = []
        for name in sorted(names & where.keys()):
            value = where[name]
            if _is_special(name):
                continue
            if not isinstance(value, ModuleType):
                found.append(f"{name}: {self.value(value)}")
            elif self._is_own(value.__name__) and depth < _DEEPEST:
                found.append(f"{name}: {self._named(attributes, vars(value), attributes, depth + 1)}")
        return f"{{{', '.join(found)}}}"

    def _class(self, kind: type) -> str:
        parts = [_source(kind), self.value(kind.__bases__)]
        for name, value in sorted(vars(kind).items()):
            functions = list(_functions(value))
            if functions or not _is_special(name):
                parts.append(f"{name}: {self.value(functions or value)}")
        return " ".join(parts)

    def _is_own(self, module: object) -> bool:
        """Whether code is the user's: neither installed nor Python's."""
        package = _package(module)
        if package in ("torch", "fedkl", "builtins", ""):
            return False
        if package == self._root:
            return True
        file = getattr(sys.modules.get(str(module)), "__file__", None)
        if file is None:  # the prompt of an interpreter, say
            return package not in sys.stdlib_module_names
        return not _INSTALLED & set(Path(file).parts) and _STANDARD not in Path(file).resolve().parents


def _package(module: object) -> str:
    return str(module or "").partition(".")[0]


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _forms(state: Mapping[str, object], network: nn.Module) -> dict[str, object]:
    """What a network's tensors are but their values, and which of them are frozen."""
    frozen = {name for name, each in network.named_parameters() if not each.requires_grad}
    return {
        name: f"{each.dtype} {tuple(each.shape)}{' frozen' * (name in frozen)}"
        for name, each in state.items()
        if isinstance(each, Tensor)
    }


def _bits(tensor: Tensor) -> str:
    told = f"tensor {tensor.dtype} {tuple(tensor.shape)}"
    with contextlib.suppress(RuntimeError, NotImplementedError):  # of another layout, or without values
        values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return f"{told} {hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()}"
    return told


def _fields(value: object) -> dict[str, object]:
    """Of an object of the user's, in slots too."""
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    found = {name: getattr(value, name) for name in names if not _is_special(name) and hasattr(value, name)}
    return found | dict(getattr(value, "__dict__", {}))


def _held(function: FunctionType) -> Iterator[object]:
    """What a function holds of those around it."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty
            yield cell.cell_contents


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Of a function, and of those within it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _constants(code: CodeType) -> list[object]:
    return [each for each in code.co_consts if not isinstance(each, CodeType)] + [code.co_names]


def _functions(value: Any) -> Iterable[FunctionType]:
    """Of what a class says: a method, a property."""
    parts = [value]
    if isinstance(value, (staticmethod, classmethod, property, cached_property)):
        parts = [getattr(value, name, None) for name in ("__func__", "fget", "fset", "fdel", "func")]
    return (each for each in parts if isinstance(each, FunctionType))


def _source(code: Any) -> str:
    """Without comments and layout, which change nothing; of no file: nothing."""
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        return ""
    with contextlib.suppress(SyntaxError):  # of a lambda in the middle of an expression
        return ast.unparse(ast.parse(textwrap.dedent(source)))
    return source
