"""Which layers of a model are locked. Every check runs, and all problems are gathered, before any change."""

from __future__ import annotations

import copy
import difflib
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fedkl.errors import LockError, gathered, warn
from fedkl.keys import Key
from fedkl.locking import norms
from fedkl.locking.functional import functional_norm_problems
from fedkl.locking.layers import Activation, Chain, Initialization, LockLayer, Role, remembering
from fedkl.locking.split import check_not_split, withhold, withhold_statistics

Layers = Literal["first", "all"] | Sequence[str] | Callable[[str, nn.Module], bool]
ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

_INSERTED_NAME = "norm"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One layer to lock: a norm, or a convolution or linear layer after which a norm is inserted."""

    name: str
    module: nn.Module

    @property
    def inserts(self) -> bool:
        """Whether the layer has no norm of its own."""
        return not norms.is_affine_norm(self.module)

    @property
    def norm_name(self) -> str:
        """Qualified name of the norm once the layer is locked."""
        return f"{self.name}.{_INSERTED_NAME}".lstrip(".") if self.inserts else self.name


def modules_in_order(model: nn.Module, *, example_inputs: ExampleInputs | None) -> dict[str, nn.Module]:
    """The modules of a model by name, in the order in which a lock chains them.

    Args:
        model: The plain model; not changed.
        example_inputs: If given, execution order replaces `named_modules()` order, and modules that the
            model does not call are left out.
    """
    if example_inputs is None:
        return dict(model.named_modules())
    return _execution_order(model, example_inputs)


def plan(model: nn.Module, *, layers: Layers, order: dict[str, nn.Module]) -> list[Target]:
    """Chooses the layers to lock, in the order of a chain, and checks that all of them can be.

    Args:
        model: The plain model; not changed.
        layers: See `fedkl.lock`.
        order: The modules to choose from, see `modules_in_order`.

    Raises:
        LockError: With every problem found.
    """
    check_not_split(model)
    problems = _valueless_problems(model)
    targets, choice_problems = _choose(model, order, layers)
    problems += choice_problems
    if isinstance(layers, str):
        problems += functional_norm_problems(model)
    if not targets and not problems:
        problems.append(
            "no affine norm of a registered type, and no convolution or linear layer but the head"
        )
    for target in targets:
        problems += _target_problems(model, target)
    if problems:
        raise LockError(gathered("This model cannot be locked as asked.", problems, _REMEDY))
    return targets


_REMEDY = (
    'Choose layers="first", "all", a list of names from model.named_modules(), or a predicate '
    "(name, module) -> bool; make other norm types lockable with fedkl.register_norm(type)."
)


def _choose(model: nn.Module, order: dict[str, nn.Module], layers: Layers) -> tuple[list[Target], list[str]]:
    lockable = {n: m for n, m in order.items() if norms.is_affine_norm(m) or norms.takes_inserted_norm(m)}
    if callable(layers):
        chosen = {name: module for name, module in lockable.items() if layers(name, module)}
        problems = [] if chosen else ["the predicate matched none of " + _listing(lockable)]
    elif isinstance(layers, str):
        if layers not in ("first", "all"):
            return [], [f"layers={layers!r} is neither 'first' nor 'all' (a single name goes in a list)"]
        candidates = {name: m for name, m in lockable.items() if norms.is_affine_norm(m)}
        candidates = candidates or dict(list(lockable.items())[:-1])  # never the head
        chosen = dict(list(candidates.items())[: 1 if layers == "first" else None])
        problems = []
    else:
        chosen, problems = _by_name(model, order, lockable, list(layers))
    return [Target(name=name, module=module) for name, module in chosen.items()], problems


def _by_name(
    model: nn.Module, order: dict[str, nn.Module], lockable: dict[str, nn.Module], names: list[str]
) -> tuple[dict[str, nn.Module], list[str]]:
    every = dict(model.named_modules(remove_duplicate=False))
    problems = [] if names else ["layers= is an empty list"]
    wanted: set[int] = set()
    for name in names:
        if name not in every:
            close = difflib.get_close_matches(name, lockable, n=1)
            hint = f", did you mean '{close[0]}'?" if close else ""
            problems.append(f"'{name}' is not a module of this model{hint}")
        elif every[name] not in lockable.values():
            problems.append(_why_not(name, every[name], called=every[name] in order.values()))
        else:
            wanted.add(id(every[name]))
    return {name: m for name, m in lockable.items() if id(m) in wanted}, problems


def _why_not(name: str, module: nn.Module, *, called: bool) -> str:
    kind = type(module).__name__
    if not called:
        return f"'{name}' ({kind}) is not called by the model on the example inputs"
    if norms.is_unregistered_norm(module):
        return f"'{name}' ({kind}) is a subclass of a norm that is not registered"
    if norms.norm_tensors(module) is not None:
        return f"'{name}' ({kind}) has no scale; build it with affine=True"
    return f"'{name}' ({kind}) is neither a norm, a convolution nor a linear layer of a known type"


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "no lockable layers"


def _valueless_problems(model: nn.Module) -> list[str]:
    return [
        f"'{name}' has no values yet (lazy or on the meta device); run one forward pass or load it first"
        for name, parameter in model.named_parameters()
        if is_lazy(parameter) or parameter.is_meta
    ]


def _target_problems(model: nn.Module, target: Target) -> list[str]:
    name, module = target.name, target.module
    if target.inserts and hasattr(module, _INSERTED_NAME):
        return [f"'{name}' already has an attribute '{_INSERTED_NAME}'; rename it"]
    tensor_names = ("weight", None) if target.inserts else _generated_names(module)
    problems = []
    for tensor_name in filter(None, tensor_names):
        tensor = getattr(module, tensor_name)
        if not tensor.is_floating_point():
            problems.append(f"'{name}.{tensor_name}' has dtype {tensor.dtype}, expected a floating-point one")
        elif not target.inserts and parametrize.is_parametrized(module):
            problems.append(f"'{name}' is parametrized already; remove its parametrizations first")
        elif not target.inserts and tensor_name not in module._parameters:
            problems.append(f"'{name}.{tensor_name}' is not a parameter of the module")
        elif not target.inserts:
            problems += _tied_problems(model, f"{name}.{tensor_name}", tensor, module)
    return problems


def _tied_problems(model: nn.Module, full_name: str, tensor: Tensor, owner: nn.Module) -> list[str]:
    for other_name, other in model.named_modules():
        if other is not owner and any(p is tensor for p in other._parameters.values()):
            where = f"'{other_name}'" if other_name else "the model itself"
            return [f"'{full_name}' is tied to a parameter of {where}, which would stay public"]
    return []


def _execution_order(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, nn.Module]:
    called: dict[str, None] = {}
    probe = copy.deepcopy(model).eval()
    for name, module in probe.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: called.setdefault(name))
    with torch.no_grad():
        if isinstance(example_inputs, Mapping):
            probe(**example_inputs)
        else:
            probe(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    modules = dict(model.named_modules())
    return {name: modules[name] for name in called}


def warn_about_open_layers(order: dict[str, nn.Module], targets: Sequence[Target]) -> None:
    """Warns when more than one parametric layer comes before the first lock."""
    before = []
    for name, module in order.items():
        if module is targets[0].module:
            break
        if any(True for _ in module.parameters(recurse=False)):
            before.append(name or "the model itself")
    # The one layer that feeds the first lock is what the lock is there for.
    if len(before) > 1:
        warn(
            f"{len(before)} parametric layers run before the first lock ('{targets[0].name}'), and their "
            f"gradient is not locked: {_listing(before)}.{_unregistered_norms(order, before)}"
        )


def _unregistered_norms(order: dict[str, nn.Module], names: Sequence[str]) -> str:
    skipped = [name for name in names if name in order and norms.is_unregistered_norm(order[name])]
    kinds = sorted({type(order[name]).__name__ for name in skipped})
    if not skipped:
        return ""
    return (
        f" Skipped because their type is not registered: {_listing(skipped)}. If z = γ ⊙ x̂ + β holds for "
        f"{', '.join(kinds)}, make it lockable with fedkl.register_norm(...)."
    )


def _generated_names(norm: nn.Module) -> tuple[str, str | None]:
    names = norms.norm_tensors(norm)
    if names is None:
        raise LockError(f"{type(norm).__name__} is not a registered norm.")
    shift = names.shift
    return names.scale, shift if shift and getattr(norm, shift, None) is not None else None


def insert_norms(targets: Sequence[Target]) -> list[nn.Module]:
    """Gives every target a norm, and returns the norms in order. Names of existing tensors stay."""
    result = []
    for target in targets:
        if target.inserts:
            target.module.add_module(_INSERTED_NAME, norms.inserted_norm(target.module))
            target.module.register_forward_hook(_normalize_output)
            result.append(target.module.get_submodule(_INSERTED_NAME))
        else:
            result.append(target.module)
    return result


def _normalize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    normalized: Tensor = module.get_submodule(_INSERTED_NAME)(output)
    return normalized


def install(
    model: nn.Module,
    targets: Sequence[Target],
    *,
    key: Key,
    activation: Activation,
    initialization: Initialization,
    chained: bool,
    share_statistics: bool,
) -> None:
    """Makes γ and β of every target generated and private, in place. The plan has been checked."""
    roles: tuple[Role, Role] = ("scale", "shift")
    chains = {role: Chain(key) for role in roles}
    with torch.no_grad(), remembering(chains.values()):
        for norm in insert_norms(targets):
            for role, tensor_name in zip(roles, _generated_names(norm), strict=True):
                if tensor_name is not None:
                    chain = chains[role] if chained else Chain(key)
                    layer = LockLayer(chain, role=role, activation=activation, initialization=initialization)
                    _register(layer, norm, tensor_name)
    for chain in chains.values():
        if len(chain) > 1:
            model.register_forward_pre_hook(chain.open)
            model.register_forward_hook(chain.close, always_call=True)
    if not share_statistics:
        withhold_statistics(model)


def _register(layer: LockLayer, norm: nn.Module, tensor_name: str) -> None:
    parametrize.register_parametrization(norm, tensor_name, layer)
    withhold(norm.parametrizations[tensor_name], ("original0", "original1"))  # type: ignore[index, arg-type]
    layer.chain.append(norm, tensor_name)


def warn_about_optimizers(model: nn.Module) -> None:
    """Warns when an optimizer exists that holds parameters of a model which is to be locked in place."""
    ids = {id(parameter) for parameter in model.parameters()}
    for thing in gc.get_objects():
        # type(), not isinstance: a proxy object may run code of its own when asked for its class.
        if issubclass(type(thing), torch.optim.Optimizer) and any(
            id(p) in ids for group in getattr(thing, "param_groups", ()) for p in group["params"]
        ):
            warn(
                "An optimizer was built before lock_(): it may hold scales and shifts that no longer exist, "
                "and it does not train the lock layers. Build it again from model.parameters()."
            )
            return


def lock_layers(model: nn.Module) -> list[LockLayer]:
    """All lock layers of a model, in `named_modules()` order."""
    return [module for module in model.modules() if isinstance(module, LockLayer)]


def unlock(model: nn.Module) -> None:
    """Turns generated γ and β into ordinary parameters of their current values, in place."""
    locked = [module for module in model.modules() if _is_locked(module)]
    with torch.no_grad(), remembering({layer.chain for layer in lock_layers(model)}):
        values = [{name: getattr(norm, name).clone() for name in _parametrized(norm)} for norm in locked]
    for norm, tensors in zip(locked, values, strict=True):
        # Not remove_parametrizations: it edits the class, which deep copies of a module share.
        norm.__class__ = parametrize.type_before_parametrizations(norm)
        del norm.parametrizations
        for name, value in tensors.items():
            norm.register_parameter(name, nn.Parameter(value))


def _is_locked(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and bool(lock_layers(module.parametrizations))  # type: ignore[arg-type]


def _parametrized(norm: nn.Module) -> list[str]:
    return list(norm.parametrizations)  # type: ignore[arg-type]
