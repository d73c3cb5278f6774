"""The client mod that records what a node gets and sends, for an audit on that node."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from fedkl import recordingfile
from fedkl.errors import ConfigError
from fedkl.flower import mask_records
from fedkl.flower.record_fields import PREFIX
from fedkl.flower.records import only_arrays, tensors_of
from fedkl.recordingfile import Recording

_LOG = logging.getLogger("fedkl.flower")
_ROUND = "server-round"  # Flower's own name for it
_MAX_ROUND, _MAX_TEXT = 10**12 - 1, 1000


class RecordingMod:
    """A Flower mod that writes each train message and its reply to this node's disk, and changes neither.

    **Recorded updates are as private as the data**: images can be rebuilt from them. They stay on the node,
    ``folder/node-<node id>/round-<round>/``, folders with mode 0700 and files with 0600. Remove them after
    the audit. `fedkl.auditing.RecordedUpdate.from_recording` reads such a folder.

    What is recorded is what passes at its place in the list of mods:

    * before `LockMod`, or without one: what the server sends and sees. After it: the same arrays, as the app
      gets and gives them;
    * before `TransformMod`: what the server sees. After it: the update before it was changed;
    * before `MaskMod`: words that say nothing, and reading the recording is refused. After it: the update
      before it was masked, which the server never sees by itself.

    Whatever goes wrong in here (a full disk, a folder that cannot be written, arrays that are none) costs
    the recording, with one line in the node's log (logger ``fedkl.flower``), and never the round.

    Args:
        folder: Where to; made with mode 0700 if it is not there.
        rounds: The newest so many of each node are kept, older ones are removed.

    Raises:
        ConfigError: `rounds` is below 1.
    """

    def __init__(self, folder: str | Path, *, rounds: int = 3) -> None:
        if rounds < 1:
            raise ConfigError(f"RecordingMod.rounds: expected at least 1, got {rounds}.")
        self._folder, self._rounds = Path(folder), rounds

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Handles a message; called by Flower."""
        received = None
        if message.metadata.message_type.partition(".")[0] == "train":
            try:  # now: the app may change its message
                received = _received(message.content)
            except Exception as error:
                _log(error)
        reply = call_next(message, context)
        if received is not None and not reply.has_error():
            try:
                self._record(received, reply.content, node=context.node_id)
            except Exception as error:
                _log(error)
        return reply

    def _record(self, received: Recording, reply: RecordDict, *, node: int) -> None:
        place = self._folder / f"node-{node}"
        number = received.about["round"]
        if number is None:
            number = max(recordingfile.recorded_rounds(place), default=0) + 1
        folder = recordingfile.round_folder(place, number)
        recording = Recording(
            received=received.received,
            sent={} if received.masked else _tensors(reply, "The reply"),
            about={**received.about, "round": number, "metrics": _values(reply.metric_records)},
            masked=received.masked,
        )
        try:
            recording.write(folder)
        except BaseException:
            with contextlib.suppress(OSError):  # half a recording would only fill the disk
                recordingfile.remove(folder)
            raise
        for old in list(recordingfile.recorded_rounds(place).values())[: -self._rounds]:
            recordingfile.remove(old)


def _received(content: RecordDict) -> Recording | None:
    """What arrived; None: a message of masked sums that asks for no update."""
    stage = mask_records.stage_of(content)
    if stage not in (None, "train"):
        return None
    return Recording(
        received={} if stage else _tensors(content, "The message"),
        sent={},
        about={"round": _round(content), "config": _values(content.config_records)},
        masked=stage is not None,
    )


def _tensors(content: RecordDict, subject: str) -> dict[str, Tensor]:
    return tensors_of(only_arrays(content, subject=subject), subject=subject, legacy=True)


def _round(content: RecordDict) -> int | None:
    """The server's number of this round, if it gives one that a folder's name can have."""
    for record in content.config_records.values():
        number = record.get(_ROUND)
        if type(number) is int and 0 <= number <= _MAX_ROUND:
            return number
    return None


def _values(records: Mapping[str, ConfigRecord] | Mapping[str, MetricRecord]) -> dict[str, dict[str, Any]]:
    """Records as JSON: finite numbers and texts only."""
    return {
        name: {key: value for key, value in record.items() if _is_plain(value)}
        for name, record in records.items()
        if not name.startswith(PREFIX)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    return isinstance(value, (int, float)) and math.isfinite(value)


def _log(error: Exception) -> None:
    """One line; of errors that are not the system's only the kind, as their texts may quote what came."""
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    _LOG.error("RecordingMod: this message was not recorded (%s); the round goes on.", reason)
