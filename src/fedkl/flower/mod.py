"""The client mod: public tensors in, public tensors out, and nothing else leaves the node."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from contextvars import ContextVar

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import nn

from fedkl.defenses import KeyLock
from fedkl.errors import FedKLError, LockError, SecretError, UpdateError, gathered
from fedkl.flower.private_numbers import PrivateNumbers, numbers_in
from fedkl.flower.records import arrays_of, fitted, only_arrays, tensors_of
from fedkl.flower.store import ClientStore, StoredClient, client_name
from fedkl.locking import Lock

_LOG = logging.getLogger("fedkl.flower")
_ERROR_CODE = 2  # Flower's own for an exception in a ClientApp

# All that a server ever learns of a failure. An exception's own text could hold anything.
REFUSED_MESSAGE = "fedkl: the client refused this message; the reason is in its node's log."
REFUSED_REPLY = "fedkl: the client refused to send its reply; the reason is in its node's log."
FAILED = "fedkl: the client failed; the reason is in its node's log."

_CURRENT: ContextVar[StoredClient | None] = ContextVar("fedkl_flower_client", default=None)


def current_client() -> StoredClient:
    """The client whose message is being handled: its locked model, its memory, its name.

    Its model holds the server's public tensors and the client's own private ones already.

    Raises:
        LockError: No message is being handled by a ClientApp with a `LockMod`.
    """
    client = _CURRENT.get()
    if client is None:
        raise LockError(
            "current_client: no message is being handled. Call it inside a function of a "
            "ClientApp(mods=[fedkl.flower.LockMod(…)]), on the thread that Flower called it on."
        )
    return client


class LockMod:
    """A Flower mod that keeps a client's key, lock and norm statistics on its node.

    Before the app's function runs, it opens the client's lock from the node's encrypted store (or makes it),
    checks that the message holds exactly the public tensors, finite and of the right shapes, and loads them.
    Afterwards it checks that the reply holds exactly the public tensors and no private number, replaces its
    arrays by the checked ones, and, after a training, stores the client's new private state. Whatever goes
    wrong, the node stays up and the server gets an error with a fixed text.

    Put it first in the list of mods: it then has the last word on what is sent.

    Args:
        build: Makes the plain model, e.g. its class; the weights do not matter.
        defense: How a new client's lock is made.
    """

    def __init__(self, build: Callable[[], nn.Module], *, defense: KeyLock | None = None) -> None:
        self._build = build
        self._defense = defense or KeyLock()

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Handles a message; called by Flower."""
        stage = _Stage()
        try:
            name = client_name(context.node_config)
            store = ClientStore.of_node(context.node_config)
            with store.client(name, model=self._build(), defense=self._defense) as client:
                return _handle(message, context, call_next, store, client, stage)
        except Exception as error:
            _LOG.error("%s The server was told no more than that. %s", stage.reason, _described(error))
            return Message(Error(_ERROR_CODE, stage.reason), reply_to=message)


class _Stage:
    """How far a message has come: what to say if it goes no further."""

    reason = FAILED


def _handle(
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
    store: ClientStore,
    client: StoredClient,
    stage: _Stage,
) -> Message:
    stage.reason = REFUSED_MESSAGE
    _receive(message, client.lock)
    before = [secret.detach().clone() for secret in client.lock.secrets()]
    stage.reason = FAILED
    token = _CURRENT.set(client)
    try:
        reply = call_next(message, context)
    finally:
        _CURRENT.reset(token)
    stage.reason = REFUSED_REPLY
    if reply.has_error():  # its text is the app's own, and nobody has checked it
        _LOG.error("%s The app itself replied with an error.", FAILED)
        return Message(Error(reply.error.code, FAILED), reply_to=message)
    numbers = PrivateNumbers([*before, *client.lock.secrets()])
    reply.content = _checked(reply.content, client.lock, numbers)
    stage.reason = FAILED
    if _category(message) == "train":
        _check_sound(client)
        store.save(client)
    return reply


def _check_sound(client: StoredClient) -> None:
    """Private tensors can diverge without the public ones; a lock that did would never open again."""
    kept = client.lock.private_state() | client.memory
    problems = [f"'{name}' has non-finite values" for name, t in kept.items() if not t.isfinite().all()]
    if problems:
        remedy = "The lock stays as it was. Lower the learning rate."
        raise UpdateError(gathered(f"The training of {client.name} diverged.", problems, remedy))


def _category(message: Message) -> str:
    return message.metadata.message_type.partition(".")[0]


def _receive(message: Message, lock: Lock) -> None:
    """Checks a message of the server's and loads its tensors; a query may come without."""
    content, subject = message.content, "Message of the server"
    _refuse_private_names(content, lock, subject)
    if _category(message) == "query" and not content.array_records:
        return
    came = tensors_of(only_arrays(content, subject=subject), subject=subject)
    lock.load_public_state(fitted(came, lock.schema("weights").specs))


def _refuse_private_names(content: RecordDict, lock: Lock, subject: str) -> None:
    """No message names a private tensor: neither as content nor to ask for it."""
    private = lock.private_names.union(link.tensor for link in lock.generation().links)  # γ and β too
    named = {name for name in _words(content) if name in private}
    if named:
        problems = [f"'{name}' is private" for name in sorted(named)]
        remedy = "Use the public names only: those of lock.public_state()."
        raise SecretError(gathered(f"{subject} refused.", problems, remedy))


def _words(content: RecordDict) -> list[str]:
    words: list[str] = list(content)
    for record in content.values():
        words += list(record)
        if isinstance(record, ConfigRecord):
            for value in record.values():
                texts = value if isinstance(value, list) else [value]
                words += [word for text in texts if isinstance(text, str) for word in _split(text)]
    return words


def _split(text: str) -> list[str]:
    """A text and the words in it: names may come as a list in one string."""
    return [text, *text.replace(",", " ").replace(";", " ").split()]


def _checked(content: RecordDict, lock: Lock, numbers: PrivateNumbers) -> RecordDict:
    """A reply's content, its arrays rebuilt from what was checked: bytes around them are not sent.

    Raises:
        SecretError: It holds a private name or private numbers.
        UpdateError: Arrays that are not exactly the public tensors.
    """
    subject = "Reply"
    _refuse_private_names(content, lock, subject)
    checked = RecordDict()
    problems: list[str] = []
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            tensors = tensors_of(record, subject=subject)
            update = lock.public_update(tensors, kind="weights", num_samples=1, round=0)
            problems += [f"'{name}'" for name, t in update.tensors.items() if numbers.in_numbers(t)]
            checked[key] = arrays_of(update.tensors)
        else:
            problems += [f"record '{key}'"] if _holds(record, numbers) else []
            checked[key] = record
    if problems:
        problems = [f"{place} holds numbers of a private tensor" for place in problems]
        raise SecretError(gathered("Reply refused.", problems, "Send public tensors and metrics only."))
    return checked


def _holds(record: MetricRecord | ConfigRecord, numbers: PrivateNumbers) -> bool:
    values = list(record.values())
    pieces = [piece for value in values for piece in (value if isinstance(value, list) else [value])]
    data = any(numbers.in_bytes(piece) for piece in pieces if isinstance(piece, bytes))
    return data or any(numbers.in_numbers(tensor) for tensor in numbers_in(values))


def _described(error: Exception) -> str:
    """An error for the node's own log: our texts hold no values; of others only the kind and the place."""
    if isinstance(error, FedKLError):
        return f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    places = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames[-5:])
    return f"{type(error).__name__}, whose text may hold private values and is not logged, at{places}"
