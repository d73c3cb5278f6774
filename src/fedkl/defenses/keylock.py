"""FedKL: a private key generates the scale γ and shift β of norm layers (arXiv 2305.04095)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from fedkl.defenses.base import Defense
from fedkl.errors import LockError
from fedkl.keys import Key, KeyDistribution
from fedkl.locking import Activation, Granularity, Initialization, Lock, Start, lock


@dataclass(frozen=True, kw_only=True)
class KeyLock(Defense):
    """Options of `fedkl.lock`, plus how new keys are drawn.

    The published setting is ``key_distribution="uniform", activation="relu", initialization="published"``.

    A trained model keeps its function: every client's γ and β start at the model's, also after
    `Lock.redraw`. This needs an activation that can give them, as ``"identity"`` can. ``start="drawn"`` draws
    them in any case.

    Attributes:
        layers: As for `fedkl.lock`, and so the rest.
        input_shape: Of one image, ``(channels, height, width)``, which a lock per element needs. If given,
            the model is run once, and layers are in the order in which it calls them.
    """

    type: Literal["keylock"] = "keylock"
    layers: Literal["first", "all", "classifier"] | tuple[str, ...] = "first"
    granularity: Granularity = "channel"
    activation: Activation = "softplus"
    initialization: Initialization = "unit"
    start: Start = "model"
    chained: bool = True
    share_statistics: bool = False
    private: tuple[str, ...] = ()
    input_shape: tuple[int, int, int] | None = None
    key_length: int = 1024
    key_distribution: KeyDistribution = "normal"

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Lock:
        """Locks a copy of the model.

        Raises:
            LockError: The model cannot be locked so; a lock per element lacks the images' shape; the
                activation cannot give a trained model's γ and β.
        """
        if self.granularity == "element" and self.input_shape is None:
            expected = "input_shape=(channels, height, width), the shape of one image"
            raise LockError(f"KeyLock: granularity='element' needs {expected}.")
        return lock(
            model,
            key=key or Key.generate(length=self.key_length, distribution=self.key_distribution),
            layers=self.layers,
            granularity=self.granularity,
            activation=self.activation,
            initialization=self.initialization,
            start=self.start,
            chained=self.chained,
            share_statistics=self.share_statistics,
            private=self.private,
            example_inputs=self._example(model),
        )

    def for_images(self, shape: tuple[int, int, int]) -> KeyLock:
        """With the shape of the images, if it is needed and not given."""
        needed = self.granularity == "element" and self.input_shape is None
        return replace(self, input_shape=shape) if needed else self

    def for_untrained(self) -> KeyLock:
        """With γ and β drawn, whatever values the norms were initialized with."""
        return replace(self, start="drawn")

    def _example(self, model: nn.Module) -> torch.Tensor | None:
        if self.input_shape is None:
            return None
        parameter = next(model.parameters(), torch.empty(0))
        return torch.zeros(1, *self.input_shape, dtype=parameter.dtype, device=parameter.device)
