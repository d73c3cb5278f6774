"""A federated client: what it keeps between rounds, and never gives away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from jaxtyping import Int64
from torch import Tensor, nn

from fedkl.defenses import Defense
from fedkl.errors import DataError, SecretError
from fedkl.federated.optimizer_state import OptimizerState
from fedkl.keys import Key
from fedkl.locking import Split
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec


class Client:
    """One client: which samples it has, its key, private state and optimizer state.

    It has no model: a worker lends it one for a round, see `fedkl.federated.worker`.

    Args:
        name: Stable name; seeds its batch order.
        samples: Indexes of its training samples, shape ``(samples,)``.
        split: The client's own prepared model, of which its key and private state are taken.
        room: Tensors that its private state is kept in; None: of its own.

    Raises:
        DataError: There are no samples.
    """

    def __init__(
        self,
        *,
        name: str,
        samples: Int64[Tensor, " samples"],
        split: Split,
        room: NamedTensors | None = None,
    ) -> None:
        if len(samples) == 0:
            raise DataError(f"Client '{name}': expected at least one training sample, got none.")
        self.name = name
        self.samples = samples
        self._key = split.key
        state = split.private_state()
        self._private_state = state if room is None else room
        self._write(state)
        self._optimizer_state: OptimizerState = {}
        self._rounds = 0
        self._revision = 0

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SecretError("A Client holds private tensors and cannot be pickled.")

    def __repr__(self) -> str:
        return f"Client({self.name!r}, samples={self.num_samples}, key={self._key})"

    @property
    def num_samples(self) -> int:
        """Number of training samples."""
        return len(self.samples)

    @property
    def trained(self) -> bool:
        """Whether it has trained in any round yet."""
        return self._rounds > 0

    @property
    def rounds(self) -> int:
        """In how many rounds it has trained."""
        return self._rounds

    @property
    def revision(self) -> int:
        """What it keeps changes with this number, which is of this process only."""
        return self._revision

    @property
    def key(self) -> Key | None:
        """Its key, if the defense uses one."""
        return self._key

    @property
    def private_state(self) -> NamedTensors:
        """A copy of its lock layers and norm statistics."""
        return {name: tensor.clone() for name, tensor in self._private_state.items()}

    @property
    def private_specs(self) -> dict[str, TensorSpec]:
        """What its private state consists of."""
        return {name: TensorSpec.of(tensor) for name, tensor in self._private_state.items()}

    @property
    def optimizer_state(self) -> OptimizerState:
        """Its optimizer's state; as private as what it optimizes."""
        return self._optimizer_state

    def enter(self, split: Split, state: NamedTensors) -> None:
        """Puts the server's public state and this client's own key and private state into a model."""
        split.load_public_state(state)
        split.use_key(self._key)
        split.load_private_state(self._private_state)

    def keep(self, private_state: NamedTensors, optimizer_state: OptimizerState) -> None:
        """Takes over what a round of training left; called when all of the round went well."""
        self._write(private_state)
        self._optimizer_state = optimizer_state
        self._rounds += 1
        self._revision += 1

    def keep_statistics(self, private_state: NamedTensors) -> None:
        """Takes over norm statistics that were counted anew; all else in the state is as it was."""
        self._write(private_state)
        self._revision += 1

    def restore(
        self, *, key: Key | None, private_state: NamedTensors, optimizer_state: OptimizerState, rounds: int
    ) -> None:
        """Takes over what a checkpoint kept, which must have been found to fit."""
        self._key = key
        self._write(private_state)
        self._optimizer_state = optimizer_state
        self._rounds = rounds
        self._revision += 1

    def _write(self, private_state: NamedTensors) -> None:
        for name, tensor in self._private_state.items():
            tensor.copy_(private_state[name])


def clients_of(parts: Sequence[Tensor], defense: Defense, model: nn.Module) -> list[Client]:
    """One client for each part of the samples, all with secrets of their own.

    Their private states lie together, a block for each tensor: allocated one by one, 10,000 of them took
    twice their size.

    Args:
        parts: Indexes of each client's training samples.
        defense: What every client does.
        model: The plain architecture; not changed.

    Raises:
        DataError: A part is empty.
    """
    split = defense.prepare(model)
    state = split.private_state()
    blocks = {name: tensor.new_empty((len(parts), *tensor.shape)) for name, tensor in state.items()}
    clients = []
    for index, part in enumerate(parts):
        split.redraw()
        room = {name: block[index] for name, block in blocks.items()}
        clients.append(Client(name=f"client-{index}", samples=part, split=split, room=room))
    return clients
