"""How modules withhold their private tensors from states and pickles.

It is structural: a module that holds private tensors withholds them from `state_dict()` itself, wherever it
sits in whatever model, and refuses them in `load_state_dict()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fedkl.errors import LockError, SecretError, gathered
from fedkl.modelfile import PRIVATE_STATE
from fedkl.norms import statistics_names

_MARK = "_fedkl_withheld"


class _Withheld:
    """Hooks of one module that keep some of its own tensors out of state dictionaries and pickles.

    Attributes:
        names: Local names of those tensors.
        statistics: How often it was said that the statistics of every norm below the module are to be
            private; then a state is refused which a norm added since would be in.
        released: Local names of tensors that were private once and are ordinary ones of a plain model now.
    """

    released: tuple[str, ...] = ()  # of the class: models that were pickled before have none of their own

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.statistics = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Withheld:
        memo[id(self)] = replica = type(self)()
        replica.names, replica.statistics, replica.released = self.names, self.statistics, self.released
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
        if self.open_in(module):
            metadata[PRIVATE_STATE] = True
        if self.statistics:
            _refuse_open_statistics(module, prefix)

    def open_in(self, module: nn.Module) -> tuple[str, ...]:
        """Those released names that a state of the module would hold."""
        own = {*module._parameters, *module._buffers}.difference(self.names)
        return tuple(name for name in self.released if name in own)

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
    mark = _marked(module)
    mark.names += tuple(name for name in names if name not in mark.names)


def _marked(module: nn.Module) -> _Withheld:
    mark: _Withheld | None = module.__dict__.get(_MARK)
    if mark is None:
        mark = module.__dict__[_MARK] = _Withheld()
        # Functions of the module, not bound methods: deepcopy copies the mark and its hooks as one.
        module.register_state_dict_post_hook(_Hook(mark, "save"))  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_Hook(mark, "load"))  # type: ignore[no-untyped-call]
    return mark


class _Hook:
    """Calls one method of a mark; survives deepcopy together with it."""

    def __init__(self, mark: _Withheld, method: str) -> None:
        self._mark = mark
        self._method = method

    def __call__(self, *args: Any) -> None:
        getattr(self._mark, self._method)(*args)


def withhold_statistics(model: nn.Module) -> None:
    """Makes the running statistics of every norm of the model private.

    After one local step they give the batch's mean and variance away. From now on `state_dict()` raises a
    SecretError when a norm was added or converted since; call this again then.
    """
    _marked(model).statistics += 1
    for module in model.modules():
        names = statistics_names(module)
        if names:
            withhold(module, names)


def statistics_revision(model: nn.Module) -> int:
    """How often `withhold_statistics` was called for this model."""
    mark = model.__dict__.get(_MARK)
    return mark.statistics if mark else 0


def _refuse_open_statistics(model: nn.Module, prefix: str) -> None:
    problems = []
    for name, module in model.named_modules(prefix=prefix.removesuffix(".")):
        mark = module.__dict__.get(_MARK)
        public = sorted(set(statistics_names(module)).difference(mark.names if mark else ()))
        if public:
            problems.append(f"'{name}' ({type(module).__name__}): {', '.join(public)}")
    if problems:
        remedy = (
            "Add or convert norms before locking, or call fedkl.locking.withhold_statistics(model) after it. "
            "If they are to be sent, lock with share_statistics=True."
        )
        summary = "State refused: these norms came after the lock, and their statistics would be public."
        raise SecretError(gathered(summary, problems, remedy))


def release(model: nn.Module) -> None:
    """Ends the withholding: every tensor of the model is in its `state_dict()` again; see `is_private`."""
    for module in model.modules():
        mark = module.__dict__.get(_MARK)
        if mark is not None:
            mark_released(module, mark.names)
            mark.names, mark.statistics = (), 0


def mark_released(module: nn.Module, names: tuple[str, ...]) -> None:
    """Notes that tensors which the module directly owns hold what a lock kept private."""
    mark = _marked(module)
    mark.released += tuple(name for name in names if name not in mark.released)


def make_public(model: nn.Module) -> None:
    """Says that nothing released is private any more: for controls, whose γ and β everybody may know."""
    for module in model.modules():
        mark = module.__dict__.get(_MARK)
        if mark is not None:
            mark.released = ()


def released(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """What was private and would be in the model's `state_dict()`: module, local name, qualified name."""
    for prefix, module in model.named_modules():
        mark = module.__dict__.get(_MARK)
        for name in mark.open_in(module) if mark else ():
            yield module, name, f"{prefix}.{name}" if prefix else name


def is_private(model: nn.Module) -> bool:
    """Whether a model is one client's own, made by `bake()`: its `state_dict()` holds what was private.

    The mark is on the modules. It survives `copy.deepcopy` and `torch.save` of the model, and moving a module
    into another model. **It is not on tensors**: who builds a state by hand from `parameters()`, or loads
    this one into a plain model, has lost it.

    >>> from torch import nn
    >>> import fedkl
    >>> lock = fedkl.lock(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    >>> is_private(lock.model), is_private(lock.bake())
    (False, True)
    """
    return next(released(model), None) is not None


def withheld(model: nn.Module, *, aliases: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The private tensors of a model by qualified name.

    Args:
        model: The model.
        aliases: Give those of a module with several names under each of them.
    """
    for prefix, module in model.named_modules(remove_duplicate=not aliases):
        mark = module.__dict__.get(_MARK)
        for name in mark.names if mark else ():
            yield (f"{prefix}.{name}" if prefix else name), getattr(module, name)


def check_not_split(model: nn.Module) -> None:
    """Refuses a model that already has private tensors.

    Raises:
        LockError: The model is locked already.
    """
    private = sorted(name for name, _ in withheld(model))
    if private:
        raise LockError(
            f"This model is locked already (private tensors: {', '.join(private[:3])}, …). "
            "Lock the plain model, or take lock.bake() of the lock you have."
        )
