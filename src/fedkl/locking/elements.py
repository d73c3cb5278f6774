"""Locks per element: a γ and a β for every element of a sample, instead of one for each channel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fedkl.errors import LockError, gathered
from fedkl.locking import norms
from fedkl.locking.copying import copied
from fedkl.locking.targets import ExampleInputs, Target, run


def per_element(
    model: nn.Module, targets: Sequence[Target], *, example_inputs: ExampleInputs | None
) -> list[Target]:
    """The targets with the shape that a sample has there; those of a baked lock per element have theirs.

    Args:
        model: The plain model; not changed.
        targets: What is locked.
        example_inputs: As the model is called; it is run once, a copy, in eval mode.

    Raises:
        LockError: A layer takes no γ and β per element, or the shapes cannot be found.
    """
    check_kinds(targets)
    shapeless = [target for target in targets if not _is_per_element(target)]
    if not shapeless:
        return list(targets)
    if example_inputs is None:
        raise LockError(
            "lock: granularity='element' needs example_inputs=, a batch as the model is called with: γ and β "
            "have the shape of a sample at the locked layer. For images of 32×32: torch.zeros(1, 3, 32, 32)."
        )
    seen = _shapes(model, shapeless, example_inputs)
    problems = []
    for target in shapeless:
        shapes, width = seen[target.name], _width(target.module)
        if len(shapes) != 1:
            problems.append(f"'{target.name}' gives samples of {_listing(shapes)}, expected one shape")
        elif (shape := shapes[0])[:1] != (width,):
            problems.append(f"'{target.name}' is called without a batch, or gives {shape[:1]}, not {width}")
    _refuse(problems)
    return [replace(t, shape=seen[t.name][0]) if t.name in seen else t for t in targets]


def check_chain(targets: Sequence[Target]) -> None:
    """Refuses chains between locks per element, whose lock layers would be huge.

    Raises:
        LockError: With all of them.
    """
    problems = []
    for before, target in itertools.pairwise(targets):
        if _is_per_element(before) and _is_per_element(target):
            inputs, outputs = _size(before), _size(target)
            problems.append(
                f"'{target.name}': chained to '{before.name}', W would have {outputs:,} × {inputs:,} = "
                f"{outputs * inputs:,} numbers, for γ and for β; pass chained=False: every lock from the key"
            )
    _refuse(problems)


def check_kinds(targets: Sequence[Target]) -> None:
    """Refuses layers that take no γ and β per element.

    Raises:
        LockError: With all of them.
    """
    expected = "takes no γ and β per element, which is for batch and instance norms and convolutions"
    wrong = [
        target
        for target in targets
        if target.before or not (norms.takes_elements(target.module) or _is_per_element(target))
    ]
    _refuse([f"'{target.name}' ({type(target.module).__name__}) {expected}" for target in wrong])


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        remedy = 'Choose other layers=, or granularity="channel".'
        raise LockError(gathered("This model cannot be locked per element as asked.", problems, remedy))


def _is_per_element(target: Target) -> bool:
    """Planned so, or of a model that was locked so and baked."""
    return target.shape is not None or isinstance(target.module, norms.ElementwiseAffine)


def _size(target: Target) -> int:
    weight: Any = target.module.weight
    return int(weight.numel()) if target.shape is None else math.prod(target.shape)


def _width(module: nn.Module) -> Any:
    return getattr(module, "num_features", None) or module.out_channels


def _listing(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes)) or "no shape at all"


def _shapes(
    model: nn.Module, targets: Sequence[Target], example_inputs: ExampleInputs
) -> dict[str, list[tuple[int, ...]]]:
    """All the shapes that samples have behind each target, by its name."""
    seen: dict[str, dict[tuple[int, ...], None]] = {target.name: {} for target in targets}

    def hook(name: str) -> Any:
        return lambda module, args, output: seen[name].setdefault(tuple(output.shape[1:]))

    probe = copied(model, subject="lock")
    for target in targets:
        probe.get_submodule(target.name).register_forward_hook(hook(target.name))
    run(probe, example_inputs)
    return {name: list(shapes) for name, shapes in seen.items()}


def attach(norm: nn.Module, shape: Sequence[int], *, like: Tensor) -> norms.ElementwiseAffine:
    """Gives a norm a γ and a β per element instead of its own, of the same values, in place.

    Args:
        norm: A batch or instance norm.
        shape: Of a sample.
        like: Has the dtype and device.
    """
    affine = norms.ElementwiseAffine(shape).to(device=like.device, dtype=like.dtype).train(norm.training)
    for name, own in (("weight", norm.weight), ("bias", norm.bias)):
        if isinstance(own, Tensor) and own.numel() == shape[0]:  # one for each channel
            affine.get_parameter(name).copy_(own.view(-1, *(1 for _ in shape[1:])))
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
    norm.affine = False  # type: ignore[assignment]  # PyTorch's flag for a scale and shift of its own
    norm.add_module(norms.ELEMENTS_NAME, affine)
    norm.register_forward_hook(_scale_elements)
    return affine


def _scale_elements(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    scaled: Tensor = module.get_submodule(norms.ELEMENTS_NAME)(output)
    return scaled
