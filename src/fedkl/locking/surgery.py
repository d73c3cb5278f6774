"""How the chosen layers of a model are locked, in place, and how a lock is taken off again."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedkl.errors import LockError, warn
from fedkl.keys import Key, Uniform, secure_uniform
from fedkl.locking import elements, norms
from fedkl.locking.activations import Activation
from fedkl.locking.chain import Chain, Opener, remembering
from fedkl.locking.layers import Initialization, LockLayer, Role, SingleParametrization
from fedkl.locking.targets import Target
from fedkl.locking.withholding import mark_released, withhold, withhold_statistics


def insert_norms(targets: Sequence[Target]) -> list[nn.Module]:
    """Gives every target a norm, and returns in order the modules with a γ and a β to generate.

    Names of existing tensors stay, but for those of norms that get a γ and a β per element.
    """
    result = []
    for target in targets:
        norm = _inserted(target) if target.inserts else target.module
        if target.shape is not None:
            norm = elements.attach(norm, target.shape, like=target.module.weight)  # type: ignore[arg-type]
        result.append(norm)
    return result


def _inserted(target: Target) -> nn.Module:
    layer = target.module
    if target.before and isinstance(layer, nn.Linear):
        norm = norms.fitted(nn.LayerNorm(layer.in_features), layer)
        layer.register_forward_pre_hook(_normalize_input, with_kwargs=True)
    else:
        norm = norms.inserted_norm(layer, affine=target.shape is None)
        layer.register_forward_hook(_normalize_output)
    layer.add_module(target.inserted_name, norm)
    return norm


def _normalize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    normalized: Tensor = module.get_submodule(norms.INSERTED_NAME)(output)
    if torch.is_grad_enabled() and len(normalized) == 1:
        # PyTorch's batch norm (2.13, CPU) computes a wrong gradient of one image where what comes back is
        # transposed, as behind the patches of a vision transformer. What a selection gives back is not.
        normalized = normalized[None].select(0, 0)
    return normalized


def _normalize_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    norm = module.get_submodule(norms.INPUT_NAME)
    if args:
        return (norm(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": norm(kwargs["input"])}


def install(
    model: nn.Module,
    targets: Sequence[Target],
    *,
    key: Key,
    activation: Activation,
    initialization: Initialization,
    chained: bool,
    share_statistics: bool,
    keep: bool,
) -> None:
    """Makes γ and β of every target generated and private, in place. The plan has been checked.

    With `keep`, those of norms that the model has start at the values that they have.
    """
    roles: tuple[Role, Role] = ("scale", "shift")
    chains = {role: Chain(key) for role in roles}
    kept = [keep and not target.inserts for target in targets]  # asked before norms are inserted
    with torch.no_grad(), remembering(chains.values()):
        for norm, has_start in zip(insert_norms(targets), kept, strict=True):
            for role, tensor_name in zip(roles, norms.generated_names(norm), strict=True):
                if tensor_name is not None:
                    chain = chains[role] if chained else Chain(key)
                    layer = LockLayer(
                        chain,
                        role=role,
                        activation=activation,
                        initialization=initialization,
                        keep=has_start,
                    )
                    _register(layer, norm, tensor_name)
    if len(targets) > 1:
        opener = Opener({layer.chain: None for layer in lock_layers(model)})
        model.register_forward_pre_hook(opener.open)
        model.register_forward_hook(opener.close, always_call=True)
    if not share_statistics:
        withhold_statistics(model)


def _register(layer: LockLayer, norm: nn.Module, tensor_name: str) -> None:
    parametrize.register_parametrization(norm, tensor_name, layer)
    registered: nn.Module = norm.parametrizations[tensor_name]  # type: ignore[index, assignment]
    registered.__class__ = SingleParametrization
    withhold(registered, ("original0", "original1"))
    layer.chain.append(norm, tensor_name)


def redraw(model: nn.Module, *, uniform: Uniform = secure_uniform) -> None:
    """Draws W and b of every lock layer anew, from the key that its chain holds now."""
    for each in _in_order(model):
        each[0].redraw(each.original0, each.original1, uniform=uniform)


def rekey(model: nn.Module, key: Key, *, uniform: Uniform = secure_uniform) -> None:
    """Puts in another key and draws every W anew; b is such that γ and β stay as they are."""
    lists = _in_order(model)
    sums = [each[0].sums(each.original0, each.original1) for each in lists]
    for each in lists:
        each[0].chain.set_key(key)
    for each, wanted in zip(lists, sums, strict=True):
        each[0].redraw(each.original0, each.original1, uniform=uniform, sums=wanted)


def _in_order(model: nn.Module) -> list[Any]:
    """The locked tensors' parametrizations, by position: a layer's k depends on those before it."""
    locked: list[Any] = [module for module in model.modules() if _is_locked(module)]
    lists: list[Any] = [each for module in locked for each in module.parametrizations.values()]
    return sorted(lists, key=lambda one: one[0].position)


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


def starts(model: nn.Module) -> dict[str, Tensor]:
    """Where γ and β start that are not drawn, by their qualified names."""
    named = _layers_by_tensor(model).items()
    return {name: layer.start for name, layer in named if layer.start is not None}


def start_at(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Lets γ and β start at these values at every redraw; W and b stay as they are.

    Raises:
        LockError: A tensor is not one that is generated, or does not fit.
    """
    layers = _layers_by_tensor(model)
    for name, value in values.items():
        if name not in layers:
            raise LockError(f"lock: expected starts of {', '.join(layers)}, got one more.")
        layers[name].start_at(value)


def _layers_by_tensor(model: nn.Module) -> dict[str, LockLayer]:
    return {
        f"{prefix}.{name}".removeprefix("."): each[0]
        for prefix, module in model.named_modules()
        if _is_locked(module)
        for name, each in module.parametrizations.items()
    }


def generated(model: nn.Module) -> dict[nn.Module, dict[str, Tensor]]:
    """Detached copies of the γ and β of every locked norm, by the norm and the tensor's own name."""
    locked = [module for module in model.modules() if _is_locked(module)]
    with torch.no_grad(), remembering({layer.chain for layer in lock_layers(model)}):
        return {norm: {name: getattr(norm, name).clone() for name in _parametrized(norm)} for norm in locked}


def unlock(model: nn.Module) -> None:
    """Turns generated γ and β into ordinary parameters of their current values, in place."""
    values = generated(model)
    _take_off_openers(model)
    for norm, tensors in values.items():
        # Not remove_parametrizations: it edits the class, which deep copies of a module share.
        norm.__class__ = parametrize.type_before_parametrizations(norm)
        del norm.parametrizations
        for name, value in tensors.items():
            norm.register_parameter(name, nn.Parameter(value))
        mark_released(norm, tuple(tensors))


def _take_off_openers(model: nn.Module) -> None:
    """A plain model needs none, and they hold the key."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Opener):
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)


def _is_locked(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and bool(lock_layers(module.parametrizations))  # type: ignore[arg-type]


def _parametrized(norm: nn.Module) -> list[str]:
    return list(norm.parametrizations)  # type: ignore[arg-type]
