"""Flower apps, unchanged, in one process: no SuperLink, no ray, no sockets.

This file alone leans on what Flower keeps internal: messages ask `TaskIdentity` who they are from, and carry
an id that otherwise a SuperLink gives them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_RUN, _SERVER = 1, 1
_FIRST_NODE = 1000
_RAISED = 2  # Flower's code for an exception in a ClientApp

Config = Mapping[str, UserConfigValue]


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    clients: int,
    run_config: Config | None = None,
    node_config: Config | None = None,
    observe: Callable[[Message], None] | None = None,
) -> None:
    """Runs a ServerApp and its ClientApp to the end, one client after the other.

    Args:
        server_app: The app's server.
        client_app: The app's client.
        clients: Number of nodes.
        run_config: Of both.
        node_config: Of every node, besides ``partition-id`` and ``num-partitions``.
        observe: Is shown every message: a request before its client, a reply before the server.
    """
    run = dict(run_config or {})
    grid = InProcessGrid(
        client_app, clients=clients, run_config=run, node_config=node_config, observe=observe
    )
    context = Context(_RUN, _SERVER, {}, RecordDict(), run)
    with _identity():
        server_app(grid=grid, context=context)


class InProcessGrid(Grid):
    """A grid whose nodes answer at once, in this thread; each keeps its Flower context over the rounds.

    Args:
        client_app: What the nodes run.
        clients: Number of nodes.
        run_config: Of the run.
        node_config: Of every node, besides ``partition-id`` and ``num-partitions``.
        observe: Is shown every message.
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        clients: int,
        run_config: Config | None = None,
        node_config: Config | None = None,
        observe: Callable[[Message], None] | None = None,
    ) -> None:
        self._app = client_app
        self._observe = observe or (lambda message: None)
        self._replies: dict[str, Message] = {}
        self._contexts = {
            _FIRST_NODE + index: Context(
                _RUN,
                _FIRST_NODE + index,
                {"partition-id": index, "num-partitions": clients, **(node_config or {})},
                RecordDict(),
                dict(run_config or {}),
            )
            for index in range(clients)
        }

    def set_run(self, run: Run) -> None:
        """There is one run only."""

    @property
    def run(self) -> Run:
        """The run."""
        return Run.create_empty(_RUN)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message, as Flower's own grids make it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Lets the nodes answer; their replies wait to be pulled."""
        ids = []
        for message in messages:
            # Strategies put one content into the messages to all nodes; over a network, each gets its own.
            own = copy.deepcopy(message)
            number = own.metadata.__dict__["_message_id"] = str(uuid4())
            self._observe(own)
            reply = self._answer(own)
            self._observe(reply)
            self._replies[number] = reply
            ids.append(number)
        return ids

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._app(message=message, context=context)
        except Exception as error:  # as Flower does it: the run goes on
            return Message(Error(_RAISED, f"{type(error)}:<'{error}'>"), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages."""
        return [self._replies.pop(number) for number in message_ids if number in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Lets the nodes answer; nobody is waited for."""
        return self.pull_messages(self.push_messages(messages))


@contextmanager
def _identity() -> Iterator[None]:
    """Says who messages are from, as Flower's own processes do at their start."""
    before = dict(vars(TaskIdentity))
    TaskIdentity.run_id = _RUN
    TaskIdentity.node_id = _SERVER
    TaskIdentity.task_id = 0
    try:
        yield
    finally:
        for name in ("_run_id", "_node_id", "_task_id"):
            setattr(TaskIdentity, name, before[name])
