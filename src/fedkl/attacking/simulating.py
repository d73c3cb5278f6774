"""Clients that the server plays itself, with secrets of its own draw."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.attacking.gradients import gradients, stacked
from fedkl.attacking.updates import difference, mean_of, updated
from fedkl.defenses import Arm, Defense
from fedkl.defenses.server_view import Known
from fedkl.keys import imitated_uniform
from fedkl.locking import Split
from fedkl.protocol import Procedure, Sending, trained_parameters
from fedkl.protocol.differentiable import transformed


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedClients:
    """`Auxiliary.simulate`: clients with fresh secrets, but for what the server was granted.

    Nothing of the victim is in here that was not granted.

    Attributes:
        defense: What clients do.
        model: The plain architecture.
        known: What the server has of the victim, the first of a cohort.
        baked: The victim's network with γ and β as numbers, where they are known; None: they are drawn.
        common: Whether γ and β are public, and so those of every client.
        names: The tensors that are observed.
        private: The plain network's parameters that clients do not send.
        train_mode: Of the clients' norms.
        local: What the clients do.
        cohort: So many clients share each batch; what is seen is their mean.
        generator: The attacker's, of what these clients draw.
        played: Numbers that make every client's augmentation its own.
        called: Numbers that make what a network draws on the way forward each call's own.
        settle: Gives a client that was drawn what it has of earlier rounds; the default: nothing.
    """

    defense: Defense
    model: nn.Module = field(repr=False)
    known: Known = field(repr=False)
    baked: nn.Module | None = field(repr=False)
    common: bool
    names: tuple[str, ...]
    private: tuple[str, ...]
    train_mode: bool
    local: Procedure
    cohort: int = 1
    generator: torch.Generator = field(default_factory=torch.Generator, repr=False)
    played: Iterator[int] = field(default_factory=itertools.count, repr=False)
    called: Iterator[int] = field(default_factory=itertools.count, repr=False)
    settle: Callable[[Split], None] = field(default=lambda split: None, repr=False)

    @classmethod
    def of(
        cls,
        arm: Arm,
        victim: Split,
        model: nn.Module,
        *,
        train_mode: bool = True,
        local: Procedure,
        cohort: int = 1,
        generator: torch.Generator | None = None,
    ) -> SimulatedClients:
        """The clients of an arm.

        Args:
            arm: What the server knows.
            victim: Only what is public or granted is taken.
            model: The plain architecture.
            train_mode: Of the clients' norms.
            local: What the clients do.
            cohort: So many clients share each batch.
            generator: The attacker's, of what these clients draw; a fresh one if None.
        """
        granted = arm.knowledge
        plain = victim.bake()
        baked = plain if granted.affine else None
        names = set(victim.trained_parameters())
        parameters = set(trained_parameters(plain))
        private = parameters - names
        if granted.affine_gradient and baked is not None:
            names = parameters
        if granted.lock_gradient:
            names |= set(victim.private_parameters())
        return cls(
            defense=arm.defense,
            model=model,
            known=arm.defense.known(victim, granted=granted),
            baked=baked,
            common=granted.affine_gradient,
            names=tuple(sorted(names)),
            private=tuple(sorted(private)),
            train_mode=train_mode,
            local=arm.defense.procedure(local),
            cohort=cohort,
            generator=generator or torch.Generator(),
        )

    def draw(self) -> dict[str, Tensor]:
        """The private parameters of one client; see `Auxiliary`."""
        plain = self.baked
        if plain is None:
            plain = self.defense.imitated(self.model, known=self.known, generator=self.generator).bake()
        return {name: plain.get_parameter(name).detach().clone() for name in self.private}

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Updates of one client or cohort, stacked; see `Auxiliary`."""
        members = [self._client(granted=self.common or not member) for member in range(self.cohort)]
        shares = zip(members, images.chunk(self.cohort, 1), labels.chunk(self.cohort, 1), strict=True)
        with self._own_numbers(images.device):
            return mean_of([self._sent(*member, x, y) for member, x, y in shares])

    def _own_numbers(self, device: torch.device) -> AbstractContextManager[None]:
        """Lets what networks draw from global generators follow the attacker's: dropout's, say."""
        own = rng.generator(self.generator.initial_seed(), "simulated-passes", next(self.called))
        return rng.seeded(own.initial_seed(), device=device)

    def _client(self, *, granted: bool) -> tuple[nn.Module, Collection[str]]:
        """The victim's network, as far as the server was granted its secrets, or another client's.

        Returns:
            And the names of its private parameters.
        """
        if granted and self.baked is not None:
            return copy.deepcopy(self.baked), () if self.common else self.private
        known = self.known if granted else replace(self.known, key=None, private={})
        split = self.defense.imitated(self.model, known=known, generator=self.generator)
        self.settle(split)
        # In one step it is all the same whether γ and β are generated or numbers, but to the lock's gradient.
        alike = self.local.is_gradient and not set(self.names).intersection(split.private_parameters())
        return (split.bake(), self.private) if alike else (split.model, split.private_parameters())

    def _sent(
        self, network: nn.Module, private: Collection[str], images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """What it sends for each batch, stacked."""
        if self.local.is_gradient and self.local.differentiable:
            updates = gradients(
                *(network, images, labels),
                names=self.names,
                train_mode=self.train_mode,
                local=self.local,
                uniform=imitated_uniform(self.generator),
            )
        else:
            update = partial(
                updated,
                network,
                train_mode=self.train_mode,
                local=self.local,
                private=private,
                generator=rng.generator(next(self.played), "simulated-augmentation"),
                uniform=imitated_uniform(self.generator),
            )
            kept = self._sent_buffers(network)
            each = [
                _with_buffers(update, network, kept, x, y, lr=self.local.lr)
                for x, y in zip(images, labels, strict=True)
            ]
            updates = stacked(each, [*self.names, *kept])
        sent = self._transformed(updates, network, images, labels)
        return {name: sent[name] for name in self.names}

    def _sent_buffers(self, network: nn.Module) -> dict[str, Tensor]:
        """Norms' running statistics as they came, where weights are sent: a change is made of them too."""
        if self.local.algorithm != "fedavg":
            return {}
        return {
            name: tensor.clone()
            for name, tensor in network.named_buffers()
            if name in self.known.public and tensor.is_floating_point()
        }

    def _transformed(
        self, updates: Mapping[str, Tensor], network: nn.Module, images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """What the defense does to them before they are sent, in the units in which they are seen."""
        received = {name: parameter.detach() for name, parameter in network.named_parameters()}
        received |= dict(network.named_buffers())
        clients = [Sending.of(received, network, x, y) for x, y in zip(images, labels, strict=True)]
        imitate = partial(self.defense.imitate_transform, clients=clients, generator=self.generator)
        return transformed(updates, imitate, procedure=self.local)


def _with_buffers(
    update: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    network: nn.Module,
    received: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    lr: float,
) -> dict[str, Tensor]:
    """An update with what its training made of some buffers, which are as they came before and after it."""
    buffers = dict(network.named_buffers())
    found = dict(update(images, labels))
    after = {name: buffers[name].clone() for name in received}
    for name, tensor in received.items():
        buffers[name].copy_(tensor)
    return found | difference(received, after, lr=lr)
