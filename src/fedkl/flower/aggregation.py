"""The guard's seam: what becomes of the replies to a training before the strategy gets them.

A round is that of `fedkl.aggregation`: each node's reply is offered, or the node is dropped, then there is a
result: the replies that the strategy gets. The plain one passes them on as they came. One that adds masked
replies up writes what its nodes need into the messages to them (`requests`), says itself which reply fits
(`checked`), may ask the nodes again before it gives a result (`ReplyPlan.grid`), and gives one reply, the
average, or none, where the server cannot read the sum (`passes_on`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedkl.aggregation import RoundAggregation, Seen, ServerLearns
from fedkl.errors import ConfigError, FedKLError
from fedkl.flower.replies import ReplyRules, refused, sorted_out
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec

_LOG = logging.getLogger("flwr.fedkl")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPlan:
    """What is known when a training starts, or goes on.

    Attributes:
        strategy: Gets the replies.
        evaluates: Whether the server evaluates the global arrays itself.
        timeout: Seconds that replies are waited for.
        folder: Of the checkpoints; None: none are written.
        kept: `ReplyRound.kept` of the last round; empty: there was none.
    """

    strategy: Strategy = field(repr=False)
    evaluates: bool
    timeout: float
    folder: Path | None
    kept: NamedTensors = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplyPlan:
    """What the server knows before any node trains.

    Attributes:
        round: Of the whole training, from 1.
        nodes: Who is asked.
        specs: The arrays that are sent.
        arrays: The global arrays.
        grid: Reaches the nodes; None where the guard was never asked whom to send to.
    """

    round: int
    nodes: tuple[int, ...]
    specs: Mapping[str, TensorSpec] = field(repr=False)
    arrays: ArrayRecord = field(default_factory=ArrayRecord, repr=False)
    grid: Grid | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenReply(Seen):
    """A reply in the clear.

    Attributes:
        reply: As the strategy gets it: what came, its arrays in the order in which they were sent.
    """

    reply: Message = field(repr=False)


OnSeenReplies = Callable[[ReplyPlan, tuple[Seen, ...]], None]
"""Is told what was asked in a round, and what the server has of it afterwards."""


class ReplyRound(RoundAggregation[Message, list[Message]]):
    """One round; a client's name is its node's number as a text.

    Args:
        plan: What is known.
        clients: Who may offer; None: whoever replies, which the grid has matched with what was sent.
    """

    def __init__(self, plan: ReplyPlan, *, clients: Iterable[str] | None = None) -> None:
        super().__init__(clients)
        self.plan = plan

    @property
    def passes_on(self) -> bool:
        """Whether the strategy aggregates the result; otherwise the global arrays stay as they are."""
        return True

    @property
    def kept(self) -> dict[str, Tensor]:
        """What a later round, or a training that is resumed, needs of this one; once there is a result."""
        return {}

    @property
    def needed(self) -> int:
        """Replies without which there is no result."""
        return 1

    @property
    def rejected(self) -> bool:
        """Whether those who were asked take the model of the last round for none; once all has come."""
        return False

    def requests(self, messages: Sequence[Message]) -> Sequence[Message]:
        """What is sent to the nodes in place of the strategy's messages."""
        return messages

    def told(self, errors: Sequence[Message]) -> None:
        """What came in place of replies."""

    def checked(self, reply: Message, *, rules: ReplyRules) -> Message:
        """A reply that fits, as it may be offered.

        Raises:
            UpdateError: It does not fit.
        """
        return rules.checked(reply)


class ReplyAggregation(ABC):
    """What becomes of replies.

    Attributes:
        server_learns: What the server can read.
    """

    server_learns: ServerLearns
    may_reject: ClassVar[bool] = False  # whether clients check the model that they get

    def for_training(self, plan: TrainingPlan) -> ReplyAggregation:
        """What aggregates the rounds of one training: itself, if nothing is kept from round to round.

        Raises:
            ConfigError: There is something from earlier rounds that nobody expects, or cannot be used.
        """
        if plan.kept:
            raise ConfigError(
                f"{plan.folder}: the rounds of a masked training. Give the Guard "
                "aggregation=fedkl.flower.Masked(…), or another folder for the checkpoints."
            )
        return self

    def evaluation(self, messages: Sequence[Message]) -> Sequence[Message]:
        """What is sent to the nodes in place of the strategy's messages that ask for an evaluation."""
        return messages

    def goes_on(self, kept: NamedTensors) -> None:  # noqa: B027 (most keep nothing)
        """A round counts, and this is what it keeps; see `ReplyRound.kept`."""

    def finish(self, grid: Grid, arrays: ArrayRecord) -> bool:
        """All rounds are done, and these are the global arrays.

        Returns:
            False where those who were told take the model for none.
        """
        return True

    @abstractmethod
    def begin(self, plan: ReplyPlan, *, record: bool = False) -> ReplyRound:
        """Begins a round.

        Args:
            plan: What is known.
            record: Whether `what_the_server_sees` will be asked.
        """


@dataclass(frozen=True, kw_only=True)
class PassedOn(ReplyAggregation):
    """The strategy gets the replies as they came."""

    server_learns: ClassVar[ServerLearns] = "updates"  # type: ignore[misc]  # the same for all

    def begin(self, plan: ReplyPlan, *, record: bool = False) -> ReplyRound:
        """Begins a round."""
        return _PassedOnRound(plan, record=record)


class _PassedOnRound(ReplyRound):
    """One round in which nothing is added up."""

    def __init__(self, plan: ReplyPlan, *, record: bool) -> None:
        super().__init__(plan)
        self._record = record
        self._replies: dict[str, Message] = {}

    @property
    def update_bytes(self) -> int:
        """Size of the arrays of one reply; 0 if none came."""
        first = next(iter(self._replies.values()), None)
        records = first.content.array_records.values() if first else ()
        return sum(len(array.data) for record in records for array in record.values())

    def what_the_server_sees(self) -> tuple[Seen, ...]:
        """Every reply that the strategy gets.

        Raises:
            ConfigError: The round was begun without `record`.
        """
        if not self._record:
            raise ConfigError("PassedOn: this round is not recorded. Begin it with record=True.")
        return tuple(SeenReply(clients=(node,), reply=reply) for node, reply in self._replies.items())

    def _take(self, client: str, update: Message) -> None:
        self._replies[client] = update

    def _result(self) -> list[Message]:
        return list(self._replies.values())


def collect(
    collected: ReplyRound, replies: Iterable[Message], rules: ReplyRules, *, least: int
) -> list[Message] | None:
    """What the strategy gets in a round; None, and the reason in the log, if nothing changes.

    Args:
        collected: The round, begun.
        replies: All that came.
        rules: How a reply has to look that is not masked.
        least: Replies that the round needs.
    """
    round = collected.plan.round
    check = partial(collected.checked, rules=rules)
    errors, sound = sorted_out(replies, check, round=round, with_arrays=True)
    collected.told(errors)
    for reply in sound:
        try:
            collected.offer(str(reply.metadata.src_node_id), reply)
        except FedKLError as error:
            refused(round, reply, str(error))
    for node in collected.plan.nodes:  # errors for nodes that are gone are from the SuperLink itself
        if str(node) not in collected.offered:
            collected.drop(str(node))
    count, needed = len(collected.offered), max(least, collected.needed)
    if count < least or not collected.enough:
        _LOG.warning("Round %d: %d sound replies of %d that it needs; nothing changes.", round, count, needed)
        return None
    try:
        return errors + collected.result()
    except FedKLError as error:
        _LOG.error("Round %d: %s Nothing changes.", round, error)
        return None
