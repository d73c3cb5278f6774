"""The split of a model's tensors into private and public, and how states of either side move.

The split is structural: a module that holds private tensors withholds them from `state_dict()` itself,
wherever it sits in whatever model, and refuses them in `load_state_dict()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedkl.errors import LockError, SecretError, UpdateError, gathered
from fedkl.locking.norms import statistics_names
from fedkl.types import NamedTensors
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec, UpdateKind, check_tensors

_MARK = "_fedkl_withheld"


class _Withheld:
    """Hooks of one module that keep some of its own tensors out of state dictionaries and pickles."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __deepcopy__(self, memo: dict[int, Any]) -> _Withheld:
        memo[id(self)] = replica = type(self)(self.names)
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.names:
            raise SecretError(
                "A model with private tensors cannot be pickled. Save model.state_dict(), which omits them, "
                "and keep the private side with lock.save(path, passphrase=...)."
            )
        return super().__reduce_ex__(protocol)

    def save(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in self.names:
            state.pop(prefix + name, None)

    def load(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        for name in self.names:
            own = getattr(module, name)
            given = state.get(prefix + name)
            # PyTorch itself puts a norm's own counter into states of an old version.
            if given is not None and given is not own:
                errors.append(f"'{prefix}{name}' is private and must not come with a public state.")
            state[prefix + name] = own


def withhold(module: nn.Module, names: tuple[str, ...]) -> None:
    """Makes tensors of a module private: `state_dict()` of it and of every parent omits them.

    Args:
        module: The module that directly owns the tensors.
        names: Local names of its parameters or buffers.
    """
    mark = module.__dict__.get(_MARK)
    if mark is not None:
        mark.names += tuple(name for name in names if name not in mark.names)
        return
    mark = _Withheld(names)
    module.__dict__[_MARK] = mark
    # Functions of the module, not bound methods: deepcopy copies the mark and its hooks as one.
    module.register_state_dict_post_hook(_Hook(mark, "save"))  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_Hook(mark, "load"))  # type: ignore[no-untyped-call]


class _Hook:
    """Calls one method of a mark; survives deepcopy together with it."""

    def __init__(self, mark: _Withheld, method: str) -> None:
        self._mark = mark
        self._method = method

    def __call__(self, *args: Any) -> None:
        getattr(self._mark, self._method)(*args)


def withhold_statistics(model: nn.Module) -> None:
    """Makes the running statistics of every norm of the model private.

    After one local step they give the batch's mean and variance away.
    """
    for module in model.modules():
        names = statistics_names(module)
        if names:
            withhold(module, names)


def release(model: nn.Module) -> None:
    """Ends the withholding: every tensor of the model is in its `state_dict()` again."""
    for module in model.modules():
        mark = module.__dict__.get(_MARK)
        if mark is not None:
            mark.names = ()


def _withheld(model: nn.Module, *, aliases: bool = False) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules(remove_duplicate=not aliases):
        mark = module.__dict__.get(_MARK)
        for name in mark.names if mark else ():
            yield (f"{prefix}.{name}" if prefix else name), getattr(module, name)


class Split:
    """A model whose tensors are divided into private ones, which stay with the client, and public ones.

    Args:
        model: The model, with its private tensors already withheld (see `withhold`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def model(self) -> nn.Module:
        """The model; call it as ever."""
        return self._model

    @property
    def private_names(self) -> frozenset[str]:
        """Every name, aliases of shared modules included, under which a private tensor can be found."""
        return frozenset(name for name, _ in _withheld(self._model, aliases=True))

    def public_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors that are sent, by name. The same objects as in `model.named_parameters()`."""
        private = {id(tensor) for _, tensor in _withheld(self._model)}
        named = self._model.named_parameters()
        return {name: parameter for name, parameter in named if id(parameter) not in private}

    def private_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors that stay: the lock layers. `model.parameters()` contains them too."""
        private = dict(_withheld(self._model))
        return {name: tensor for name, tensor in private.items() if isinstance(tensor, nn.Parameter)}

    def public_state(self) -> dict[str, Tensor]:
        """Detached copies of all public tensors by name: `model.state_dict()`, which omits private ones.

        Raises:
            SecretError: A private tensor was registered a second time, under a name that is public.
        """
        return {name: tensor.detach().clone() for name, tensor in self._public_tensors().items()}

    def _public_tensors(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        private = {id(tensor): name for name, tensor in _withheld(self._model)}
        problems = [
            f"'{n}' is '{private[id(t)]}', which is private" for n, t in state.items() if id(t) in private
        ]
        if problems:
            raise SecretError(gathered("Public state refused.", problems, "Remove the second registration."))
        return state

    def private_state(self) -> dict[str, Tensor]:
        """Detached copies of all private tensors by name: lock layers and norm statistics, never the key."""
        return {name: tensor.detach().clone() for name, tensor in _withheld(self._model)}

    def load_public_state(self, state: NamedTensors) -> None:
        """Copies a complete public state, e.g. the server's, into the model; private tensors stay.

        Raises:
            SecretError: The state holds a private name.
            UpdateError: Tensors are missing, unexpected, wrongly shaped or typed, or non-finite. Nothing
                was changed.
        """
        self.schema("weights").check(state, subject="Public state")
        _copy(self._public_tensors(), state)

    def load_private_state(self, state: NamedTensors) -> None:
        """Copies a complete private state, e.g. this client's from an earlier round, into the model.

        Raises:
            UpdateError: Tensors are missing, unexpected, wrongly shaped or typed, or non-finite. Nothing
                was changed.
        """
        own = dict(_withheld(self._model))
        specs = {name: TensorSpec.of(tensor) for name, tensor in own.items()}
        remedy = "Load what lock.private_state() of a lock of the same model and options returned."
        check_tensors(state, specs, subject="Private state refused.", remedy=remedy)
        _copy(own, state)

    def public_gradient(self, loss: Tensor, *, retain_graph: bool = False) -> dict[str, Tensor]:
        """The gradient of a loss with respect to the public parameters: what a FedSGD client sends.

        Args:
            loss: A scalar computed by this model.
            retain_graph: Keep the graph, e.g. to differentiate the private parameters afterwards.

        Returns:
            Detached gradients by name; zeros where the loss does not depend on the parameter.

        Raises:
            UpdateError: The loss is not a scalar, or does not depend on any trainable public parameter.
        """
        if loss.numel() != 1:
            raise UpdateError(f"public_gradient: expected a scalar loss, got shape {tuple(loss.shape)}.")
        named = {name: p for name, p in self.public_parameters().items() if p.requires_grad}
        if not named or not loss.requires_grad:
            raise UpdateError("public_gradient: the loss does not depend on a trainable public parameter.")
        gradients = torch.autograd.grad(
            loss, list(named.values()), retain_graph=retain_graph, allow_unused=True
        )
        if all(gradient is None for gradient in gradients):
            raise UpdateError("public_gradient: the loss was not computed by this model.")
        pairs = zip(named.items(), gradients, strict=True)
        return {name: torch.zeros_like(p) if g is None else g.detach().to_dense() for (name, p), g in pairs}

    def schema(self, kind: UpdateKind) -> PublicSchema:
        """The allow-list of an update of this model: its public names, shapes and dtypes."""
        if kind == "gradient":
            tensors: Mapping[str, Tensor] = {
                name: p for name, p in self.public_parameters().items() if p.requires_grad
            }
        else:
            tensors = self._public_tensors()
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        return PublicSchema(kind=kind, specs=specs, private=self.private_names)

    def public_update(
        self, tensors: NamedTensors, *, kind: UpdateKind, num_samples: int, round: int
    ) -> PublicUpdate:
        """An update from tensors, refused if one of them is private by name or by content.

        Raises:
            SecretError: A private name, or a tensor that equals a private one under another name.
            UpdateError: See `PublicUpdate`.
        """
        update = PublicUpdate(schema=self.schema(kind), tensors=tensors, num_samples=num_samples, round=round)
        private = [t.detach().cpu() for _, t in _withheld(self._model)]
        copied = [name for name, t in update.tensors.items() if _equals_any(t, private)]
        if copied:
            problems = [f"'{name}' has the content of a private tensor" for name in copied]
            raise SecretError(gathered("PublicUpdate refused.", problems, "Send public tensors only."))
        return update


def _equals_any(tensor: Tensor, others: list[Tensor]) -> bool:
    # Constants (a fresh bias and a fresh running mean are both zero) carry no information.
    if tensor.numel() < 2 or bool((tensor == tensor.flatten()[0]).all()):
        return False
    flat = tensor.flatten()
    return any(flat.numel() == o.numel() and torch.equal(flat, o.flatten().to(flat.dtype)) for o in others)


def _copy(own: NamedTensors, given: NamedTensors) -> None:
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def check_not_split(model: nn.Module) -> None:
    """Refuses a model that already has private tensors.

    Raises:
        LockError: The model is locked already.
    """
    private = sorted(name for name, _ in _withheld(model))
    if private:
        raise LockError(
            f"This model is locked already (private tensors: {', '.join(private[:3])}, …). "
            "Lock the plain model, or take lock.bake() of the lock you have."
        )
