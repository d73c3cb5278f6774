"""The seam between clients' updates and the server: what every aggregation does in a round.

A round is `begin`, then for each client of the cohort either `offer` or `drop`, then `result`, or nothing
more if too few came. The trainer calls no other; an audit attacks what `what_the_server_sees` gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, final

from torch import Tensor

from fedkl.errors import ConfigError, UpdateError, shown
from fedkl.types import NamedTensors
from fedkl.update import PublicSchema, PublicUpdate

_Update = TypeVar("_Update")
_Result = TypeVar("_Result")

ServerLearns = Literal["updates", "sum", "nothing"]
"""What an aggregation lets the server read: each client's update, only their sum, or not even that."""


@dataclass(frozen=True, kw_only=True)
class FederationPlan:
    """What is known before the first round.

    Attributes:
        clients: The most samples that an update may stand for, by client, in the federation's order.
        sampled: Whether a round asks only some of them.
        steps: Whether the server takes steps of its own along what comes out, instead of passing it on.
        seed: Of whatever is simulated, e.g. who goes when. Never of a secret.
    """

    clients: Mapping[str, int]
    sampled: bool
    steps: bool
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundPlan:
    """What is agreed before anybody trains.

    Attributes:
        round: From 0.
        clients: The sampled clients, with those that will be gone, in the federation's order. By name: the
            most samples that its update may stand for.
        schema: What an update consists of.
        state: The server's public state, on which the clients train.
    """

    round: int
    clients: Mapping[str, int]
    schema: PublicSchema = field(repr=False)
    state: NamedTensors = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """Something that the server has of a round.

    Attributes:
        clients: Whose it is: one client's own, or what several have together.
    """

    clients: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenUpdate(Seen):
    """A client's update in the clear.

    Attributes:
        update: Exactly what the client sent.
    """

    update: PublicUpdate


OnSeen = Callable[[RoundPlan, tuple[Seen, ...]], None]
"""Is told what was sent to the clients of a round, and what the server has of it afterwards."""


class RoundAggregation(ABC, Generic[_Update, _Result]):
    """One round of an aggregation.

    Args:
        clients: Names of those that are asked; None: whoever comes.
    """

    def __init__(self, clients: Iterable[str] | None) -> None:
        self._clients = None if clients is None else tuple(clients)
        self._offered: dict[str, None] = {}  # sets that keep their order
        self._dropped: dict[str, None] = {}
        self._closed = False

    @property
    def offered(self) -> tuple[str, ...]:
        """Whose updates are in, in the order in which they came."""
        return tuple(self._offered)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Who has left the round, before or after its update was in."""
        return tuple(self._dropped)

    @final
    def offer(self, client: str, update: _Update) -> None:
        """Takes a client's update in.

        Raises:
            UpdateError: It is refused, and the round is as it was: the client was not asked, has offered
                already, was dropped, comes too late, or its update does not fit.
        """
        self._check_asked(client)
        states = {
            "comes after the result": self._closed,
            "has offered already": client in self._offered,
            "was dropped": client in self._dropped,
        }
        for problem, holds in states.items():
            if holds:
                raise UpdateError(f"Aggregation refused: {shown(client)} {problem}. Wait for the next round.")
        self._take(client, update)
        self._offered[client] = None

    @final
    def drop(self, client: str) -> None:
        """Notes that a client takes no further part in the round; a second time is no mistake.

        Before its offer: nothing of it is in the result. After it: what it offered stays in, and it is not
        there for steps that may follow.

        Raises:
            UpdateError: It was not asked.
        """
        self._check_asked(client)
        if client not in self._dropped:
            self._dropped[client] = None
            self._leave(client)

    @final
    def result(self) -> _Result:
        """What the round gives, once; who has neither offered nor been dropped by now is dropped.

        A round of which it is not asked reveals no more than what was offered.

        Raises:
            RoundLostError: The round gives nothing; the next one may.
            UpdateError: It was asked before, too few have offered, or nothing sound comes of what they have.
        """
        if self._closed:
            raise UpdateError("Aggregation: the result of a round is given once. Begin another round.")
        for client in self._clients or ():
            if client not in self._offered:
                self.drop(client)
        self._closed = True
        return self._result()

    @property
    def enough(self) -> bool:
        """Whether those that have offered and are still there suffice for a result."""
        return bool(self._offered)

    @property
    @abstractmethod
    def update_bytes(self) -> int:
        """Size of what one client sends; 0 if none has."""

    @abstractmethod
    def what_the_server_sees(self) -> tuple[Seen, ...]:
        """All that an honest-but-curious server has of the round so far, besides the plan.

        Raises:
            ConfigError: The round was begun without `record`.
        """

    @abstractmethod
    def _take(self, client: str, update: _Update) -> None:
        """Takes an update in, or raises UpdateError and leaves everything as it was."""

    @abstractmethod
    def _result(self) -> _Result:
        """What the round gives."""

    def _leave(self, client: str) -> None:
        """A client has left; whether its update is in says `offered`."""

    def _check_asked(self, client: str) -> None:
        if self._clients is not None and client not in self._clients:
            raise UpdateError(f"Aggregation refused: {shown(client)} was not asked in this round.")


class Aggregation(ABC):
    """How updates are aggregated, as data: a frozen dataclass with a literal `type`.

    Attributes:
        type: Its name in a configuration.
    """

    type: str

    @property
    @abstractmethod
    def server_learns(self) -> ServerLearns:
        """What the server can read. A trainer gives a server that learns nothing no optimizer."""

    def describe(self) -> str:
        """What it hides updates with, in words; empty where it hides nothing."""
        return ""

    def for_federation(self, plan: FederationPlan) -> Aggregation:
        """What aggregates the rounds of one federation: itself, if nothing is kept from round to round.

        Args:
            plan: What is known before the first round.

        Raises:
            ConfigError: The federation cannot be aggregated so.
        """
        return self

    @property
    def secrets(self) -> dict[str, Tensor]:
        """What a resumed federation needs of it, by name; as private as clients' keys. Nothing, for most."""
        return {}

    def restore(self, secrets: NamedTensors) -> None:
        """Takes over what `secrets` gave.

        Raises:
            ConfigError: It is of another federation, or nothing is expected.
        """
        if secrets:
            raise ConfigError(
                f"aggregation '{self.type}' keeps nothing, but the checkpoint has secrets of one."
            )

    @abstractmethod
    def begin(
        self, plan: RoundPlan, *, record: bool = False
    ) -> RoundAggregation[PublicUpdate, dict[str, Tensor]]:
        """Begins a round, whose result is the average by name, weighted by samples.

        Args:
            plan: What is agreed.
            record: Whether `what_the_server_sees` will be asked; it may keep every update in memory.
        """
