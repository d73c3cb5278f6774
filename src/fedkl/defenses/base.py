"""What every defense does. Defenses know nothing of attacks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedkl.keys import Key
from fedkl.locking import Generation, Lock, Split
from fedkl.types import NamedTensors
from fedkl.update import PublicUpdate


@runtime_checkable
class Granted(Protocol):
    """Which secrets an experiment grants to the server, besides what is public."""

    @property
    def key(self) -> bool:
        """The client's key."""

    @property
    def lock_layers(self) -> bool:
        """The weights of the lock layers, and the values of other private parameters."""

    @property
    def affine(self) -> bool:
        """The values of γ and β, the norm statistics, and the values of private layers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ServerView:
    """What the server can build: the public tensors, what it was granted, and its own guess of the rest.

    Attributes:
        model: The plain model, γ and β as ordinary parameters.
        private: Names of its parameters that the client does not send.
        secrets: What generates those of a key-lock: a key and lock layers, by name.
        generate: Maps `secrets` to parameters of `model`; None where nothing is generated.
    """

    model: nn.Module = field(repr=False)
    private: tuple[str, ...] = ()
    secrets: dict[str, Tensor] = field(default_factory=dict, repr=False)
    generate: Generation | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What a server has of one client.

    Attributes:
        public: The public state.
        key: The key, if granted.
        private: The private parameters (lock layers, private layers), if granted.
    """

    public: NamedTensors = field(repr=False)
    key: Key | None = None
    private: NamedTensors = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Defense:
    """Base of all defenses: an undefended client."""

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """Splits a copy of the model into private and public tensors.

        Args:
            model: The plain model; not changed.
            key: The client's key, for defenses that use one; a new one if None.
        """
        return Split(copy.deepcopy(model))

    def for_images(self, shape: tuple[int, int, int]) -> Defense:
        """The same defense, for a model that is called with images of this shape.

        Args:
            shape: Of one image, ``(channels, height, width)``.
        """
        return self

    def for_untrained(self) -> Defense:
        """The same defense, for a model that is known to be untrained: no γ and β of it are kept.

        Where norms are initialized with other values than γ = 1 and β = 0, they look trained.
        """
        return self

    def transform(self, update: PublicUpdate) -> PublicUpdate:
        """What the client does to an update before it is sent."""
        return update

    @property
    def public_transform(self) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None:
        """What `transform` does to the tensors, for an attacker who does the same to its own gradients.

        Differentiable, without secrets; None where nothing is done. A defense that overrides `transform` says
        it here too: the attacker knows the defense.
        """
        return None

    def server_view(self, victim: Split, model: nn.Module, *, granted: Granted) -> ServerView:
        """What the server can build, with one fill-in for what it was not granted.

        The server knows the architecture and the defense: it prepares the model as a client would, with
        secrets of its own, and puts in the public tensors and whatever it was granted.

        Args:
            victim: The client's split; only what is public or granted is read.
            model: What the server started from: the architecture, and of a trained model γ and β too. Never
                one with values that the client has found since.
            granted: The secrets that the server knows.
        """
        if granted.affine:
            return ServerView(model=plain_copy(victim))
        view = self.imitated(model, known=self.known(victim, granted=granted))
        private = tuple(view.private_parameters())
        if not isinstance(view, Lock):
            return ServerView(model=plain_copy(view), private=private)
        generate, secrets = view.generation(), view.reveal_secrets()
        layers = (name for name in private if name not in secrets)
        return ServerView(
            model=plain_copy(view),
            private=(*(link.tensor for link in generate.links), *layers),
            secrets=secrets,
            generate=generate,
        )

    def known(self, victim: Split, *, granted: Granted) -> Known:
        """What the server has of a client: what is public, and the key and lock layers if granted."""
        return Known(
            public=victim.public_state(),
            key=victim.key if isinstance(victim, Lock) and granted.key else None,
            private=victim.private_parameters() if granted.lock_layers else {},
        )

    def imitated(self, model: nn.Module, *, known: Known) -> Split:
        """A client as the server would build it: with what it knows, and draws of its own for the rest.

        Where clients start at a trained model's γ and β, so does this one, since the server knows that model;
        what the client made of them since, it does not know.

        Args:
            model: What the server started from, as for `server_view`.
            known: Of the client that is imitated.
        """
        split = self.prepare(model, key=known.key)
        split.load_public_state(known.public)
        with torch.no_grad():
            for name, parameter in split.private_parameters().items():
                if name in known.private:
                    parameter.copy_(known.private[name])
        return split


def plain_copy(split: Split) -> nn.Module:
    """A plain model with all tensors, private ones included, as ordinary parameters and buffers."""
    return split.bake() if isinstance(split, Lock) else copy.deepcopy(split.model)
