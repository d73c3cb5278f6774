"""How a lock was made: what `Lock.save` writes beside the tensors, and `load_lock` builds from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from fedkl.errors import LockError
from fedkl.locking import elements, targets
from fedkl.locking.activations import Activation
from fedkl.locking.layers import Initialization
from fedkl.locking.private_layers import find_layers
from fedkl.locking.targets import Target

Granularity = Literal["channel", "element"]


@dataclass(frozen=True, kw_only=True)
class LockOptions:
    """Nothing secret. Options that files of older versions lack have the default that they were made with.

    Attributes:
        layers: Names of the targets.
        classifier: Whether the norm is in front of the one layer named, and not behind it.
        shapes: Of a sample at each layer, where γ and β are made per element; () where they were already.
        private: Names of the modules that are private as a whole.
    """

    layers: tuple[str, ...]
    activation: Activation
    initialization: Initialization
    chained: bool
    share_statistics: bool
    key_length: int
    granularity: Granularity = "channel"
    classifier: bool = False
    shapes: tuple[tuple[int, ...], ...] = ()
    private: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, known in (
            ("activation", self.activation, get_args(Activation)),
            ("initialization", self.initialization, get_args(Initialization)),
            ("granularity", self.granularity, get_args(Granularity)),
        ):
            if value not in known:
                raise LockError(f"lock: {name}={value!r} is unknown. Choose one of {', '.join(known)}.")

    @classmethod
    def from_file(cls, values: dict[str, Any]) -> LockOptions:
        """The options from plain values, as JSON gives them.

        Raises:
            KeyError, TypeError, LockError: They are not those of a lock.
        """
        lists: dict[str, Any] = {
            "layers": _names(values["layers"]),
            "shapes": tuple(_sizes(shape) for shape in values.get("shapes", ())),
            "private": _names(values.get("private", ())),
        }
        flags = (values.get(name, False) for name in ("chained", "classifier", "share_statistics"))
        if any(type(flag) is not bool for flag in flags) or type(values["key_length"]) is not int:
            raise TypeError
        return cls(**(values | lists))

    def targets(self, model: nn.Module) -> list[Target]:
        """The layers to lock in a plain model of the same structure, in the order of the chain.

        Raises:
            LockError: It is another model.
        """
        named = {name: module for name, module in model.named_modules() if name in self.layers}
        chosen = targets.plan(
            model,
            layers="classifier" if self.classifier else self.layers,
            order=named if self.classifier else dict(model.named_modules()),
        )
        found = {target.name: target for target in chosen}
        _, unknown = find_layers(model, self.private)
        if unknown or set(found) != set(self.layers) or len(self.shapes) not in (0, len(self.layers)):
            raise LockError("lock: the options are those of another model.")
        if not self.shapes:
            return [found[name] for name in self.layers]
        elements.check_kinds(chosen)
        shaped = zip(self.layers, self.shapes, strict=True)
        return [found[name].of_shape(shape) if shape else found[name] for name, shape in shaped]


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)) or any(type(value) is not str for value in values):
        raise TypeError
    if len(set(values)) != len(values):
        raise TypeError
    return tuple(values)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int or value < 1 for value in values):
        raise TypeError
    return tuple(values)
