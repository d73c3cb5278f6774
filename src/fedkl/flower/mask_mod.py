"""The client mod of masked sums: what leaves is masked, and what is taken is a sum that was checked."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping

from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from fedkl.errors import ConfigError, MaskingError, shown
from fedkl.flower import mask_records, mod, model_records
from fedkl.flower.mask_records import MASKS_REFUSED, Record, Stage
from fedkl.flower.model_records import Base
from fedkl.flower.node_member import NodeMember
from fedkl.flower.records import arrays_of, fitted, only_arrays, tensors_of
from fedkl.masking import Contribution
from fedkl.types import NamedTensors

_LOG = logging.getLogger("fedkl.flower")
_NEWS = logging.getLogger("flwr.fedkl")  # among Flower's own lines, in its format
_ERROR_CODE = 2  # as LockMod


class MaskMod:
    """A Flower mod that masks what a client sends, so that the server can add updates up and read none.

    Which masks, for whom and for how long says the cohort that the node's member has joined
    (`fedkl member`, `fedkl cohort`); nothing of it comes from the server. The app's functions stay as they
    are: they get the model, as ever, and reply with arrays and metrics. The arrays are masked. Of a
    training's metrics those are averaged that the server asks for (`Masked(metrics=…)`); the others stay
    here. An evaluation's metrics are sent as they are, and nothing else of it.

    Whatever does not belong to masked sums is refused, so that nothing of this node is ever sent unmasked.
    The server gets one fixed text; the reason is in the node's log (logger ``fedkl.flower``).

    Put it first in the list of mods, before `TransformMod` and `LockMod`. It needs neither.

    Args:
        weight: Name of the metric that says how many samples an update stands for.
    """

    def __init__(self, *, weight: str = "num-examples") -> None:
        self._weight = weight

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Handles a message; called by Flower."""
        if mod.is_handling():
            raise ConfigError("MaskMod: expected before LockMod in the list of mods, it comes after it.")
        try:
            stage = _asked(message)
            with NodeMember.of_node(context.node_config) as node:
                content = _Handling(node, message, context, call_next, weight=self._weight).of(stage)
        except Exception as error:
            _LOG.error("%s The server was told no more than that. %s", MASKS_REFUSED, mod.described(error))
            return Message(Error(_ERROR_CODE, MASKS_REFUSED), reply_to=message)
        return Message(content, reply_to=message)


def _asked(message: Message) -> Stage:
    """What a message asks for.

    Raises:
        MaskingError: It does not belong to masked sums.
    """
    stage = mask_records.stage_of(message.content)
    category = message.metadata.message_type.partition(".")[0]
    expected = "evaluate" if stage == "evaluate" else "train"
    if stage is None or category != expected:
        raise MaskingError(
            f"Refused: a message of type {shown(message.metadata.message_type)} that does not belong to "
            "masked sums. This node sends nothing unmasked. On the server: "
            "Guard(…, aggregation=fedkl.flower.Masked())."
        )
    return stage


class _Handling:
    """One message."""

    def __init__(
        self,
        node: NodeMember,
        message: Message,
        context: Context,
        call_next: ClientAppCallable,
        *,
        weight: str,
    ) -> None:
        self._node, self._message, self._context = node, message, context
        self._call_next, self._weight = call_next, weight

    def of(self, stage: Stage) -> RecordDict:
        """What is sent back."""
        content, reply = self._message.content, RecordDict()
        if stage == "who":
            mask_records.put_who(reply, self._node.who)
        elif stage == "here":
            mask_records.put_stage(reply, "here")
        elif stage == "train":
            self._train(model_records.base_of(content), reply)
        elif stage == "evaluate":
            self._evaluate(model_records.base_of(content), reply)
        elif stage == "again":
            call = mask_records.call_of(content)
            mask_records.put_upload(reply, self._node.again(model_records.base_of(content), call))
        elif stage == "reveal":
            message = mask_records.list_of(content)
            mask_records.put_reveal(reply, self._node.reveal(model_records.base_of(content), message))
        else:
            path = self._node.deliver(model_records.base_of(content), content)
            _NEWS.info("The trained model is in %s.", path)
            mask_records.put_stage(reply, "deliver")
        return reply

    def _train(self, base: Base, reply: RecordDict) -> None:
        call = mask_records.call_of(self._message.content)
        if call.run != base.run:
            raise MaskingError("Refused: the call is of another run than the model.")
        if call.attempt:  # two updates of one round would give their difference away
            raise MaskingError("Refused: a further attempt masks the update that there is.")
        if call.settings != mask_records.settings_of(self._message, model=base.record):
            raise MaskingError("Refused: the app would get other settings than the call says.")
        member, model = self._node.receive(base, self._message.content)
        member.check(call)  # before the app trains: a second update of one round is never made, nor kept
        update = self._app_reply(base, model)
        mask_records.put_upload(reply, self._node.upload(member, call, self._contribution(base, update)))

    def _evaluate(self, base: Base, reply: RecordDict) -> None:
        _, model = self._node.receive_mean(base, self._message.content)
        for name, record in self._app_reply(base, model).items():
            single = isinstance(record, MetricRecord) and not any(
                isinstance(value, list) for value in record.values()
            )
            if not single:
                raise MaskingError(
                    f"Evaluation refused: {shown(name)} is no MetricRecord of single numbers, and whatever "
                    "else an evaluation gives would leave this node unmasked."
                )
            reply[name] = record

    def _app_reply(self, base: Base, model: NamedTensors) -> RecordDict:
        """What the app makes of a model."""
        own = _but(mask_records.without_masks(self._message.content), base.record)
        others = [name for name, record in own.items() if isinstance(record, ArrayRecord)]
        if others:  # the app might take one of them for the model
            raise MaskingError(f"Refused: arrays beside the model: {', '.join(map(shown, others[:5]))}.")
        inner = copy.copy(self._message)
        inner.content = RecordDict({base.record: arrays_of(model), **mask_records.in_order(own)})
        reply = self._call_next(inner, self._context)
        if reply.has_error():  # its text is the app's own, and nobody has checked it
            raise MaskingError("The app itself replied with an error; see above.")
        return reply.content

    def _contribution(self, base: Base, content: RecordDict) -> Contribution:
        subject = "Update"
        tensors = tensors_of(only_arrays(content, subject=subject), subject=subject, names=base.specs)
        metrics = {
            name: value for record in content.metric_records.values() for name, value in record.items()
        }
        samples = metrics.get(self._weight)
        if not isinstance(samples, (int, float)) or not math.isfinite(samples) or samples != int(samples):
            raise MaskingError(
                f"Update refused: expected the metric {shown(self._weight)} as a whole number of samples."
            )
        return Contribution(
            tensors=fitted(tensors, base.specs),
            samples=int(samples),
            metrics={name: _number(metrics, name) for name in base.metrics},
        )


def _but(records: dict[str, Record], name: str) -> dict[str, Record]:
    return {key: record for key, record in records.items() if key != name}


def _number(metrics: Mapping[str, object], name: str) -> float:
    value = metrics.get(name)
    if not isinstance(value, (int, float)):
        raise MaskingError(
            f"Update refused: the server averages the metric {shown(name)}, which this app does not give as "
            "a number."
        )
    return float(value)
