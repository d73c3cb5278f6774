"""The split of a model's tensors into private and public, and how states of either side move."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedkl.errors import ConfigError, LockError, SecretError, UpdateError, gathered, shown
from fedkl.keys import Key, Uniform, secure_uniform
from fedkl.locking.copying import copied
from fedkl.locking.generation import Generation
from fedkl.locking.withholding import release, statistics_revision, withheld
from fedkl.secret_search import SecretSearch
from fedkl.types import NamedTensors
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec, UpdateKind, check_tensors


class Split:
    """A model whose tensors are divided into private ones, which stay with the client, and public ones.

    Args:
        model: The model, with its private tensors already withheld (see `withhold`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, bool] = {}  # all that was ever private; whether it is a parameter
        self._revision = 0

    @property
    def model(self) -> nn.Module:
        """The model; call it as ever."""
        return self._model

    @property
    def private_names(self) -> frozenset[str]:
        """Every name, aliases of shared modules included, under which a private tensor can be found."""
        return frozenset(name for name, _ in withheld(self._model, aliases=True))

    def public_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors that are sent, by name. The same objects as in `model.named_parameters()`.

        Raises:
            SecretError: A private tensor is gone; see `public_state`.
        """
        self._check_nothing_lost()
        private = {id(tensor) for _, tensor in withheld(self._model)}
        named = self._model.named_parameters()
        return {name: parameter for name, parameter in named if id(parameter) not in private}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Public parameters without frozen ones, by name: what a gradient is of.

        Raises:
            SecretError: See `public_state`.
        """
        return {name: p for name, p in self.public_parameters().items() if p.requires_grad}

    def frozen_parameters(self) -> frozenset[str]:
        """All names, those of tied weights too, of public parameters that training leaves alone.

        Raises:
            SecretError: See `public_state`.
        """
        self._check_nothing_lost()
        return frozen_names(self._model) - self.private_names

    def tied_names(self) -> dict[str, str]:
        """Further names of public tensors that have several, and the first name of each.

        Raises:
            SecretError: See `public_state`.
        """
        return tied_names(self._public_tensors())

    def private_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors that stay: lock layers, private layers. `model.parameters()` has them too."""
        private = dict(withheld(self._model))
        return {name: tensor for name, tensor in private.items() if isinstance(tensor, nn.Parameter)}

    def public_state(self) -> dict[str, Tensor]:
        """Detached copies of all public tensors by name: `model.state_dict()`, which omits private ones.

        Raises:
            SecretError: A private tensor was registered a second time, under a name that is public, or is
                gone (its lock was removed, or fused into another layer), or a norm whose statistics would be
                public was added since the model was locked.
            LockError: The state holds what is no parameter or buffer of the model: a copy, or an extra state.
        """
        return {name: tensor.detach().clone() for name, tensor in self._public_tensors().items()}

    def _public_tensors(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        self._check_nothing_lost()
        private = {id(tensor): name for name, tensor in withheld(self._model)}
        problems = [
            f"'{n}' is '{private[id(t)]}', which is private" for n, t in state.items() if id(t) in private
        ]
        if problems:
            raise SecretError(gathered("Public state refused.", problems, "Remove the second registration."))
        _check_own(self._model, state)
        return state

    def _check_nothing_lost(self) -> None:
        """What was private once may stand in a public tensor when it is gone: fused, or turned into a γ.

        Raises:
            SecretError: With the names.
        """
        revision = statistics_revision(self._model)
        if revision != self._revision:  # the user says which norms there are now
            self._revision = revision
            self._kept = {name: True for name, is_parameter in self._kept.items() if is_parameter}
        now = {n: isinstance(t, nn.Parameter) for n, t in withheld(self._model, aliases=True)}
        lost = sorted(self._kept.keys() - now.keys())
        self._kept |= now
        if lost:
            problems = [f"{shown(name)} was private and is no longer there" for name in lost]
            remedy = (
                "remove_parametrizations and fused layers put private numbers into public tensors. Undo "
                "that, or build the plain model anew and lock it; lock.bake() gives a plain copy."
            )
            raise SecretError(gathered("Public state refused: the lock was altered.", problems, remedy))

    def private_state(self) -> dict[str, Tensor]:
        """Detached copies of all private tensors by name: lock layers and norm statistics, never the key."""
        return {name: tensor.detach().clone() for name, tensor in withheld(self._model)}

    @property
    def key(self) -> Key | None:
        """The client's key; None where there is no lock."""
        return None

    def use_key(self, key: Key | None) -> None:
        """Puts another client's key in; nothing where there is no lock."""

    def bake(self) -> nn.Module:
        """A plain copy of the model, private tensors included, as ordinary parameters and buffers.

        As private as the split itself; see `fedkl.locking.is_private`.
        """
        plain = copied(self._model, subject="bake")
        release(plain)
        return plain

    def generation(self) -> Generation | None:
        """How `reveal_secrets` become parameters of `bake()`; None where nothing is generated."""
        return None

    def reveal_secrets(self) -> dict[str, Tensor]:
        """Copies of what parameters are generated from, by name. Never to be sent."""
        return {}

    def redraw(self, *, key: Key | None = None, uniform: Uniform = secure_uniform) -> None:
        """Draws all secrets anew, as for another client; what is public stays, and so do norm statistics.

        One instance can thus give many clients their secrets. Here there is nothing to draw.

        Args:
            key: The key, for an attacker who knows it; a new one if None.
            uniform: Where random numbers come from: the operating system, but for an attacker who plays
                clients.
        """

    def check_finite(self, *, subject: str) -> None:
        """Refuses to begin with numbers that are not finite: training would seem to diverge.

        Args:
            subject: First words of the error.

        Raises:
            ConfigError: There are some, by name.
            SecretError: See `public_state`.
        """
        broken = [name for name, tensor in self.full_state().items() if not tensor.isfinite().all()]
        if broken:
            raise ConfigError(
                gathered(
                    f"{subject}: expected a model of finite numbers to begin with, got others.",
                    [f"{shown(name)} has non-finite values" for name in broken],
                    "A constant, such as a mask with -inf, need not be sent: register_buffer(…, "
                    "persistent=False). Give weights of a training that did not diverge.",
                )
            )

    def full_state(self) -> dict[str, Tensor]:
        """Public and private state together, never the key: for the client's own checkpoints.

        Never to be sent: it holds everything that the lock keeps from the server.

        Raises:
            SecretError: See `public_state`.
        """
        return {**self.public_state(), **self.private_state()}

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
        _load(dict(withheld(self._model)), state, kind="private")

    def load_full_state(self, state: NamedTensors) -> None:
        """Copies a complete full state, this client's own checkpoint, into the model.

        Raises:
            UpdateError: Tensors are missing, unexpected, wrongly shaped or typed, or non-finite. Nothing
                was changed.
        """
        _load({**self._public_tensors(), **dict(withheld(self._model))}, state, kind="full")

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
        named = self.trained_parameters()
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
        """The allow-list of an update of this model: its public names, shapes and dtypes.

        Raises:
            SecretError: See `public_state`.
        """
        tensors: Mapping[str, Tensor] = self._public_tensors()
        if kind == "gradient":
            tensors = self.trained_parameters()
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        return PublicSchema(kind=kind, specs=specs, private=self.private_names)

    def public_update(
        self, tensors: NamedTensors, *, kind: UpdateKind, num_samples: int, round: int, search: bool = True
    ) -> PublicUpdate:
        """An update from tensors, refused if one of them is private by name or by content.

        Args:
            tensors: Exactly the public ones, see `schema`.
            kind: ``"gradient"`` or ``"weights"``.
            num_samples: How many training samples stand behind it.
            round: The communication round, from 0.
            search: Look for private numbers inside the tensors; `fedkl.secret_search` says what that finds.
                Not needed for tensors that come straight from `public_state` or `public_gradient`.

        Raises:
            SecretError: A private name, a tensor that equals a secret one under another name, or private
                numbers in a tensor.
            UpdateError: See `PublicUpdate`.
        """
        update = PublicUpdate(schema=self.schema(kind), tensors=tensors, num_samples=num_samples, round=round)
        secrets = [secret.detach().cpu() for secret in self.secrets()]
        copied = [name for name, t in update.tensors.items() if _equals_any(t, secrets)]
        problems = [f"{shown(name)} has the content of a private tensor" for name in copied]
        if search and not problems:
            numbers = SecretSearch(secrets)
            found = [name for name, tensor in update.tensors.items() if numbers.in_numbers(tensor)]
            problems = [f"{shown(name)} holds numbers of a private tensor" for name in found]
        if problems:
            raise SecretError(gathered("PublicUpdate refused.", problems, "Send public tensors only."))
        return update

    def secrets(self) -> list[Tensor]:
        """Every tensor whose content an update must not carry, under whatever name. Never to be sent."""
        return [tensor for _, tensor in withheld(self._model)]


