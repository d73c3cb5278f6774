"""`fedkl.lock`: a private key-lock for any PyTorch model."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedkl import lockfile
from fedkl.errors import KeyFileError, LockError, UpdateError
from fedkl.keys import Key, Uniform, secure_uniform
from fedkl.locking import surgery, targets
from fedkl.locking.activations import Activation
from fedkl.locking.elements import check_chain, per_element
from fedkl.locking.functional import functional_linear_problems
from fedkl.locking.generation import Generation, generation_of, secrets_of
from fedkl.locking.layers import Initialization
from fedkl.locking.options import Granularity, LockOptions
from fedkl.locking.private_layers import OwnLayers, find_layers
from fedkl.locking.relocking import check_stays_private
from fedkl.locking.split import Split
from fedkl.locking.start import Start, is_kept
from fedkl.locking.targets import ExampleInputs, Layers, Target
from fedkl.locking.withholding import check_not_split, release
from fedkl.modelfile import read_model
from fedkl.types import NamedTensors
from fedkl.update import check_tensors


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
        plain = copy.deepcopy(self._model)
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


def lock_(
    model: nn.Module,
    *,
    key: Key | None = None,
    layers: Layers = "first",
    granularity: Granularity = "channel",
    activation: Activation = "softplus",
    initialization: Initialization = "unit",
    start: Start = "model",
    chained: bool = True,
    share_statistics: bool = False,
    private: Sequence[str] = (),
    example_inputs: ExampleInputs | None = None,
) -> Lock:
    """Locks a model in place; see `lock`. Build optimizers afterwards: some parameters are replaced.

    An optimizer of before goes on training the rest of the model, but neither γ and β nor the lock layers; a
    warning says so.

    Raises:
        LockError: The model cannot be locked as asked; it is unchanged then.
    """
    key = Key.generate() if key is None else key
    options, keep = _planned(
        model,
        key,
        layers=layers,
        granularity=granularity,
        activation=activation,
        initialization=initialization,
        start=start,
        chained=chained,
        share_statistics=share_statistics,
        private=private,
        example_inputs=example_inputs,
    )
    surgery.warn_about_optimizers(model)
    return _new(model, key=key, options=options, keep=keep)


def _planned(
    model: nn.Module,
    key: Key,
    *,
    layers: Layers,
    granularity: Granularity,
    activation: Activation,
    start: Start,
    chained: bool,
    private: Sequence[str],
    example_inputs: ExampleInputs | None,
    **others: Any,
) -> tuple[LockOptions, bool]:
    """What to lock and how, and whether γ and β are kept; checks everything and changes nothing."""
    _check_types(model, key, layers, private)
    own, problems = find_layers(model, private)
    problems = [f"private: {problem}" for problem in problems]
    if layers == "classifier" and example_inputs is None:
        problems += functional_linear_problems(model)
    order = targets.modules_in_order(model, example_inputs=example_inputs)
    chosen = targets.plan(model, layers=layers, order=order, problems=problems)
    if granularity == "element":
        chosen = per_element(model, chosen, example_inputs=example_inputs)
    if chained:
        check_chain(chosen)
    _check_something_is_sent(model, chosen, own)
    options = LockOptions(
        layers=tuple(target.name for target in chosen),
        activation=activation,
        chained=chained,
        key_length=key.length,
        granularity=granularity,
        classifier=chosen[0].before,
        shapes=tuple(target.shape or () for target in chosen) if any(t.shape for t in chosen) else (),
        private=own,
        **others,
    )
    keep = is_kept(model, chosen, start=start, activation=activation)
    targets.warn_about_open_layers(order, chosen, private=map(model.get_submodule, own))
    return options, keep


def _check_something_is_sent(model: nn.Module, chosen: Sequence[Target], own: Sequence[str]) -> None:
    """Raises LockError where γ, β and the private layers are all that the model has."""
    kept = {id(parameter) for name in own for parameter in model.get_submodule(name).parameters()}
    kept |= {
        id(p) for target in chosen if not target.inserts for p in target.module.parameters(recurse=False)
    }
    if own and all(id(parameter) in kept for parameter in model.parameters()):
        what = ", ".join((*own, *(target.name for target in chosen)))
        raise LockError(
            f"lock: with {what} private, no parameter is left to send. Keep fewer layers private."
        )


def _check_types(model: Any, key: Any, layers: Any, private: Any) -> None:
    _check_model(model)
    if not isinstance(key, Key):
        expected = "a fedkl.Key, e.g. Key.generate(), or None"
        raise LockError(f"lock: key= must be {expected}, got {type(key).__name__}.")
    if not isinstance(layers, Sequence) and not callable(layers):
        expected = "'first', 'all', 'classifier', a list of names or a predicate"
        raise LockError(f"lock: layers= must be {expected}, got {type(layers).__name__}.")
    if isinstance(private, str) or not isinstance(private, Sequence):
        raise LockError(
            f"lock: private= must be a list of names, e.g. ['head'], got {type(private).__name__}."
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise LockError(f"lock: model= must be a torch.nn.Module, got {type(model).__name__}.")
    check_not_split(model)


def _new(model: nn.Module, *, key: Key, options: LockOptions, keep: bool) -> Lock:
    """A new client's lock: its private layers are drawn."""
    result = _install(model, key=key, options=options, chosen=options.targets(model), keep=keep)
    result.private_layers.redraw(model)
    return result


