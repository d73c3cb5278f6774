"""The client mod: public tensors in, public tensors out, and nothing else leaves the node."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import nn

from fedkl.custody import ClientStore, StoredClient
from fedkl.defenses import KeyLock
from fedkl.errors import ConfigError, FedKLError, LockError, SecretError, UpdateError, gathered, shown
from fedkl.flower.node import client_name, node_store
from fedkl.flower.records import arrays_of, fitted, only_arrays, tensors_of
from fedkl.locking import Lock
from fedkl.secret_search import SecretSearch

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
    Afterwards it checks that the reply's arrays are exactly the public tensors, looks for private numbers in
    all that the reply holds (`fedkl.secret_search`), builds a new reply from what was checked, and stores the
    client's new private state after a training, or where the app has recalibrated its norms. Whatever goes
    wrong, the node stays up and the server
    gets an error with a fixed text and code.

    Put it first in the list of mods: it then has the last word on what is sent.

    Args:
        build: Makes the plain model, e.g. its class. The weights do not matter, unless the federation starts
            from a trained model: it must give that model then, whose γ and β a new client's lock keeps.
        defense: How a new client's lock is made.

    Raises:
        ConfigError: The defense changes updates too, which this mod does not do.
    """

    def __init__(self, build: Callable[[], nn.Module], *, defense: KeyLock | None = None) -> None:
        self._build = build
        self._defense = defense or KeyLock()
        if self._defense.changes_updates:
            raise ConfigError(
                f"LockMod: expected a lock that changes no updates, got {type(self._defense).__name__}, "
                "whose transform would not be applied. Put fedkl.flower.TransformMod before this one for it."
            )

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Handles a message; called by Flower."""
        stage = _Stage()
        try:
            name = client_name(context.node_config)
            store = node_store(context.node_config)
            with store.client(name, model=self._build(), defense=self._defense) as client:
                return _handle(message, context, call_next, store, client, stage)
        except Exception as error:
            _LOG.error("%s The server was told no more than that. %s", stage.reason, described(error))
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
    trains = _category(message) == "train"
    opened = {} if trains else client.lock.private_state()
    memory = {} if trains else {name: tensor.clone() for name, tensor in client.memory.items()}
    stage.reason = FAILED
    token = _CURRENT.set(client)
    try:
        reply = call_next(message, context)
    finally:
        _CURRENT.reset(token)
    stage.reason = REFUSED_REPLY
    if reply.has_error():  # its text is the app's own, and nobody has checked it
        _LOG.error("%s The app itself replied with an error.", FAILED)
        return Message(Error(_ERROR_CODE, FAILED), reply_to=message)
    numbers = SecretSearch([*before, *client.lock.secrets()])
    checked = _checked(reply.content, client.lock, numbers)
    stage.reason = FAILED
    if not trains and client.statistics:  # all else that an evaluation changes is its own
        client.lock.load_private_state(opened | client.statistics)
        client.memory.clear()
        client.memory.update(memory)
    if trains or client.statistics:
        _check_sound(client)
        store.save(client)
    return Message(checked, reply_to=message)  # a new one: times and ids that the app could set are not sent


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
    specs = lock.schema("weights").specs
    came = tensors_of(only_arrays(content, subject=subject), subject=subject, names=specs.keys())
    lock.load_public_state(fitted(came, specs))


def _refuse_private_names(content: RecordDict, lock: Lock, subject: str) -> None:
    """No message names a private tensor: neither as content nor to ask for it."""
    private = lock.private_names.union(link.tensor for link in lock.generation().links)  # γ and β too
    names = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, private))})(?![\w.])")
    named = {match for text in _texts(content) for match in names.findall(text)}
    if named:
        problems = [f"'{name}' is private" for name in sorted(named)]
        remedy = "Use the public names only: those of lock.public_state()."
        raise SecretError(gathered(f"{subject} refused.", problems, remedy))


def _texts(content: RecordDict) -> Iterator[str]:
    """Every text in a message: names of records, keys, and values."""
    yield from content
    for record in content.values():
        yield from record
        if isinstance(record, ConfigRecord):
            yield from (piece for piece in _pieces(record.values()) if isinstance(piece, str))


def _pieces(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        yield from value if isinstance(value, list) else (value,)


def _checked(content: RecordDict, lock: Lock, numbers: SecretSearch) -> RecordDict:
    """A reply's content, its arrays rebuilt from what was checked: bytes around them are not sent.

    Raises:
        SecretError: It holds a private name or private numbers.
        UpdateError: Arrays that are not exactly the public tensors.
    """
    subject = "Reply"
    _refuse_private_names(content, lock, subject)
    names = lock.schema("weights").specs.keys()
    checked = RecordDict()
    problems: list[str] = []
    for key, record in content.items():
        checked[key] = record
        if isinstance(record, ArrayRecord):
            tensors = tensors_of(record, subject=subject, names=names)
            update = lock.public_update(tensors, kind="weights", num_samples=1, round=0, search=False)
            problems += [shown(name) for name, t in update.tensors.items() if numbers.in_numbers(t)]
            checked[key] = arrays_of(update.tensors)
        elif _in_values(record, numbers):
            problems.append(f"record {shown(key)}")
    if _in_texts(content, numbers):
        problems.append("its texts and names")
    if problems:
        problems = [f"{place} holds numbers of a private tensor" for place in problems]
        raise SecretError(gathered("Reply refused.", problems, "Send public tensors and metrics only."))
    return checked


def _in_values(record: MetricRecord | ConfigRecord, numbers: SecretSearch) -> bool:
    """Whether private numbers stand in a record's lists or bytes, or are spread over its single values."""
    values = list(record.values())
    lists: list[Sequence[object]] = [value for value in values if isinstance(value, list)]
    lists.append([value for value in values if not isinstance(value, list)])
    if any(numbers.in_list([n for n in each if isinstance(n, (int, float))]) for each in lists):
        return True
    data = [piece for piece in _pieces(values) if isinstance(piece, bytes)]
    return any(numbers.in_bytes(piece) for piece in (*data, b"".join(data)))


def _in_texts(content: RecordDict, numbers: SecretSearch) -> bool:
    """Whether private numbers stand in a text, or are spread over several."""
    texts = list(_texts(content))
    return any(numbers.in_text(text) for text in (*texts, "".join(texts), " ".join(texts)))


def is_handling() -> bool:
    """Whether a `LockMod` is handling a message on this thread."""
    return _CURRENT.get() is not None


def described(error: Exception) -> str:
    """An error for the node's own log: our texts hold no values; of others only the kind and the place."""
    if isinstance(error, FedKLError):
        return f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    places = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames[-5:])
    return f"{type(error).__name__}, whose text may hold private values and is not logged, at{places}"
