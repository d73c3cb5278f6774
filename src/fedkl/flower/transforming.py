"""The client mod for defenses that change what is sent and keep nothing: noise, clipping and the like."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn

from fedkl.defenses import Defense
from fedkl.errors import ConfigError, SecretError, UpdateError
from fedkl.flower import mod
from fedkl.flower.records import arrays_of, only_arrays, tensors_of
from fedkl.locking import frozen_names, is_private, tied_names
from fedkl.protocol import Sending
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec

_LOG = logging.getLogger(__name__)
_ERROR_CODE = 2  # as LockMod
_SERVERS = "Message of the server"
NOT_CHANGED = "fedkl: this client's update could not be changed as its defense says; it was not sent."


class TransformMod:
    """A Flower mod that does to every trained update what a defense does before it is sent.

    The reply's arrays must have the names and shapes of those that came from the server. With a `LockMod`,
    put this one before it in the list of mods: the lock looks for private numbers in what the app made, and
    cannot find them behind noise.

    Args:
        defense: What is done to updates.
        network: The client's, as the app trains it, for defenses that look at it. Only read. Parameters that
            are frozen in it are sent as they came, and tensors of several names are changed once: give it
            where there are any.
        sample: Gives so many of the client's images at most, and their labels, as the network is called with
            them; for defenses that look at images.

    Raises:
        ConfigError: It keeps tensors private, which takes a `LockMod`; changes the network or how clients
            train, which the app itself must do; changes nothing that is sent; or is for attacks only.
        SecretError: The network is one client's own, made by `bake()`.
    """

    def __init__(
        self,
        defense: Defense,
        *,
        network: nn.Module | None = None,
        sample: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        defense.check_training()
        if problem := _problem(defense):
            raise ConfigError(
                f"TransformMod: expected a defense that changes updates and nothing else, got "
                f"{defense.describe()}, {problem}"
            )
        if network is not None and is_private(network):
            raise SecretError(
                f"TransformMod: this {type(network).__name__} is one client's own, made by bake(): an app "
                "that trains it sends what the lock keeps private. Train a LockMod's model, or a plain one."
            )
        self._defense = defense
        self._network, self._sample = network, sample
        self._frozen = frozenset[str]() if network is None else frozen_names(network)
        self._named: dict[str, Tensor] = {}
        if network is not None:
            self._named |= network.named_parameters(remove_duplicate=False)
            self._named |= network.named_buffers(remove_duplicate=False)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Handles a message; called by Flower."""
        if mod.is_handling():
            raise ConfigError("TransformMod: expected before LockMod in the list of mods, it comes after it.")
        is_training = message.metadata.message_type.partition(".")[0] == "train"
        if is_training:
            try:
                self._check(message.content)
            except Exception as error:
                _LOG.error("%s %s", NOT_CHANGED, mod.described(error))
                return Message(Error(_ERROR_CODE, NOT_CHANGED), reply_to=message)
        reply = call_next(message, context)
        if reply.has_error() or not is_training:
            return reply
        try:
            content = self._changed(reply.content, message.content)
        except Exception as error:  # its text may hold the update as it was before
            _LOG.error("%s %s", NOT_CHANGED, mod.described(error))
            return Message(Error(_ERROR_CODE, NOT_CHANGED), reply_to=message)
        return Message(content, reply_to=message)

    def _check(self, sent: RecordDict) -> None:
        """Refuses what the defense cannot change, before anything is trained.

        Raises:
            ConfigError: There are such tensors.
        """
        with suppress(UpdateError):  # whoever is behind this mod says what is wrong with the message
            came = tensors_of(only_arrays(sent, subject=_SERVERS), subject=_SERVERS)
            specs = {name: TensorSpec.of(tensor) for name, tensor in came.items()}
            self._defense.check_sent(PublicSchema(kind="weights", specs=specs))

    def _changed(self, content: RecordDict, sent: RecordDict) -> RecordDict:
        """A reply's content with its arrays changed.

        Raises:
            UpdateError: They are not those that the server sent, or are not finite.
        """
        came = tensors_of(only_arrays(sent, subject=_SERVERS), subject=_SERVERS)
        trained = tensors_of(only_arrays(content, subject="Reply"), subject="Reply", names=came.keys())
        # Averages of counts are no integers: the dtypes are the client's.
        specs = {n: TensorSpec(shape=tuple(t.shape), dtype=trained[n].dtype) for n, t in came.items()}
        schema = PublicSchema(kind="weights", specs=specs, private=frozenset())
        update = PublicUpdate(schema=schema, tensors=trained, num_samples=1, round=0)
        frozen = self._frozen.intersection(came)
        tied = tied_names({name: tensor for name, tensor in self._named.items() if name in came})
        at_hand = Sending(received=came, network=self._network, sample=self._sample, frozen=frozen, tied=tied)
        changed = self._defense.transform(update, client=at_hand)
        if changed.schema is not schema:
            raise UpdateError("TransformMod: the defense gave an update of another kind.")
        arrays = arrays_of(changed.tensors)
        return RecordDict({key: arrays if isinstance(r, ArrayRecord) else r for key, r in content.items()})


def _problem(defense: Defense) -> str | None:
    """What a defense does that no mod of updates can do, and who can."""
    if defense.keeps_tensors:
        return "which keeps tensors private. A key-lock takes fedkl.flower.LockMod."
    if defense.changes_network:
        return "which changes the network. Build the changed one in the app and on the server."
    if defense.changes_procedure:
        return "which changes how clients train. Train so in the app."
    return None if defense.changes_updates else "which changes none."
