"""`Lock`: a locked model with its key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from fedkl import lockfile
from fedkl.errors import LockError
from fedkl.keys import Key, Uniform, secure_uniform
from fedkl.locking import surgery
from fedkl.locking.copying import copied
from fedkl.locking.generation import Generation, generation_of, secrets_of
from fedkl.locking.options import LockOptions
from fedkl.locking.private_layers import OwnLayers
from fedkl.locking.split import Split
from fedkl.locking.withholding import release
from fedkl.types import NamedTensors


class Lock(Split):
    """A locked model with its key. Made by `fedkl.lock`, `fedkl.lock_` or `fedkl.load_lock`."""

    def __init__(
        self, model: nn.Module, *, key: Key, options: LockOptions, norms: tuple[str, ...], own: OwnLayers
    ) -> None:
        super().__init__(model)
        self._key = key
        self._options = options
        self._norms = norms
        self._own = own
        own.withhold(model)
        self._check_nothing_lost()

    @property
    def key(self) -> Key:
        """The client's key."""
        return self._key

    @property
    def layers(self) -> tuple[str, ...]:
        """Qualified names of the modules whose scale and shift are generated, in the order of the chain."""
        return self._norms

    @property
    def private_layers(self) -> OwnLayers:
        """The layers that are private as a whole."""
        return self._own

    def __repr__(self) -> str:
        options = self._options
        return (
            f"Lock({type(self._model).__name__}, layers={list(self._norms)}, key={self._key}, "
            f"activation={options.activation!r}, chained={options.chained}, private={list(options.private)})"
        )

    @property
    def kept(self) -> tuple[str, ...]:
        """Those of `layers` whose γ and β started at the values that a trained model had; see `lock`.

        Those of the others were drawn.
        """
        starts = surgery.starts(self._model)
        return tuple(name for name in self._norms if any(n.rpartition(".")[0] == name for n in starts))

    def use_key(self, key: Key | None) -> None:
        """Puts another client's key in, e.g. where one model instance serves several clients.

        Raises:
            LockError: The key's length is not the one that the lock layers were built for.
        """
        if key is None:
            return
        self._check_length(key)
        for layer in surgery.lock_layers(self._model):
            layer.chain.set_key(key)
        self._key = key

    def _check_length(self, key: Key) -> None:
        if key.length != self._options.key_length:
            raise LockError(
                f"This lock takes keys of length {self._options.key_length}, got one of {key.length}. "
                f"Use Key.generate(length={self._options.key_length})."
            )

    def redraw(self, *, key: Key | None = None, uniform: Uniform = secure_uniform) -> None:
        """Draws a new key, as long as before, new lock layers and new private layers.

        γ and β of `kept` layers start again at the values that the model had when it was locked, whatever
        they were trained to since.
        """
        old = self._key
        self.use_key(key or Key.drawn(uniform, length=old.length, distribution=old.distribution))
        surgery.redraw(self._model, uniform=uniform)
        self._own.redraw(self._model, uniform=uniform)

    def rekey(self, *, key: Key | None = None) -> None:
        """Draws a new key, as long as before, and new lock layers that generate the same γ and β.

        What the model computes stays, to the rounding of its numbers, and so do private layers. Whoever
        knows γ and β knows them still: see `redraw`.

        Args:
            key: The new key; drawn if None.

        Raises:
            LockError: The key's length is not the one that the lock layers were built for.
        """
        old = self._key
        key = key or Key.generate(length=old.length, distribution=old.distribution)
        self._check_length(key)
        surgery.rekey(self._model, key)
        self._key = key

    def bake(self) -> nn.Module:
        """A plain copy of the model: γ and β are ordinary affine parameters of their current values.

        The copy gives the same outputs and is as private as the lock itself: it holds the generated γ and β
        and the private layers, and its `state_dict()` holds the norm statistics too.
        `fedkl.locking.is_private` knows it, and `fedkl.serving` writes it to files that say so.
        """
        plain = copied(self._model, subject="bake")
        surgery.unlock(plain)
        release(plain)
        return plain

    def generation(self) -> Generation:
        """How `reveal_secrets` become γ and β, without the model. Holds no secret."""
        return generation_of(self._model)

    def reveal_secrets(self) -> dict[str, Tensor]:
        """Copies of the key and the lock layers by name: what `generation` takes. Never to be sent."""
        links = self.generation().links
        lock_layers = {name for link in links for name in (link.weight, link.bias)}
        named = self.private_parameters()
        return secrets_of(self._key.reveal(), {name: named[name] for name in named if name in lock_layers})

    def save(
        self,
        path: str | Path,
        *,
        passphrase: str | None,
        memory: NamedTensors | None = None,
        about: Mapping[str, str | int] | None = None,
        replace: bool = True,
    ) -> None:
        """Writes key and private state to one file, mode 0600, atomically.

        The public tensors are not in it; `load_lock` takes them beside it.

        Args:
            path: Where to.
            passphrase: Encrypts the file (AES-256-GCM under a scrypt key). None, given explicitly, leaves
                it unencrypted.
            memory: What else the client keeps between rounds, e.g. its optimizer's moments; see
                `load_memory`.
            about: What the file says of itself, e.g. whose it is; see `read_lock`.
            replace: Whether a file that is there is replaced.

        Raises:
            KeyFileError: The passphrase is empty, or the file cannot be written, or it is there and is not to
                be replaced.
        """
        meta = {
            "options": asdict(self._options),
            "distribution": self._key.distribution,
            "structure": self._structure(),
            "about": dict(about or {}),
        }
        tensors = {f"private/{name}": tensor for name, tensor in self.private_state().items()}
        tensors |= {f"start/{name}": tensor for name, tensor in surgery.starts(self._model).items()}
        tensors |= {f"memory/{name}": tensor for name, tensor in (memory or {}).items()}
        tensors["key"] = self._key.reveal()
        lockfile.write(
            Path(path), kind="lock", meta=meta, tensors=tensors, passphrase=passphrase, replace=replace
        )

    def secrets(self) -> list[Tensor]:
        """Every tensor whose content must not leave: the private state, the key, γ and β."""
        affine = [tensor for norm in surgery.generated(self._model).values() for tensor in norm.values()]
        return [*super().secrets(), self._key.reveal(), *affine]

    def _structure(self) -> str:
        """Fingerprint of the public structure, to which a saved lock is bound: names, shapes, no values."""
        specs = self.schema("weights").specs
        listing = sorted((name, spec.shape, str(spec.dtype)) for name, spec in specs.items())
        return hashlib.sha256(json.dumps([self._norms, listing]).encode()).hexdigest()
