"""Which layers of a model are locked. Every check runs, and all problems are gathered, before any change."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fedkl.errors import LockError, gathered, warn
from fedkl.locking import norms
from fedkl.locking.copying import copied
from fedkl.locking.functional import functional_norm_problems

Layers = Literal["first", "all", "classifier"] | Sequence[str] | Callable[[str, nn.Module], bool]
ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One layer to lock: a norm, or a convolution or linear layer after which a norm is inserted.

    Attributes:
        name: Qualified name of the layer.
        module: The layer.
        before: Whether a norm goes in front of the layer instead.
        shape: Of one sample there, where γ and β are per element.
    """

    name: str
    module: nn.Module
    before: bool = False
    shape: tuple[int, ...] | None = None

    @property
    def inserts(self) -> bool:
        """Whether the layer has no norm of its own."""
        return self.before or not norms.is_affine_norm(self.module)

    @property
    def inserted_name(self) -> str:
        """Name that an inserted norm has in the layer."""
        return norms.INPUT_NAME if self.before else norms.INSERTED_NAME

    @property
    def norm_name(self) -> str:
        """Qualified name, once the layer is locked, of the module whose scale and shift are generated."""
        inserted = self.inserted_name if self.inserts else ""
        elements = "" if self.shape is None else norms.ELEMENTS_NAME
        return ".".join(filter(None, (self.name, inserted, elements)))

    def of_shape(self, shape: tuple[int, ...]) -> Target:
        """The same with γ and β per element of such a sample."""
        return replace(self, shape=shape)


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


def plan(
    model: nn.Module, *, layers: Layers, order: dict[str, nn.Module], problems: Sequence[str] = ()
) -> list[Target]:
    """Chooses the layers to lock, in the order of a chain, and checks that all of them can be.

    Args:
        model: The plain model; not changed.
        layers: See `fedkl.lock`.
        order: The modules to choose from, see `modules_in_order`.
        problems: What is wrong already, to be told with the rest.

    Raises:
        LockError: With every problem found.
    """
    targets, choice_problems = _choose(model, order, layers)
    problems = [*problems, *_valueless_problems(model), *choice_problems]
    if layers in ("first", "all"):
        problems += functional_norm_problems(model)
    if not targets and not problems:
        problems.append(
            "no affine norm of a registered type, and but the head no convolution, nor a linear layer of "
            "more than one output"
        )
    for target in targets:
        problems += _target_problems(model, target)
    if problems:
        raise LockError(gathered("This model cannot be locked as asked.", problems, _REMEDY))
    frozen = [each.name for each in targets if not each.inserts and is_frozen(each.module)]
    if frozen and any(parameter.requires_grad for parameter in model.parameters()):
        warn(
            f"{_listing(frozen)}: γ and β are frozen (requires_grad=False). A lock of them never changes, "
            "and hides nothing from a server that knows the model. Unfreeze them, or lock other layers."
        )
    return targets


def is_frozen(norm: nn.Module) -> bool:
    """Whether no training changes the norm's scale: a lock of it would stay as it begins."""
    return not getattr(norm, norms.generated_names(norm)[0]).requires_grad


_REMEDY = (
    'Choose layers="first", "all", "classifier", a list of names from model.named_modules(), or a predicate '
    "(name, module) -> bool; make other norm types lockable with fedkl.register_norm(type)."
)


def _choose(model: nn.Module, order: dict[str, nn.Module], layers: Layers) -> tuple[list[Target], list[str]]:
    affine = {name: m for name, m in order.items() if norms.is_affine_norm(m)}
    plain = {name: m for name, m in order.items() if norms.takes_inserted_norm(m)}
    lockable = {n: m for n, m in order.items() if n in affine or (n in plain and not norms.is_too_narrow(m))}
    if callable(layers):
        chosen = {name: module for name, module in lockable.items() if layers(name, module)}
        problems = [] if chosen else ["the predicate matched none of " + _listing(lockable)]
    elif layers == "classifier":
        return _classifier(order)
    elif isinstance(layers, str):
        if layers not in ("first", "all"):
            known = "'first', 'all' nor 'classifier'"
            return [], [f"layers={layers!r} is neither {known} (a single name goes in a list)"]
        candidates = affine or list(plain)[:-1]  # never the head
        trained = [name for name in candidates if name not in affine or not is_frozen(affine[name])]
        names = [name for name in trained or candidates if name in lockable]
        chosen = {name: order[name] for name in names[: 1 if layers == "first" else None]}
        problems = []
    else:
        chosen, problems = _by_name(model, order, lockable, list(layers))
    return [Target(name=name, module=module) for name, module in chosen.items()], problems


def _classifier(order: dict[str, nn.Module]) -> tuple[list[Target], list[str]]:
    linear = [name for name, m in order.items() if parametrize.type_before_parametrizations(m) is nn.Linear]
    if not linear:
        return [], ["layers='classifier' locks the input of the last nn.Linear, and there is none"]
    name = linear[-1]
    module: Any = order[name]
    if module.in_features == 1:
        return [], [f"'{name}' (Linear) has one input, which a norm in front of it would make constant"]
    return [Target(name=name, module=module, before=True)], []


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
    if norms.takes_inserted_norm(module):  # and not lockable all the same
        return f"'{name}' ({kind}) has one output, which a norm inserted after it would make constant"
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
    if target.inserts and hasattr(module, target.inserted_name):
        return [f"'{name}' already has an attribute '{target.inserted_name}'; rename it"]
    tensor_names = ("weight", None) if target.inserts else norms.generated_names(module)
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
    probe = copied(model, subject="lock")
    for name, module in probe.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: called.setdefault(name))
    run(probe, example_inputs)
    modules = dict(model.named_modules())
    return {name: modules[name] for name in called}


def run(probe: nn.Module, example_inputs: ExampleInputs) -> None:
    """Calls a copy of the model once, in eval mode, for what its hooks see.

    Raises:
        LockError: The model cannot be called so.
    """
    remedy = "Give a batch as the model is called with, e.g. torch.zeros(1, 3, 32, 32) for images of 32×32."
    if not isinstance(example_inputs, (Tensor, tuple, Mapping)):
        kind = type(example_inputs).__name__
        raise LockError(
            f"example_inputs: expected a tensor, or a tuple or dict of arguments, got {kind}. {remedy}"
        )
    probe.eval()
    try:
        with torch.no_grad():
            if isinstance(example_inputs, Mapping):
                probe(**example_inputs)
            else:
                probe(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    except (Exception, SystemExit) as error:  # whatever the model raises
        raise LockError(f"example_inputs: the model cannot be called with them: {error} {remedy}") from error


def warn_about_open_layers(
    order: dict[str, nn.Module], targets: Sequence[Target], *, private: Iterable[nn.Module] = ()
) -> None:
    """Warns when more than one parametric layer comes before the first lock, unless that was asked for.

    Args:
        order: The modules in order.
        targets: What is locked.
        private: Modules that are not sent.
    """
    kept = {id(part) for module in private for part in module.modules()}
    whole = not any(
        each.requires_grad for module in order.values() for each in module.parameters(recurse=False)
    )
    before = []
    for name, module in order.items():
        if module is targets[0].module or targets[0].before:
            break
        own = module.parameters(recurse=False)  # frozen ones have no gradient, unless nothing is trained yet
        if id(module) not in kept and any(each.requires_grad or whole for each in own):
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