def _install(
    model: nn.Module, *, key: Key, options: LockOptions, chosen: Sequence[Target], keep: bool = False
) -> Lock:
    check_stays_private(model, chosen, options=options)
    norm_names = tuple(target.norm_name for target in chosen)
    surgery.install(
        model,
        chosen,
        key=key,
        activation=options.activation,
        initialization=options.initialization,
        chained=options.chained,
        share_statistics=options.share_statistics,
        keep=keep,
    )
    own = OwnLayers(model, options.private)
    return Lock(model, key=key, options=options, norms=norm_names, own=own)


def lock(
    model: nn.Module,
    *,
    key: Key | None = None,
    layers: Layers = "first",
    granularity: Granularity = "channel",
    activation: Activation = "softplus",
    initialization: Initialization = "unit",
    start: Start = "model",
    chained: bool = True,
    share_statistics: bool = False,
    private: Sequence[str] = (),
    example_inputs: ExampleInputs | None = None,
) -> Lock:
    """Locks a copy of a model: a secret key generates the scale γ and shift β of its norm layers.

    The model's call, module names and `isinstance` relations stay. Its `parameters()` include the lock
    layers, so any optimizer trains them; its `state_dict()` does not, so uploading that gives nothing
    private away. What the lock protects against, and what breaks it, is in docs/security.md.

    **Build the optimizer after this, from the locked model's parameters.** The result is a copy: an optimizer
    of the model that was given trains that one, and the locked model not at all.

    **A trained model keeps its function**, whatever the key: γ and β of the norms that it has start at the
    values that they have, if the activation can give these (``"identity"`` gives any; β is seldom positive
    everywhere, as ``"softplus"`` and ``"relu"`` need). A model counts as trained if one of its norms has a γ
    or β other than at PyTorch's start (γ = 1 or 0, β = 0) and running statistics, if any, that have changed
    since. A server that knows this model then knows γ and β of the first round too: the lock hides what
    training makes of them. What cannot be kept: a norm that is inserted where the model has none changes what
    a trained model computes (its γ and β are drawn around 1 and 0 as far as the activation reaches them), and
    so do `private` layers, which are drawn.

    Args:
        model: Any module with norm layers, convolutions or linear layers. Not changed.
        key: The client's key; a new one if None.
        layers: ``"first"``: the first affine norm in `named_modules()` order or, without any, a norm
            inserted after the first convolution or linear layer (never the head). ``"all"``: every affine
            norm, else every convolution and linear layer but the head. ``"classifier"``: a LayerNorm put in
            front of the last linear layer, over its input features. Or module names, or a predicate over
            (name, module).
        granularity: ``"channel"``: one γ and β for each channel, as published. ``"element"``: for each
            element of a sample at the locked layer, (channels, height, width); the model then takes images
            of one size only. For batch and instance norms and convolutions; needs `example_inputs`.
        activation: act in γ = act(W k + b), β likewise. As published: ``"relu"`` or ``"sigmoid"``.
            ``"tanh"``: signed, in (−1, 1).
        initialization: Of the lock layers, ``"unit"`` or ``"published"``; see `LockLayer`.
        start: ``"model"``: a trained model's γ and β start at the values that they have, an untrained
            one's are drawn, as published. ``"drawn"``: drawn in any case. That hides them from a server that
            knows the model, and destroys what a trained model has learned.
        chained: γ and β of one lock are the k of the next, as published; False: every lock from the key, as
            several locks per element must be.
        share_statistics: Send the norms' running statistics too. They give away mean and variance of the
            batch; by default they are private.
        private: Names of further modules whose parameters and buffers stay with the client, which draws its
            own start for them. ``"head"`` also means the last linear layer, ``"stem"`` the first convolution
            or linear layer.
        example_inputs: A tensor, tuple or dict of arguments. If given, the model is run once (a copy, in
            eval mode) and execution order replaces `named_modules()` order.

    Returns:
        The `Lock`; call its ``model`` as before.

    Raises:
        LockError: With every problem found; the activation cannot give the γ and β of a trained model.
        SecretError: The model was made by `bake()`, and something would be sent that was private there.

    Source:
        arXiv 2305.04095, section 3.2; the published setting is `Key.generate(distribution="uniform")`,
        ``activation="relu"``, ``initialization="published"``.

    >>> import torch
    >>> body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> net = nn.Sequential(body, nn.Flatten(), nn.Linear(288, 10))
    >>> locked = lock(net, key=Key.generate())
    >>> locked.model(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    >>> sorted(locked.public_state())
    ['0.0.bias', '0.0.weight', '2.bias', '2.weight']
    """
    key = Key.generate() if key is None else key
    options, keep = _planned(
        model,
        key,
        layers=layers,
        granularity=granularity,
        activation=activation,
        initialization=initialization,
        start=start,
        chained=chained,
        share_statistics=share_statistics,
        private=private,
        example_inputs=example_inputs,
    )
    return _new(copy.deepcopy(model), key=key, options=options, keep=keep)


