"""Defenses that change what is sent, and keep nothing: one function of the change says all of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedkl.defenses.base import Defense
from fedkl.errors import ConfigError, gathered
from fedkl.keys import Uniform, imitated_uniform, normal, secure_uniform
from fedkl.protocol import Sending
from fedkl.types import NamedTensors
from fedkl.update import PublicSchema, PublicUpdate


@dataclass(frozen=True)
class Draws:
    """Random numbers for a defense: a client's from the operating system, an attacker's from its seed.

    Attributes:
        source: `fedkl.keys.secure_uniform`, or what `fedkl.keys.imitated_uniform` gives.
    """

    source: Uniform

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers in (0, 1), of the shape, dtype and device of a tensor."""
        return self.source(*like.shape).to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers, likewise."""
        return normal(self.source, *like.shape).to(like)

    def laplace(self, like: Tensor) -> Tensor:
        """Laplace numbers of scale 1, likewise."""
        uniform = self.source(*like.shape)
        sizes = -torch.log(2 * torch.minimum(uniform, 1 - uniform))
        return torch.where(uniform < 0.5, -sizes, sizes).to(like)


@dataclass(frozen=True, kw_only=True)
class UpdateDefense(Defense):
    """Base of defenses that change what is sent, and keep no tensor private.

    What they change is a gradient or, where weights are sent, the weights after minus before training: all
    tensors of floating-point numbers, norms' running statistics and other buffers included. Counts of batches
    are sent as they are, frozen parameters as they came. A tensor of several names (tied weights) is changed
    once, and sent so under all of them. `public_transform` says what an informed attacker
    makes of it; by default nothing, as is right for noise of mean 0 that is alike everywhere. Complex tensors
    are refused: norms and noise of real numbers are not those of complex ones.
    """

    @abstractmethod
    def changed(self, change: NamedTensors, *, draws: Draws, client: Sending) -> NamedTensors:
        """What is sent in place of a change, by the same names.

        Args:
            change: Of floating-point numbers.
            draws: Random numbers.
            client: What the client has at hand.
        """

    def check_sent(self, schema: PublicSchema) -> None:
        """Refuses complex tensors, which would be sent as they are.

        Raises:
            ConfigError: With their names.
        """
        _check_real(self, {name: spec.dtype for name, spec in schema.specs.items()})

    def transform(self, update: PublicUpdate, *, client: Sending) -> PublicUpdate:
        """Changes an update, with random numbers from the operating system.

        Raises:
            ConfigError: See `check_sent`.
        """
        self.check_sent(update.schema)
        changing = update.tensors.keys() - client.frozen
        again = {name: first for name, first in client.tied.items() if {name, first} <= changing}
        floating = {
            name: tensor
            for name, tensor in update.tensors.items()
            if tensor.is_floating_point() and name in changing and name not in again
        }
        draws = Draws(secure_uniform)
        if update.kind == "gradient":
            sent = dict(self.changed(floating, draws=draws, client=client))
        else:
            before = {name: client.received[name].to(tensor) for name, tensor in floating.items()}
            change = {name: tensor - before[name] for name, tensor in floating.items()}
            changed = self.changed(change, draws=draws, client=client)
            sent = {name: before[name] + tensor for name, tensor in changed.items()}
            for name in sent:
                if name.endswith("running_var"):  # else noise makes a norm divide by a root of less than 0
                    sent[name] = sent[name].clamp_min(0)
        as_they_came = {name: client.received[name] for name in client.frozen if name in update.tensors}
        sent |= {name: sent[first] for name, first in again.items() if first in sent}
        return replace(update, tensors={**update.tensors, **as_they_came, **sent})

    def imitate_transform(
        self, changes: Mapping[str, Tensor], *, clients: Sequence[Sending], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Changes the updates of clients that the attacker plays, one by one, with numbers from its seed.

        Raises:
            ConfigError: There are complex ones.
        """
        _check_real(self, {name: tensor.dtype for name, tensor in changes.items()})
        draws = Draws(imitated_uniform(generator))
        each = [
            self.changed({name: tensor[place] for name, tensor in changes.items()}, draws=draws, client=at)
            for place, at in enumerate(clients)
        ]
        return {name: torch.stack([sent[name] for sent in each]) for name in changes}


def _check_real(defense: Defense, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raises ConfigError with the names of complex tensors."""
    problems = [f"'{name}' is {dtype}" for name, dtype in dtypes.items() if dtype.is_complex]
    if problems:
        raise ConfigError(
            gathered(
                f"{type(defense).__name__}: expected real numbers, which it can change, got complex ones.",
                problems,
                "Keep them as real parameters, torch.view_as_real(…), and call torch.view_as_complex(…) in "
                "forward. Constants need not be sent: register_buffer(…, persistent=False).",
            )
        )
