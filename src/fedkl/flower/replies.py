"""Which replies fit on Flower, which are refused by name, and which averages of them can be used."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from fedkl.errors import FedKLError, UpdateError, gathered, shown
from fedkl.flower.records import fitted, only_arrays, ordered, tensors_of
from fedkl.types import NamedTensors
from fedkl.update import MAX_SAMPLES, TensorSpec, check_tensors

_LOG = logging.getLogger("flwr.fedkl")  # among Flower's own lines, in its format
_MAX_ERROR_TEXT = 500


@dataclass(frozen=True, kw_only=True)
class ReplyRules:
    """What a reply has to look like.

    Attributes:
        specs: Its arrays; None: none are looked for.
        weight: Name of the metric that weighs it.
        loss: Name of a metric that is a number ≥ 0; None: there is none.
    """

    specs: Mapping[str, TensorSpec] | None
    weight: str = "num-examples"
    loss: str | None = None

    def checked(self, reply: Message) -> Message:
        """A reply that fits, its arrays in the order in which they were sent.

        Raises:
            UpdateError: It does not fit.
        """
        specs = self.specs
        if specs is None:
            self._check_metrics(reply.content)
            return reply
        record = only_arrays(reply.content, subject="Reply")
        check_tensors(
            tensors_of(record, subject="Reply", names=specs),
            specs,
            subject="Reply refused.",
            remedy="Reply with exactly the tensors that were sent.",
        )
        self._check_metrics(reply.content)
        if list(record) == list(specs):
            return reply
        content = {
            key: ordered(value, specs) if value is record else value for key, value in reply.content.items()
        }
        return _copy_of(reply, RecordDict(content))

    def _check_metrics(self, content: RecordDict) -> None:
        records = list(content.metric_records.values())
        if len(records) != 1:
            raise UpdateError(f"Reply refused: expected exactly one MetricRecord, got {len(records)}.")
        metrics = records[0]
        odd = odd_metric(metrics)
        if odd is not None:
            raise UpdateError(
                f"Reply refused: the metric {shown(odd)} is no number, or has more than 64 bits."
            )
        _check_number(metrics, self.weight, least="> 0")
        if self.loss is not None:
            _check_number(metrics, self.loss, least="≥ 0")


def sorted_out(
    replies: Iterable[Message], check: Callable[[Message], Message], *, round: int, with_arrays: bool
) -> tuple[list[Message], list[Message]]:
    """Errors, which strategies count themselves, and the replies that fit; the others are refused by name.

    Args:
        replies: All that came.
        check: Gives a reply that fits as it is passed on, and raises UpdateError for others.
        round: For the log.
        with_arrays: Whether replies must have the same ArrayRecords as most have.
    """
    errors, fine = [], []
    nodes: set[int] = set()
    for reply in replies:
        if reply.has_error():
            errors.append(_with_short_text(reply))
            continue
        try:
            if reply.metadata.src_node_id in nodes:
                raise UpdateError("Reply refused: only the first reply of a node in a round counts.")
            nodes.add(reply.metadata.src_node_id)
            fine.append(check(reply))
        except FedKLError as error:
            refused(round, reply, str(error))
        except Exception as error:  # whatever a reply holds, the run goes on
            refused(round, reply, f"it cannot be checked ({type(error).__name__}).")
    return errors, _alike(fine, round, with_arrays=with_arrays)


def _alike(replies: list[Message], round: int, *, with_arrays: bool) -> list[Message]:
    """Replies with the records and metrics that most have; the others are refused."""
    layouts = [_layout(reply, with_arrays=with_arrays) for reply in replies]
    usual = Counter(layouts).most_common(1)
    kept = []
    for reply, layout in zip(replies, layouts, strict=True):
        if layout == usual[0][0]:
            kept.append(reply)
        else:
            refused(round, reply, "its records or metrics have other names or kinds than most have.")
    return kept


def _layout(reply: Message, *, with_arrays: bool) -> tuple[object, ...]:
    """Names of records and metrics, and how long lists are; a strategy raises when these differ."""
    metrics = tuple(
        (name, tuple(sorted((key, len(v) if isinstance(v, list) else -1) for key, v in record.items())))
        for name, record in reply.content.metric_records.items()
    )
    return (tuple(reply.content.array_records) if with_arrays else (), metrics)


def specs_of(arrays: ArrayRecord) -> dict[str, TensorSpec]:
    """What every reply has to look like; the initial arrays themselves must be sound.

    Raises:
        UpdateError: They are not finite, or are no arrays of numbers.
    """
    tensors = tensors_of(arrays, subject="Initial arrays")
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    remedy = "Start from fedkl.flower.public_arrays(model)."
    check_tensors(tensors, specs, subject="Initial arrays refused.", remedy=remedy)
    return specs


def constants(
    replies: Iterable[Message], sent: ArrayRecord, specs: Mapping[str, TensorSpec]
) -> dict[str, Tensor]:
    """Integers and truth values that all replies have as they were sent; float64 does not hold all of them.

    Args:
        replies: What the strategy gets; errors are passed over.
        sent: The global arrays; empty: they are not known.
        specs: The model's.
    """
    records = [only_arrays(reply.content, subject="Reply") for reply in replies if not reply.has_error()]
    same = {
        name: sent[name]
        for name, spec in specs.items()
        if not (spec.dtype.is_floating_point or spec.dtype.is_complex)
        and name in sent
        and all(name in record and record[name].data == sent[name].data for record in records)
    }
    return tensors_of(ArrayRecord(same), subject="Global arrays")


def usable(
    arrays: object,
    specs: Mapping[str, TensorSpec],
    *,
    spoilt: Sequence[str],
    constant: NamedTensors = MappingProxyType({}),
) -> dict[str, Tensor]:
    """An average in the dtypes and the order of the model.

    Args:
        arrays: What the strategy gave.
        specs: The model's.
        spoilt: Names of the strategy's own arrays that are no longer finite.
        constant: What needs no average; see `constants`.

    Raises:
        UpdateError: It is not finite, is not of the model, or left the strategy's own arrays non-finite.
    """
    if not isinstance(arrays, ArrayRecord):
        raise UpdateError(f"Aggregate refused: expected an ArrayRecord, got a {type(arrays).__name__}.")
    came = tensors_of(arrays, subject="Aggregate", names=specs)
    finite = {name for name in constant if bool(came[name].isfinite().all())}
    tensors = fitted({name: constant[name] if name in finite else came[name] for name in specs}, specs)
    remedy = "Lower the server's learning rate."
    if any(t.dtype != specs[name].dtype and bool(t.isfinite().all()) for name, t in tensors.items()):
        remedy = "Such numbers have no average: keep constants out of the state, with persistent=False."
    check_tensors(tensors, specs, subject="Aggregate refused.", remedy=remedy)
    if spoilt:
        problems = [f"the strategy's own {shown(name)} has become non-finite" for name in spoilt]
        raise UpdateError(gathered("Aggregate refused.", problems, remedy))
    return tensors


def record_of(metrics: object) -> MetricRecord | None:
    """What a strategy gives as metrics, as Flower's record; None if it is none."""
    if isinstance(metrics, MetricRecord):
        return metrics
    try:
        return MetricRecord(dict(metrics)) if isinstance(metrics, Mapping) else None
    except TypeError:
        return None