def frozen_names(model: nn.Module) -> frozenset[str]:
    """All names, those of tied weights too, of a model's parameters that require no gradient."""
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if not parameter.requires_grad)


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names of tensors that are there under several, and the first name of each."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return {name: first_name for name, first_name in names.items() if name != first_name}


def _check_own(model: nn.Module, state: Mapping[str, object]) -> None:
    """Checks that a state is the model's own tensors: into a copy nothing could be loaded.

    A copy is not known as private either: a norm that saves itself would save the γ that its lock makes.

    Raises:
        LockError: With the names.
    """
    modules = list(model.modules())
    own = {id(tensor) for m in modules for tensor in (*m._parameters.values(), *m._buffers.values())}
    problems = [
        f"{shown(name)} is a copy or a result, expected a registered parameter or buffer"
        if isinstance(value, Tensor)
        else f"{shown(name)} is a {type(value).__name__}, expected a registered parameter or buffer"
        for name, value in state.items()
        if id(value) not in own
    ]
    if problems:
        summary = (
            f"Public state refused: state_dict() of this {type(model).__name__} makes tensors of its own."
        )
        remedy = (
            "What comes from the server could not be loaded into them. Register the tensors, and take out "
            "the hook, _save_to_state_dict or get_extra_state that puts others into the state."
        )
        raise LockError(gathered(summary, problems, remedy))


def _equals_any(tensor: Tensor, others: list[Tensor]) -> bool:
    # Constants (a fresh bias and a fresh running mean are both zero) carry no information.
    if tensor.numel() < 2 or bool((tensor == tensor.flatten()[0]).all()):
        return False
    flat = tensor.flatten()
    return any(flat.numel() == o.numel() and torch.equal(flat, o.flatten().to(flat.dtype)) for o in others)


def _load(own: NamedTensors, state: NamedTensors, *, kind: str) -> None:
    specs = {name: TensorSpec.of(tensor) for name, tensor in own.items()}
    remedy = f"Load what lock.{kind}_state() of a lock of the same model and options returned."
    check_tensors(state, specs, subject=f"{kind.capitalize()} state refused.", remedy=remedy)
    _copy(own, state)


def _copy(own: NamedTensors, given: NamedTensors) -> None:
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])
