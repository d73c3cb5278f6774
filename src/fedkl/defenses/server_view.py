"""What a server has of a client, and what it can build from that."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from fedkl.keys import Key
from fedkl.locking import Generation
from fedkl.types import NamedTensors


@dataclass(frozen=True, kw_only=True, eq=False)
class ServerView:
    """What the server can build: the public tensors, what it was granted, and its own guess of the rest.

    Attributes:
        model: The plain model, private parameters as ordinary ones.
        private: Names of its parameters that the client does not send.
        secrets: What generates some of them, by name: a key and lock layers.
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