def odd_metric(metrics: MetricRecord) -> str | None:
    """The first metric that is no number or list of numbers as they can be sent."""
    for name, value in metrics.items():
        if not all(map(_is_number, value if isinstance(value, list) else [value])):
            return name
    return None


def _is_number(value: object) -> bool:
    if isinstance(value, int):  # larger ones are no floats, and no text that a log can hold
        return not isinstance(value, bool) and -(2**63) <= value < 2**64
    return isinstance(value, float)


def _check_number(metrics: MetricRecord, name: str, *, least: str) -> None:
    """Checks a metric that a strategy computes with.

    Args:
        metrics: All metrics.
        name: Its name.
        least: ``"> 0"`` or ``"≥ 0"``.
    """
    value = metrics.get(name)
    if value is None:
        got = "none"
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        got = f"a {type(value).__name__}"
    elif value != value:
        got = "NaN"
    elif value < 0 or (value == 0 and least == "> 0"):
        got = f"one that is not {least}"
    elif value > MAX_SAMPLES:
        got = "a larger one"
    else:
        return
    expected = f"the metric {shown(name)} as a number {least} and at most {MAX_SAMPLES}"
    raise UpdateError(f"Reply refused: expected {expected}, got {got}.")


def _with_short_text(reply: Message) -> Message:
    """An error whose text Flower's strategies can log: one line, without control codes."""
    text = str(reply.error.reason or "")
    if text.isprintable() and len(text) <= _MAX_ERROR_TEXT:
        return reply
    return _copy_of(reply, Error(reply.error.code, repr(text[:_MAX_ERROR_TEXT])))


def _copy_of(reply: Message, content: RecordDict | Error) -> Message:
    """A reply with other content; the one that came is not changed."""
    copied = copy.copy(reply)
    if isinstance(content, Error):
        copied.error = content
    else:
        copied.content = content
    return copied


def refused(round: int, reply: Message, reason: str) -> None:
    """Logs that a reply was refused, and why."""
    _LOG.warning("Round %d: reply of node %d refused: %s", round, reply.metadata.src_node_id, reason)