@dataclass(frozen=True, kw_only=True, repr=False)
class SavedLock:
    """What a lock file holds.

    Attributes:
        lock: The lock, on a copy of the model.
        memory: What `Lock.save` was given as `memory`; empty if nothing.
        about: What it was given as `about`; empty if nothing, as in files of earlier versions.
    """

    lock: Lock
    memory: dict[str, Tensor]
    about: dict[str, str | int]


def load_lock(
    path: str | Path,
    model: nn.Module,
    *,
    passphrase: str | None,
    public: str | Path | NamedTensors | None = None,
) -> Lock:
    """Locks a copy of a plain model with the key and private state of a file that `Lock.save` wrote.

    **A lock file holds the private tensors only.** With the public ones of the training beside it, the result
    is the client's trained model; without, it is its lock on whatever the model holds.

    Args:
        path: The file.
        model: A plain model of the structure that was locked.
        passphrase: As given to `save`; None for an unencrypted file.
        public: The public tensors by name, or a safetensors file of them; see `fedkl.modelfile`. None: those
            of `model` are used as they are.

    Raises:
        KeyFileError: The file is missing, truncated, altered, foreign, of another kind, does not open with
            this passphrase, or belongs to another model.
        LockError: The model is locked already.
        ConfigError: The file of public tensors cannot be read, or is another one.
        UpdateError: Public tensors are missing, unexpected, wrongly shaped or typed, or non-finite.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> trained = lock(net)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trained.save(f"{folder}/client.lock", passphrase="horse")
    ...     public = trained.public_state()
    ...     again = load_lock(f"{folder}/client.lock", net, passphrase="horse", public=public)
    """
    loaded = read_lock(path, model, passphrase=passphrase).lock
    if public is not None:
        _put_public(loaded, public)
    return loaded


def _put_public(loaded: Lock, public: str | Path | NamedTensors) -> None:
    """Puts the public tensors of a training into a lock that was loaded."""
    if isinstance(public, str | Path):
        place, tensors = str(public), read_model(public)
    elif isinstance(public, Mapping):
        place, tensors = "public", dict(public)
    else:
        raise LockError(
            f"load_lock: public= must be tensors by name, or a file, got {type(public).__name__}."
        )
    check_tensors(
        tensors,
        loaded.schema("weights").specs,
        subject=f"{place}: not the public tensors of this lock's {type(loaded.model).__name__}.",
        remedy="Give those of the training that the lock is of, all of them and no others.",
    )
    loaded.load_public_state(tensors)


def read_lock(path: str | Path, model: nn.Module, *, passphrase: str | None) -> SavedLock:
    """All that a lock file holds, read once; see `load_lock` for arguments and errors."""
    _check_model(model)
    meta, tensors = lockfile.read(Path(path), kind="lock", passphrase=passphrase)
    key = lockfile.key_of(Path(path), meta, tensors)
    foreign = KeyFileError(
        f"{path}: this lock belongs to another model: names or shapes of the public tensors differ. "
        f"Load it into a {type(model).__name__} built exactly as when it was saved."
    )
    try:
        options = LockOptions.from_file(meta["options"])
        about = _about(meta.get("about", {}))
    except (KeyError, TypeError, ValueError, AttributeError, LockError) as error:
        raise KeyFileError(
            f"{path}: unknown options, not such as fedkl writes. Restore it from a backup."
        ) from error
    private = _part(tensors, "private/")
    if any(math.prod(shape) > sum(t.numel() for t in private.values()) for shape in options.shapes):
        raise foreign  # before tensors of that size are made
    try:
        plain = copy.deepcopy(model)
        loaded = _install(plain, key=key, options=options, chosen=options.targets(plain))
        if loaded._structure() != meta.get("structure"):
            raise foreign
        loaded.load_private_state(private)
        surgery.start_at(loaded.model, _part(tensors, "start/"))
    except (LockError, UpdateError) as error:
        raise foreign from error
    return SavedLock(lock=loaded, memory=_part(tensors, "memory/"), about=about)


def _about(values: dict[str, Any]) -> dict[str, str | int]:
    if not all(type(value) in (str, int) for value in values.values()):
        raise TypeError
    return dict(values)


def load_memory(path: str | Path, *, passphrase: str | None) -> dict[str, Tensor]:
    """What `Lock.save` was given as `memory`; empty if nothing.

    Raises:
        KeyFileError: The file is missing, damaged, foreign, or does not open with this passphrase.
    """
    return _part(lockfile.read(Path(path), kind="lock", passphrase=passphrase)[1], "memory/")


def _part(tensors: NamedTensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
